"""Nodes as processes: launching, hello, membership, steps and failure."""
