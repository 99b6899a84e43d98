"""Tests of zmoe-serve: real processes, sockets and clients."""
