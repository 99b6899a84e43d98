"""A placement as a JSON file; docs/placement.md has the format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zmoe.errors import PlacementError
from zmoe.json_files import read_json
from zmoe.placement.types import Placement

MOST_NODES = 64
_REQUIRED = ("experts", "nodes", "owned")
_OPTIONAL = ("slices", "speeds")


def read_placement(path: Path, layers: int) -> Placement:
    """The placement in the file `path`, for a model of `layers` MoE layers.

    Its form is checked, not whether it fits the model (check.py). Raises
    PlacementError naming file and field.
    """
    record = read_json(path, f"placement {path}", PlacementError)
    if not isinstance(record, dict):
        raise PlacementError(f"placement {path}: expected a JSON object")
    return _placement(path, record, layers)


def _placement(path: Path, record: Mapping[str, Any], layers: int) -> Placement:
    known = (*_REQUIRED, *_OPTIONAL)
    for name in record:
        if name not in known:
            raise PlacementError(
                f"placement {path}: unknown field {name} (known: {', '.join(known)})"
            )
    for name in _REQUIRED:
        if name not in record:
            raise PlacementError(f"placement {path}: field {name} is missing")
    experts = _number(path, "experts", record["experts"], 1, None)
    nodes = _number(path, "nodes", record["nodes"], 1, MOST_NODES)
    owned = _lists(path, "owned", record["owned"])
    if not any(isinstance(item, list) for ids in owned for item in ids):
        owned = [owned] * layers  # one layer stands for all
    return Placement(
        nodes,
        experts,
        tuple(_layer(path, f"owned[{m}]", layer) for m, layer in enumerate(owned)),
        tuple(
            _pair(path, f"slices[{n}]", pair)
            for n, pair in enumerate(_lists(path, "slices", record.get("slices", [])))
        ),
        _numbers(path, "speeds", record.get("speeds", [])),
    )


def _layer(path: Path, name: str, layer: list[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(sorted(_numbers(path, f"{name}[{node}]", ids))) for node, ids in enumerate(layer)
    )


def _pair(path: Path, name: str, value: list[Any]) -> tuple[int, int]:
    numbers = _numbers(path, name, value)
    if len(numbers) != 2:
        raise PlacementError(f"placement {path}: field {name}: expected [start, end]")
    return numbers[0], numbers[1]


def _lists(path: Path, name: str, value: Any) -> list[list[Any]]:
    if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
        raise PlacementError(f"placement {path}: field {name}: expected a list of lists")
    return value


def _numbers(path: Path, name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise PlacementError(f"placement {path}: field {name}: expected a list of whole numbers")
    return tuple(_number(path, name, number, 0, None) for number in value)


def _number(path: Path, name: str, value: Any, least: int, most: int | None) -> int:
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise PlacementError(
            f"placement {path}: field {name} is {json.dumps(value)[:40]}: "
            f"expected a whole number {limit}"
        )
    return value
