"""Files of API keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from zmoe.errors import InputError

_LEAST_KEY = 8  # characters


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file: one per line, without empty lines and those that begin with #.

    Raises InputError that names the file, and the line, for a file that others than its owner and
    group can read, too.
    """
    flag = f"--api-key-file {path}"
    try:
        mode, text = stat.S_IMODE(os.stat(path).st_mode), path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{flag} cannot be read: {reason}") from None
    if mode & stat.S_IROTH:
        raise InputError(f"{flag} can be read by everyone: chmod o-r {path}")
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"{flag}, line {number}: expected a key of at least {_LEAST_KEY} ASCII characters "
                "without spaces"
            )
        keys.append(key)
    if not keys:
        raise InputError(f"{flag} holds no key")
    return tuple(keys)
