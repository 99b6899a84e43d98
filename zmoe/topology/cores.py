"""The cores that this process may compute on, and how local nodes share them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from zmoe.errors import InputError
from zmoe.topology.cgroups import ROOT, cpu_limit

_CPUS = "sys/devices/system/cpu"
_LITTLE = 0.5  # a core of less than this part of the largest one's capacity is an efficiency core
_MOST_CPUS = 1 << 16  # beyond any machine's: a list of more is a mistake


@dataclass(frozen=True)
class Core:
    """A physical core: the logical CPU that computes for it, and its NUMA node."""

    cpu: int
    numa: int


# ---- this process ------------------------------------------------------------------


def usable_cores() -> list[int]:
    """Return the logical CPUs to compute on, ordered by NUMA node.

    There is one per physical core that this process may use, without efficiency cores, and no
    more of them than the CPU quota pays for.
    """
    return [core.cpu for core in _own_cores()]


def pool_cores() -> list[int] | int:
    """Return the usable cores for the threads of one process to be pinned to.

    Under a quota the result is only their number: other containers of the machine, which are
    invisible from here, would choose the same cores.
    """
    cores = usable_cores()
    return len(cores) if len(cores) < len(_physical_cores()) else cores


def divide_cores(nodes: int) -> list[list[int]] | None:
    """Return the usable cores of each of `nodes` local nodes; None if the system cannot pin."""
    return deal(_own_cores(), nodes) if hasattr(os, "sched_getaffinity") else None


def set_affinity(cores: Iterable[int]) -> None:
    """Keep all threads of this process on `cores` (Linux)."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), cores)


def _own_cores() -> list[Core]:
    cores, limit = _physical_cores(), cpu_limit()
    # Rounded down: what spins beyond its quota stands still for most of a period.
    return cores if limit is None else cores[: max(1, int(limit))]


def _physical_cores() -> list[Core]:
    if hasattr(os, "sched_getaffinity"):
        return physical_cores(os.sched_getaffinity(0))
    count = performance_cores(_sysctl) if sys.platform == "darwin" else None
    return [Core(cpu, 0) for cpu in range(count or os.cpu_count() or 1)]


# ---- Linux ---------------------------------------------------------------------------


def physical_cores(allowed: Collection[int], root: Path = ROOT) -> list[Core]:
    """Return the physical cores of the `allowed` logical CPUs, ordered by NUMA node and number.

    Efficiency cores are left out, unless there are no others. If the system does not say which
    logical CPUs share a core, or on which NUMA node it lies, the result assumes one CPU per
    core and one NUMA node.
    """
    numa = numa_nodes(root)
    chosen, taken = [], set()
    for cpu in sorted(_performance_cpus(allowed, root)):
        if cpu not in taken:
            chosen.append(Core(cpu, numa.get(cpu, 0)))
            taken |= _cpus_in(root / _CPUS / f"cpu{cpu}/topology/thread_siblings_list")
    return sorted(chosen, key=lambda core: core.numa)


def numa_nodes(root: Path = ROOT) -> dict[int, int]:
    """Return the NUMA node of every logical CPU; empty if the system does not say."""
    return {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (root / "sys/devices/system/node").glob("node[0-9]*")
        for cpu in _cpus_in(folder / "cpulist")
    }


def _performance_cpus(allowed: Collection[int], root: Path) -> Collection[int]:
    """Return the performance CPUs: on hybrid x86 from the kernel's list, on Arm by capacity."""
    if fast := _cpus_in(root / "sys/devices/cpu_core/cpus") & set(allowed):
        return fast
    capacity = {cpu: _capacity(cpu, root) for cpu in allowed}
    largest = max(capacity.values(), default=0)
    return [cpu for cpu in allowed if capacity[cpu] >= _LITTLE * largest]


def _capacity(cpu: int, root: Path) -> int:
    try:
        return int((root / _CPUS / f"cpu{cpu}/cpu_capacity").read_text())
    except (OSError, ValueError):
        return 0


def _cpus_in(path: Path) -> set[int]:
    """Return the CPUs that a system file lists; none if there is no such file."""
    try:
        return set(parse_cpus(path.read_text()))
    except (OSError, InputError):
        return set()


def parse_cpus(text: str) -> list[int]:
    """Return the numbers of a list such as "0-3,8". Raises InputError."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        numbers = [first, last] if dash else [first]
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            raise InputError(f"{part!r} is no CPU, nor a range such as 0-3")
        begin, end = int(numbers[0]), int(numbers[-1])
        if not begin <= end < _MOST_CPUS:
            raise InputError(f"{part!r} is no range of CPUs below {_MOST_CPUS}")
        cpus += range(begin, end + 1)
    return cpus


# ---- macOS ---------------------------------------------------------------------------


def performance_cores(sysctl: Callable[[str], int | None]) -> int | None:
    """Return the number of performance cores, or of physical cores if all are alike."""
    return sysctl("hw.perflevel0.physicalcpu") or sysctl("hw.physicalcpu")


def _sysctl(name: str) -> int | None:
    value = ctypes.c_int()
    size = ctypes.c_size_t(ctypes.sizeof(value))
    by_name = ctypes.CDLL(None).sysctlbyname
    status = by_name(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value if status == 0 else None


# ---- local nodes -----------------------------------------------------------------------


def deal(cores: Sequence[Core], nodes: int) -> list[list[int]]:
    """Return the CPUs of each of `nodes` nodes of one machine, the largest share first.

    The cores of a node lie on one NUMA node or, with fewer nodes than NUMA nodes, on several
    consecutive whole ones. The nodes of one NUMA node get equally many cores. With fewer cores
    than nodes, several nodes share one core.
    """
    groups = _by_numa(cores)
    while len(groups) > nodes:  # put the two smallest neighbours together
        sizes = [len(a) + len(b) for a, b in pairwise(groups)]
        at = sizes.index(min(sizes))
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    counts = [0] * len(groups)
    for _ in range(nodes):  # the next node goes where it gets most
        gains = [(len(group) / (count + 1), -count) for group, count in zip(groups, counts)]
        counts[gains.index(max(gains))] += 1
    shares = [part for group, count in zip(groups, counts) for part in _split(group, count)]
    return sorted(shares, key=len, reverse=True)


def _by_numa(cores: Iterable[Core]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for core in cores:
        groups.setdefault(core.numa, []).append(core.cpu)
    return list(groups.values())


def _split(cpus: Sequence[int], parts: int) -> list[list[int]]:
    """Split `cpus` into `parts` of equal size."""
    each = max(1, len(cpus) // max(1, parts))
    starts = [part * each % len(cpus) for part in range(parts)]
    return [list(cpus[start : start + each]) for start in starts]
