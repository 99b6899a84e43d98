"""How often each expert was chosen, as a JSON file; docs/placement.md has the format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zmoe.errors import InputError
from zmoe.json_files import read_json, write_json
from zmoe.placement.types import ModelInfo

VERSION = 1
_FIELDS = {"zmoe_usage", "fingerprint", "counts"}
_MOST = 1 << 62
_REPEATED = 2  # the most steps that a recovery repeats
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Usage:
    """`counts[m][expert]`: selections in the m-th MoE layer of the model of `fingerprint`."""

    fingerprint: str
    counts: tuple[tuple[int, ...], ...]

    def __add__(self, other: Usage) -> Usage:
        """Both runs' selections, of the same model."""
        assert self.fingerprint == other.fingerprint
        layers = zip(self.counts, other.counts, strict=True)
        sums = (tuple(map(sum, zip(mine, theirs, strict=True))) for mine, theirs in layers)
        return Usage(self.fingerprint, tuple(sums))


class UsageRecorder:
    """Counts what is selected in a run; see zmoe.obs.Recorder."""

    def __init__(self, info: ModelInfo) -> None:
        self._fingerprint = info.fingerprint
        self._counts = np.zeros((len(info.moe_layers), info.experts), np.int64)  # of this step
        self._total = np.zeros_like(self._counts)
        self._recent: dict[int, npt.NDArray[np.int64]] = {}  # of steps that may yet be repeated
        self._taken = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Count what is selected in this step, unless it raises.

        Where a step is run again, what was counted of it and of those behind it is forgotten.
        """
        self._counts = np.zeros_like(self._total)
        yield
        for other in [other for other in self._recent if other >= number]:
            del self._recent[other]
        if number > self._taken:
            self._recent[number] = self._counts
        while len(self._recent) > _REPEATED:
            self._total += self._recent.pop(min(self._recent))
        self._last = number

    def __call__(self, layer: int, ids: Ints, assigned: Ints, executed: Ints) -> None:
        real = ids[(ids >= 0) & (ids < self._counts.shape[1])]  # some routers have null experts
        self._counts[layer] += np.bincount(real, minlength=self._counts.shape[1])

    def take(self) -> Usage:
        """What was selected since the last call."""
        found = sum(self._recent.values(), start=self._total)
        self._total, self._recent = np.zeros_like(self._total), {}
        self._taken = self._last
        return Usage(self._fingerprint, tuple(map(tuple, found.tolist())))


def read_usage(path: Path, info: ModelInfo) -> Usage:
    """The profile in the file `path`. Raises InputError naming the file when it is none,
    or that of another model than `info`.
    """
    record = read_json(path, f"usage profile {path}")
    if not isinstance(record, dict) or record.get("zmoe_usage") != VERSION:
        raise InputError(f'{path} is no usage profile: expected {{"zmoe_usage": {VERSION}, ...}}')
    if record.keys() != _FIELDS:
        odd = sorted(record.keys() ^ _FIELDS)[0]
        what = "missing" if odd in _FIELDS else "unknown"
        raise InputError(f"usage profile {path}: field {odd} is {what}")
    if record["fingerprint"] != info.fingerprint:
        raise InputError(
            f"usage profile {path} is of another model than {info.path}: "
            f"fingerprint {str(record['fingerprint'])[:40]}, not {info.fingerprint}"
        )
    counts = record["counts"]
    if not _fits(counts, info):
        raise InputError(
            f"usage profile {path}: field counts: expected {len(info.moe_layers)} lists of "
            f"{info.experts} whole numbers"
        )
    return Usage(info.fingerprint, tuple(map(tuple, counts)))


def _fits(counts: Any, info: ModelInfo) -> bool:
    return (
        isinstance(counts, list)
        and len(counts) == len(info.moe_layers)
        and all(isinstance(layer, list) and len(layer) == info.experts for layer in counts)
        and all(type(n) is int and 0 <= n < _MOST for layer in counts for n in layer)
    )


def check_usage_file(path: Path, info: ModelInfo) -> None:
    """Raise InputError where what a run of `info` selects could not be added to the file `path`."""
    if path.exists():
        read_usage(path, info)
    elif not path.parent.is_dir():
        raise InputError(f"usage profile {path} cannot be written: no such folder {path.parent}")


def add_usage(path: Path, usage: Usage, info: ModelInfo) -> None:
    """Add to the profile in the file `path`, or begin it; whole or not at all.

    Raises InputError naming the file.
    """
    if path.exists():
        usage = read_usage(path, info) + usage
    record = {"zmoe_usage": VERSION, "fingerprint": usage.fingerprint, "counts": usage.counts}
    write_json(path, f"usage profile {path}", record)
