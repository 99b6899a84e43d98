"""Dataclasses with values in them that they would refuse."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

Record = TypeVar("Record")


def changed(record: Record, changes: Mapping[str, object]) -> Record:
    """A copy with fields changed, unchecked; "inner.field" is a field of a nested dataclass."""
    made = copy.copy(record)
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        object.__setattr__(
            made, name, changed(getattr(made, name), {rest: value}) if rest else value
        )
    return made
