"""A check, its result, and processes that have a deadline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from zmoe.errors import ZmoeError

_GRACE_S = 10.0  # between TERM and KILL: zmoe-run ends its nodes meanwhile


class Check(NamedTuple):
    """`run` returns what it has found, and raises what has failed."""

    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Result:
    """`value`: what was found, or in one line what has failed."""

    check: str
    ok: bool
    value: str
    seconds: float


def results(checks: Iterable[Check], say: Callable[[str], None]) -> Iterator[Result]:
    """One for each check, as soon as it is there."""
    for check in checks:
        say(check.name)
        begin = time.perf_counter()
        try:
            ok, value = True, check.run()
        except ZmoeError as error:
            ok, value = False, str(error)
        except Exception as error:  # a check may fail in any way, and the others are wanted, too
            ok, value = False, f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - begin, 2)
        yield Result(check.name, ok, " ".join(value.split()), seconds)


def python(module: str, *arguments: str) -> list[str]:
    """The words that run main() of `module`, as the installed package has it."""
    own_path = "import sys; sys.path = [p for p in sys.path if p]"
    program = f"{own_path}; from {module} import main; sys.exit(main())"
    return [sys.executable, "-c", program, *arguments]


def output(
    command: Sequence[str], deadline_s: float, env: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Standard output and error of `command`, with `env` added to the environment.

    Raises ZmoeError with its last words if it fails, or is not done by the deadline; then, and
    when this process is interrupted, it is ended.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches us alone
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
    )
    try:
        out, errors = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise ZmoeError(f"not done within {deadline_s:g} s") from None
    finally:
        _end(process)
    if process.returncode:
        lines = errors.strip().splitlines()
        words = lines[-1] if lines else f"ended with {process.returncode}, and said nothing"
        raise ZmoeError(words)
    return out, errors


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # in the kernel, as with a wedged GPU
                process.communicate(timeout=_GRACE_S)
