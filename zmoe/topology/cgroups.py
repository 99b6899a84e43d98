"""The limits that control groups (version 1 or 2) and all their ancestors set this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")
_VERSION_2 = ""  # the name of its only hierarchy in /proc/self/cgroup


def cpu_limit(root: Path = ROOT) -> float | None:
    """Return the CPU quota of this process in CPUs (2.0 is two CPUs' time), or None."""
    limits = []
    for folder in _folders(root, "cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):  # the other version's, or "max"
                words = " ".join((folder / name).read_text() for name in names).split()
                quota, period = map(int, words)
                if quota > 0 and period > 0:
                    limits.append(quota / period)
    return min(limits, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the memory limit of this process in bytes, or None."""
    limits = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    # Without a limit version 1 has the largest number of pages.
    return min((limit for limit in limits if limit < 1 << 62), default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups of this process under `controller`, and those of
    their ancestors, as far as they are mounted.
    """
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        paths.update(dict.fromkeys(names.split(","), path))
    for line in _lines(root / "proc/self/mountinfo"):
        where, _, what = line.partition(" - ")
        if not what.startswith("cgroup"):
            continue
        mounted, point = where.split()[3:5]
        kind, *_, options = what.split()
        name = _VERSION_2 if kind == "cgroup2" else controller
        if name in paths and (kind == "cgroup2" or name in options.split(",")):
            top = root / point.lstrip("/")
            folder = top / _within(PurePosixPath(paths[name]), mounted)
            yield from (top, *(each for each in (folder, *folder.parents) if top in each.parents))


def _within(path: PurePosixPath, mounted: str) -> PurePosixPath:
    """Return `path` relative to the `mounted` group.

    A container may mount its own group only; `path` then lies outside, and the result is empty.
    """
    if path.is_relative_to(mounted) and ".." not in path.parts:
        return path.relative_to(mounted)
    return PurePosixPath()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
