"""What every command shares: one-line errors, exit codes, signals."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from zmoe.errors import InputError, ZmoeError

MOST_GIB = 1 << 20


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" where there is one, and the help has not said it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_plain = action.default is None or action.default is False or action.default == []
        if is_plain or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, no abbreviations, exit code 2."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--debug", action="store_true", help="show a traceback on errors")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _on_terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


def run_command(prog: str, debug: bool, body: Callable[[], None]) -> int:
    """Run `body`; its exit code. An error is one line on stderr, and a traceback with `debug`."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        body()
        sys.stdout.flush()
    except BrokenPipeError:  # our reader has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        # Not `return`: where Ctrl-C met an exec() of some import, CPython remembers it
        # as unhandled and ends by the signal, whatever we return.
        os._exit(130)
    except ZmoeError as error:
        if debug:
            traceback.print_exc()
        one_line = " ".join(str(error).split())
        print(f"{prog}: {type(error).__name__}: {one_line}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        one_line = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{prog}: internal error: {one_line} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def memory_limit(gib: float | None) -> int | None:
    """The bytes of --memory-limit. Raises InputError."""
    if gib is None:
        return None
    if not 0 < gib < MOST_GIB:
        raise InputError(f"--memory-limit is {gib:g}: expected a positive number of GiB")
    return int(gib * 2**30)


def warn_unencrypted(prog: str, address: str) -> None:
    """Say it when a node listens beyond this machine."""
    if not address.startswith("127."):
        print(
            f"{prog}: warning: listening on {address}; links are not yet encrypted, "
            "use a network that you trust",
            file=sys.stderr,
        )
