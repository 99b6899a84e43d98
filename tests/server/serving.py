"""A zmoe-serve as its users start one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import unused_port

MARK = "ZMOE_TEST_MARK"
READY_S = 120.0
END_S = 120.0
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Server:
    """A server's process, and where it answers."""

    def __init__(self, *flags: str, port: int | None = None) -> None:
        self.port = port or unused_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zmoe.cli.serve", "--port", str(self.port), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a test is for this process alone
            env={**os.environ, MARK: self.mark},
        )

    def wait_until_ready(self) -> str:
        """What it prints when it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return line

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code, and what it has written to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(END_S), self.process.communicate()[1]
        finally:
            self.process.kill()

    def health(self) -> str:
        """Its state, or "none" where nobody listens."""
        try:
            return str(httpx.get(f"{self.url}/health").json()["status"])
        except httpx.TransportError:
            return "none"

    def wait_for(self, status: str) -> None:
        """Wait until /health says `status`."""
        until = time.monotonic() + READY_S
        while self.health() != status:
            assert time.monotonic() < until, f"{self.health()} instead of {status}"
            time.sleep(0.05)

    def processes(self) -> dict[int, str]:
        """Command lines of all processes that it has started, and of itself, by id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or is not ours
                if f"{MARK}={self.mark}" in (entry / "environ").read_text(errors="replace"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A server that is ready, and has ended well afterwards."""
    server = Server(*flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        code, said = server.end()
    assert code == 0, said
