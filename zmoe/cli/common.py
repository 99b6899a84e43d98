"""What every command shares: flags of settings, one-line errors, exit codes, signals."""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar, cast, get_origin

from zmoe.cluster.spec import ClusterSpec, PlacementRequest, WorkerSpec
from zmoe.config import Batching, EngineConfig, Sampling, Settings, Timing, fields_of
from zmoe.errors import InputError, SettingError, ZmoeError
from zmoe.exchange.keys import is_loopback

MOST_GIB = 1 << 20
_KINDS = (Sampling, Timing, EngineConfig, Batching, ClusterSpec, PlacementRequest, WorkerSpec)
_FLAGS = {field.name: field.flag for kind in _KINDS for field in fields_of(kind)}
_MLX_LM_FILES = 4096

Result = TypeVar("Result")


def _with_default(text: str, default: object) -> str:
    """Return the help `text` with the default, unless there is none or `text` states it."""
    has_none = default is None or default is False or default in ((), argparse.SUPPRESS)
    return text if has_none or "(default: " in text else f"{text} (default: {default})"


class _HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return _with_default(action.help or "", action.default)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, exit code 2 and no abbreviated flags."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--debug", action="store_true", help="Show a traceback on errors")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_settings(
    add: Callable[..., Any], kind: type[Settings], *names: str, required: bool = True
) -> None:
    """Add the flags of the fields `names` of `kind`, or of all its fields that have one.

    `add` is the add_argument of a parser or group. given_settings() collects the values. Fields
    without a default are `required`, unless they may come from elsewhere.
    """
    for field in fields_of(kind):
        setting, how = field.setting, dict[str, Any]()
        if field.name not in names if names else not setting.help:
            continue
        if field.kind is bool:
            how["action"] = "store_true"
        elif get_origin(field.kind) is tuple:
            how |= {"action": "append", "metavar": setting.metavar}
        else:
            how |= {"type": float if setting.in_gib else field.kind, "metavar": setting.metavar}
            how |= {"choices": setting.limit.choices if setting.limit is not None else None}
        if not hasattr(kind, field.name):
            how["required"] = required
        flags = (setting.short, field.flag) if setting.short else (field.flag,)
        text = _with_default(setting.help, getattr(kind, field.name, None))
        add(*flags, default=argparse.SUPPRESS, help=text, **how)


def add_hosts(add: Callable[..., Any]) -> None:
    """Add the flags whose values zmoe.cluster.hosts.hosts_from() takes."""
    add("--hosts", help="Comma-separated hosts in rank order; the first is this machine")
    add("--hostfile", type=Path, metavar="FILE", help="The hosts as a JSON file of mlx.launch")


def given_settings(options: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """The fields of `kind` whose flags were given, by name. Raises InputError."""
    found = {}
    for field in fields_of(kind):
        flag = field.flag.removeprefix("--").replace("-", "_")
        if field.setting.help and hasattr(options, flag):
            value = getattr(options, flag)
            found[field.name] = memory_limit(value) if field.setting.in_gib else value
    return found


def _words(error: ZmoeError) -> str:
    """Return the message of `error`, with the flag in the place of a setting's name."""
    if not isinstance(error, SettingError):
        return str(error)
    flag = _FLAGS.get(error.setting, "--" + error.setting.replace("_", "-"))
    return f"{flag} {error.problem}"


def _on_terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


class _OutputError(ZmoeError):
    """A failure of standard output, and of no other file."""


class _Output:
    """Standard output whose failures raise _OutputError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Raises _OutputError."""
        return self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Raises _OutputError."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except OSError as error:
            # Python would try again to write what is left, and complain, when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise _OutputError(f"cannot write to standard output: {error.strerror}") from error


def run_command(prog: str, debug: bool, body: Callable[[], None]) -> int:
    """Run `body` and return the exit code.

    An error prints one line on standard error and, with `debug`, a traceback.
    """
    signal.signal(signal.SIGTERM, _on_terminate)
    _prepare_streams()
    _tolerate_low_file_limit()
    try:
        with redirect_stdout(cast(TextIO, _Output(sys.stdout))):
            body()
            sys.stdout.flush()
    except KeyboardInterrupt:
        # Not `return`: where Ctrl-C met an exec() of some import, CPython remembers it
        # as unhandled and ends by the signal, whatever we return.
        os._exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(prog, error)
    return 0


def _report(prog: str, error: Exception) -> int:
    """Print one line on standard error for `error`, and return the exit code."""
    if isinstance(error.__cause__, BrokenPipeError) and isinstance(error, _OutputError):
        return error.exit_code  # our reader has gone: nobody is left to tell
    if isinstance(error, ZmoeError):
        line, code = _words(error), error.exit_code
    elif isinstance(error, OSError) and error.filename is not None:
        line, code = f"{error.filename}: {error.strerror}", 1
    else:
        line, code = f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1
    with suppress(OSError):  # standard error may be full, too
        print(f"{prog}: {' '.join(line.split())}", file=sys.stderr)
    return code


def _prepare_streams() -> None:
    """Open the standard streams that our caller has closed.

    Otherwise the next file to be opened would become one of them. Reading from or writing to
    such a stream fails as before. Characters that the output's encoding lacks are written as
    escapes.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    # Python has None for a stream that was closed; nobody is left to read standard error.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _tolerate_low_file_limit() -> None:
    """Let mlx-lm be imported if the hard limit of open files is low.

    mlx-lm raises that limit on import, which zmoe does not need and which then fails.
    """
    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < _MLX_LM_FILES:
        resource.setrlimit = lambda *_: None


def check_writable(flag: str, path: Path) -> None:
    """Raise InputError if the file `path` of `flag` cannot be written."""
    if not path.parent.is_dir():
        raise InputError(f"{flag} {path}: no such folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # files are written beside, then renamed
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written: {error.strerror}") from None


def memory_limit(gib: float) -> int:
    """The bytes of --memory-limit. Raises InputError."""
    if not 0 < gib < MOST_GIB:
        raise InputError(f"--memory-limit is {gib:g}: expected a positive number of GiB")
    return int(gib * 2**30)


def template_config(text: str | None) -> dict[str, Any] | None:
    """What --chat-template-config says. Raises InputError."""
    if text is None:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"--chat-template-config is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError("--chat-template-config: expected a JSON object")
    return config


def warn_unencrypted(prog: str, address: str, insecure: bool) -> None:
    """Warn on standard error when `insecure` links go beyond this machine, from `address`."""
    if insecure and not is_loopback(address):
        print(
            f"{prog}: warning: listening on {address}; links are not encrypted, "
            "use a network that you trust",
            file=sys.stderr,
        )
