"""What every command does about its standard streams, its limits and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from zmoe.cli.common import run_command
from zmoe.errors import InputError, ZmoeError


def command(
    body: str, redirected: str = "", limit: int = 1024, **env: str
) -> subprocess.CompletedProcess[str]:
    """A command that does `body`, started by a shell that redirects its streams, and with a
    limit of open files.
    """
    program = (
        "import os, sys\n"
        "from zmoe.cli.common import run_command\n"
        f"def body():\n    {body}\n"
        "sys.exit(run_command('prog', False, body))\n"
    )
    return subprocess.run(
        ["sh", "-c", f'ulimit -n {limit}; "$0" -c "$1" {redirected}', sys.executable, program],
        env={**os.environ, "PYTHONUNBUFFERED": "", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_closed_streams_are_not_taken_by_the_next_file() -> None:
    done = command("print(os.open('.', os.O_RDONLY) > 2, file=open('/dev/fd/3', 'w'))", "3>&1 <&-")
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


@pytest.mark.parametrize("body", ["print('x')", "print('x' * 100_000)"])
@pytest.mark.parametrize(
    ("redirected", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
)
def test_output_that_cannot_be_written(body: str, redirected: str, reason: str) -> None:
    done = command(body, redirected)
    assert done.stderr == f"prog: cannot write to standard output: {reason}\n"
    assert done.returncode == 1


def test_a_reader_that_has_gone_needs_no_word() -> None:
    done = command("[print('x', flush=True) for _ in range(9)]", "| head -n 1; exit $?")
    assert (done.stdout, done.stderr) == ("x\n", "")


def test_messages_do_not_land_on_the_output_where_standard_error_is_closed() -> None:
    done = command("print('x'); print('warning', file=sys.stderr)", "2>&-")
    assert (done.stdout, done.returncode) == ("x\n", 0)


def test_characters_that_the_output_lacks() -> None:
    done = command("print('caf\\u00e9')", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr, done.returncode) == ("caf\\xe9\n", "", 0)


def test_a_low_limit_of_open_files() -> None:
    """mlx-lm sets the limit when it is imported, which the system refuses."""
    done = command("import mlx_lm.utils; print('x')", limit=200)
    assert (done.stdout, done.stderr, done.returncode) == ("x\n", "", 0)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (InputError("--top-p is 2: expected\na number"), "--top-p is 2: expected a number", 2),
        (ZmoeError("rank 1 has gone"), "rank 1 has gone", 1),
        (PermissionError(13, "Permission denied", "/a/file"), "/a/file: Permission denied", 1),
        (BrokenPipeError(32, "Broken pipe"), "internal error: BrokenPipeError: [Errno 32]", 1),
        (KeyError("x"), "internal error: KeyError: 'x' (--debug shows where)", 1),
    ],
)
def test_an_error_is_one_line(
    error: Exception, line: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> Any:
        raise error

    assert run_command("prog", False, body) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"prog: {line}")
    assert captured.err.count("\n") == 1
