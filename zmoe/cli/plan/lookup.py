"""Names in tables, and what to say of one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from zmoe.errors import InputError

Entry = TypeVar("Entry")


def look_up(flag: str, name: str, table: Mapping[str, Entry], otherwise: str = "") -> Entry:
    """The entry of `table` called `name`, in any case.

    Raises InputError with close names, all known names, and `otherwise`: what
    else the flag takes.
    """
    found = table.get(name.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.6)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    also = f", or {otherwise}" if otherwise else ""
    raise InputError(f'{flag} "{name}" is unknown{meant} (known: {", ".join(sorted(table))}{also})')
