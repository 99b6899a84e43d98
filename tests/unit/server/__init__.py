"""Tests of zmoe.server."""
