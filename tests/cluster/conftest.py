"""Run the commands as a user does, and see that no process is left behind."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest

from tests.conftest import unused_port
from zmoe.cli import node, prestack, run
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import EngineConfig, Timing

COMMANDS = {"run": run, "node": node, "prestack": prestack}
MARK = "ZMOE_TEST_MARK"
# What is started ends with this process, even if that is killed and no fixture is torn down.
ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
PATIENCE_S = 60  # longer than anything takes that does work, on a busy machine too
T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float, what: str) -> T:
    """Poll `condition` until it is true, and return that; fail with `what` after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.01)
    return found


def first_output(process: subprocess.Popen[str]) -> None:
    """Block until `process` has generated something."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], PATIENCE_S)[0], "nothing generated"
    assert process.stdout.read(1)


def stand_in_for_ssh(folder: Path) -> Path:
    """Write an `ssh` into `folder`, to be first on the PATH: it logs its arguments, refuses
    one host, else runs the command. Returns the log, a tuple (options, host, command) a line.
    """
    log, script = folder / "ssh.log", folder / "ssh"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "*options, host, command = sys.argv[1:]\n"
        f"open({str(log)!r}, 'a').write(repr((options, host, command)) + '\\n')\n"
        "if host == 'unreachable':\n"
        "    sys.exit('ssh: connect to host unreachable port 22: Connection timed out')\n"
        "os.execv('/bin/sh', ['sh', '-c', command])\n"
    )
    script.chmod(0o755)
    return log


def processes_with(mark: str) -> list[int]:
    """Ids of the running processes whose environment holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


class Commands:
    """Starts the commands with a mark in their environment, to find what they leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # where they run
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, MARK: self.mark, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, module: str, *arguments: object) -> subprocess.Popen[str]:
        return self.python("-m", f"zmoe.cli.{module}", *arguments)

    def python(self, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*ENDS_WITH_US, sys.executable, *map(str, arguments)],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zmoe.cli.run", *map(str, arguments)],
            env=self.env,
            cwd=self.folder,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=120,
        )

    def on_a_terminal(self, module: str, *arguments: object) -> bytes:
        """What a command that succeeds writes to standard error, which is a terminal."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*ENDS_WITH_US, sys.executable, "-m", f"zmoe.cli.{module}", *map(str, arguments)],
            env={**self.env, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal's end shows
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        return shown

    def call(
        self, command: str, *arguments: object, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Call a command's main() in this process, which spares a process its imports.

        The environment and the working directory are as those of a process of its own. What
        the command starts is a real process.
        """
        out, errors = io.StringIO(), io.StringIO()
        given, on_terminate = [str(each) for each in arguments], signal.getsignal(signal.SIGTERM)
        with (
            mock.patch.dict(os.environ, self.env, clear=True),
            mock.patch("sys.stdin", io.StringIO(stdin)),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            try:
                code = COMMANDS[command].main(given)
            except SystemExit as end:  # argparse
                assert isinstance(end.code, int)
                code = end.code
            finally:
                signal.signal(signal.SIGTERM, on_terminate)
        return subprocess.CompletedProcess(given, code, out.getvalue(), errors.getvalue())

    def refused(self, *arguments: object) -> str:
        """The one line with which zmoe-run, called in this process, refuses `arguments`."""
        return self.refusal(self.call("run", *arguments))

    def refusal(self, done: subprocess.CompletedProcess[str]) -> str:
        """The one line that a command that must fail has said; it printed and wrote nothing."""
        assert done.returncode == 2, (done.returncode, done.stderr)
        assert done.stdout == ""
        assert not list(self.folder.iterdir())
        lines = [line for line in done.stderr.splitlines() if "warning:" not in line]
        assert len(lines) == 1, done.stderr
        return lines[0]

    def others(self, *known: int) -> list[int]:
        """Marked processes that are none of `known`."""
        return [pid for pid in processes_with(self.mark) if pid not in known]


@contextlib.contextmanager
def commands_in(folder: Path) -> Iterator[Commands]:
    """Commands that run in the empty `folder`; at the end their processes are ended."""
    runner = Commands(folder)
    try:
        yield runner
        for process in runner.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in runner.started:  # others may hold its output open, even stopped ones
            process.communicate(timeout=PATIENCE_S)
        wait_until(lambda: not processes_with(runner.mark), PATIENCE_S, "all processes ended")
        assert not list(runner.folder.iterdir())
    finally:
        for pid in processes_with(runner.mark):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands_in(tmp_path_factory.mktemp("commands")) as runner:
        yield runner


class Workers:
    """Workers started by hand, one set for each number of nodes, that serve run after run."""

    def __init__(self, commands: Commands) -> None:
        self._commands, self._ports = commands, dict[int, int]()

    def spec(self, nodes: int, engine: EngineConfig) -> ClusterSpec:
        """Of a run on them; they are started for the first one."""
        if nodes not in self._ports:
            self._ports[nodes] = port = unused_port()
            for rank in range(1, nodes):
                self._commands.start("node", "--leader", f"127.0.0.1:{port}", "--rank", rank)
        timing = Timing(join=PATIENCE_S)
        return ClusterSpec(
            nodes, manual=True, port=self._ports[nodes], engine=engine, timing=timing
        )


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with commands_in(tmp_path_factory.mktemp("workers")) as commands:
        yield Workers(commands)
