"""JSON files: read with one-line errors, and written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zmoe.errors import InputError


def read_json(
    path: Path, name: str, error: type[InputError] = InputError, *, absent: str = ""
) -> Any:
    """Return the parsed contents of the file `path`.

    Raises `error` with a message that begins with `name`, or with the message `absent`, if one
    is given, where there is no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        if absent and isinstance(cause, FileNotFoundError):
            raise error(absent) from None
        raise error(f"{name} cannot be read: {cause.strerror}") from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{name} is not JSON: {cause}") from None


def write_json(path: Path, name: str, value: Any, indent: int | None = None) -> None:
    """Write `value` to the file `path`, which has its old contents until the new ones are whole.

    Raises InputError with a message that begins with `name`, and then leaves nothing behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as cause:
        raise InputError(f"{name} cannot be written: {cause.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
