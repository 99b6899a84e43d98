"""Measuring this machine and its links for the performance model, for zmoe-plan --calibrate."""
