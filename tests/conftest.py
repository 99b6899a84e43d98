"""Fixtures for all tests."""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Iterator

import pytest
from hypothesis import settings

# In the background of a shell Ctrl-C is ignored, and our children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy", deadline=None)  # other tests run beside
settings.load_profile("busy")


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys that runs keep for their user go to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests on all cores; some, which are named, in this process, as a debugger likes it.

    Many tests start processes of their own: more at a time would mostly wait.
    """
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 8) if everything else 0


PORTS = range(10000, 32768)  # systems hand out others by themselves, to whoever asks


def unused_port() -> int:
    """A port that nobody listens at, and nobody is given by chance."""
    while True:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@pytest.fixture
def free_port() -> int:
    return unused_port()
