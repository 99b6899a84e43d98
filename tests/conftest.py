"""Fixtures for all tests."""

from __future__ import annotations

import signal
import socket

import pytest

# In the background of a shell Ctrl-C is ignored, and our children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
