"""A measured machine and link as a JSON file: `zmoe-plan --calibrate` writes it,
`--hardware` and `--link` accept it.

The file is `{"zmoe_profile": 3, "machine": {...}, "link": {...}}`, with the
fields of Machine and Link; `machine.rates` and `machine.steps` are lists of
objects with those of MatmulRate and StepRate. Unknown fields are errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from zmoe.errors import InputError
from zmoe.json_files import read_json, write_json
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.measured import MatmulRate, StepRate

VERSION = 3
_SHARES = {"usable_share", "bandwidth_efficiency", "rate_efficiency", "overlap"}
_MAY_BE_ZERO = {
    "overlap",
    "sync_s",
    "crossing_s",
    "layer_s",
    "step_s",
    "latency_s",
    "per_peer_s",
    "price_usd",
    "expert_s",
}
_LISTS: Mapping[str, type] = {"rates": MatmulRate, "steps": StepRate}

Record = TypeVar("Record")


@dataclass(frozen=True)
class Profile:
    machine: Machine
    link: Link


def write_profile(path: Path, profile: Profile) -> None:
    """Write `profile` whole or not at all. Raises InputError naming the file."""
    record = {"zmoe_profile": VERSION, **asdict(profile)}
    write_json(path, str(path), record, indent=1)


def is_profile(path: Path) -> bool:
    """Whether the file `path` is a profile of any version, of which another may take the place."""
    try:
        record = read_json(path, str(path))
    except InputError:
        return False
    return isinstance(record, dict) and record.keys() == {"zmoe_profile", "machine", "link"}


def read_profile(path: Path) -> Profile:
    """The profile in the file `path`. Raises InputError naming file and field."""
    record = read_json(path, str(path))
    if not isinstance(record, dict):
        raise InputError(f"{path} is not a profile: expected a JSON object")
    _only(path, "", record, {"zmoe_profile", "machine", "link"})
    version = record.get("zmoe_profile")
    if version != VERSION:
        again = ": measure again with zmoe-plan --calibrate" if version in (1, 2) else ""
        raise InputError(
            f"{path}: zmoe_profile is {json.dumps(version)}: expected {VERSION}{again}"
        )
    return Profile(
        _record(path, "machine", record.get("machine"), Machine),
        _record(path, "link", record.get("link"), Link),
    )


def _only(path: Path, part: str, record: Mapping[str, Any], known: set[str]) -> None:
    for name in record:
        if name not in known:
            raise InputError(
                f"{path}: unknown field {part}{name} (known: {', '.join(sorted(known))})"
            )


def _record(path: Path, part: str, record: Any, kind: type[Record]) -> Record:
    if not isinstance(record, dict):
        raise InputError(f"{path}: field {part}: expected an object")
    known = fields(kind)  # type: ignore[arg-type]
    _only(path, f"{part}.", record, {field.name for field in known})
    values: dict[str, Any] = {}
    for field in known:
        where = f"{part}.{field.name}"
        if field.name in _LISTS and field.name in record:
            values[field.name] = _list(path, where, record[field.name], _LISTS[field.name])
        elif field.name in record:
            _check(path, where, field, record[field.name])
            values[field.name] = record[field.name]
        elif field.default is MISSING:
            raise InputError(f"{path}: field {where} is missing")
    return kind(**values)


def _list(path: Path, where: str, listed: Any, kind: type[Record]) -> tuple[Record, ...]:
    if not isinstance(listed, list):
        raise InputError(f"{path}: field {where}: expected a list")
    return tuple(_record(path, f"{where}[{i}]", each, kind) for i, each in enumerate(listed))


def _check(path: Path, where: str, field: Field[Any], value: Any) -> None:
    expected = _expected(field)
    ok: bool
    if field.type == "str":
        ok = isinstance(value, str) and value != ""
    elif field.type == "bool":
        ok = isinstance(value, bool)
    elif value is None:
        ok = "None" in str(field.type)
    else:
        whole = str(field.type).startswith("int")
        ok = type(value) is int or (type(value) is float and not whole and math.isfinite(value))
        ok = ok and (value > 0 or (value == 0 and field.name in _MAY_BE_ZERO))
        ok = ok and (value <= 1 or field.name not in _SHARES)
    if not ok:
        raise InputError(f"{path}: field {where} is {json.dumps(value)}: expected {expected}")


def _expected(field: Field[Any]) -> str:
    if field.type in ("str", "bool"):
        return {"str": "a text", "bool": "true or false"}[str(field.type)]
    number = "a whole number" if str(field.type).startswith("int") else "a number"
    least = "of at least 0" if field.name in _MAY_BE_ZERO else "above 0"
    most = ", at most 1" if field.name in _SHARES else ""
    null = " or null" if "None" in str(field.type) else ""
    return f"{number} {least}{most}{null}"
