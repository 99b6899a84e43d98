"""Which cores are taken on machines that are folders of made-up system files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from zmoe.errors import InputError
from zmoe.kernels.threads import ThreadPool
from zmoe.native import lib
from zmoe.topology import cores
from zmoe.topology.cores import (
    Core,
    deal,
    divide_cores,
    parse_cpus,
    performance_cores,
    physical_cores,
    pool_cores,
    usable_cores,
)


def write(root: Path, files: Mapping[str, object]) -> None:
    for name, text in files.items():
        path = root / "sys/devices" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def listed(cpus: Iterable[int]) -> str:
    return ",".join(map(str, cpus))


def machine(
    root: Path, siblings: Sequence[Sequence[int]], numa: Sequence[Sequence[int]] = ()
) -> Path:
    """The files of a machine with such physical cores and NUMA nodes."""
    for group in siblings:
        for cpu in group:
            write(root, {f"system/cpu/cpu{cpu}/topology/thread_siblings_list": listed(group)})
    for node, cpus in enumerate(numa):
        write(root, {f"system/node/node{node}/cpulist": listed(cpus)})
    return root


def cpus_of(root: Path, allowed: Iterable[int]) -> list[int]:
    return [core.cpu for core in physical_cores(set(allowed), root)]


# ---- physical cores -----------------------------------------------------------------


def test_one_socket_without_threads(tmp_path: Path) -> None:
    root = machine(tmp_path, [[cpu] for cpu in range(4)], [range(4)])
    assert cpus_of(root, range(4)) == [0, 1, 2, 3]


def test_siblings_beyond_all_cores(tmp_path: Path) -> None:
    """CPU i shares its core with i + n: dealt in order, two nodes would share every core."""
    root = machine(tmp_path, [(cpu, cpu + 4) for cpu in range(4)], [range(8)])
    assert cpus_of(root, range(8)) == [0, 1, 2, 3]
    assert deal(physical_cores(range(8), root), 2) == [[0, 1], [2, 3]]


def test_siblings_beside_each_other(tmp_path: Path) -> None:
    root = machine(tmp_path, [(cpu, cpu + 1) for cpu in range(0, 8, 2)], [range(8)])
    assert cpus_of(root, range(8)) == [0, 2, 4, 6]
    assert deal(physical_cores(range(8), root), 2) == [[0, 2], [4, 6]]


def test_two_sockets_numbered_in_turn(tmp_path: Path) -> None:
    root = machine(
        tmp_path, [(cpu, cpu + 8) for cpu in range(8)], [range(0, 16, 2), range(1, 16, 2)]
    )
    found = physical_cores(range(16), root)
    assert found == [Core(cpu, cpu % 2) for cpu in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert deal(found, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_mask_narrower_than_the_machine(tmp_path: Path) -> None:
    """Of a core whose first CPU is not allowed, the second computes."""
    root = machine(tmp_path, [(cpu, cpu + 4) for cpu in range(4)], [(0, 1, 4, 5), (2, 3, 6, 7)])
    assert cpus_of(root, [1, 3, 4, 5]) == [1, 4, 3]


def test_offline_cpus(tmp_path: Path) -> None:
    """They are in no list, have no topology, and cannot be allowed."""
    root = machine(tmp_path, [[0], (2, 6), (3, 7)], [(0, 2), (3, 6, 7)])
    (tmp_path / "sys/devices/system/cpu/cpu1").mkdir()
    assert cpus_of(root, [0, 2, 3, 6, 7]) == [0, 2, 3]


@pytest.mark.parametrize("numa", [(), [range(12), ()]], ids=["no NUMA", "a node of memory alone"])
def test_hybrid_x86(tmp_path: Path, numa: Sequence[Sequence[int]]) -> None:
    siblings = [(0, 1), (2, 3), *([cpu] for cpu in range(4, 12))]
    root = machine(tmp_path, siblings, numa)
    write(root, {"cpu_core/cpus": "0-3", "cpu_atom/cpus": "4-11"})
    assert cpus_of(root, range(12)) == [0, 2]
    assert cpus_of(root, [3, 4, 5]) == [3]
    assert cpus_of(root, [4, 5, 9]) == [4, 5, 9]  # as its user wants it


def test_big_little(tmp_path: Path) -> None:
    """Four little cores, three large ones and one larger still."""
    root = machine(tmp_path, [[cpu] for cpu in range(8)])
    for cpu, capacity in enumerate([325] * 4 + [870] * 3 + [1024]):
        write(root, {f"system/cpu/cpu{cpu}/cpu_capacity": capacity})
    assert cpus_of(root, range(8)) == [4, 5, 6, 7]
    assert cpus_of(root, [1, 2]) == [1, 2]


def test_a_container_without_topology(tmp_path: Path) -> None:
    assert physical_cores({3, 1, 2}, tmp_path) == [Core(1, 0), Core(2, 0), Core(3, 0)]


def test_macs() -> None:
    assert performance_cores({"hw.perflevel0.physicalcpu": 8, "hw.physicalcpu": 12}.get) == 8
    assert performance_cores({"hw.physicalcpu": 6}.get) == 6
    assert performance_cores({}.get) is None


# ---- shares of local nodes -----------------------------------------------------------


def sockets(*sizes: int) -> list[Core]:
    found = [Core(0, numa) for numa, size in enumerate(sizes) for _ in range(size)]
    return [Core(cpu, core.numa) for cpu, core in enumerate(found)]


@pytest.mark.parametrize(
    ("sizes", "nodes", "wanted"),
    [
        ((8,), 3, [2, 2, 2]),
        ((8, 8), 1, [16]),
        ((8, 8), 2, [8, 8]),
        ((8, 8), 3, [8, 4, 4]),
        ((8, 8), 4, [4, 4, 4, 4]),
        ((16,) * 4, 2, [32, 32]),  # a socket in four parts (NPS4)
        ((16,) * 8, 2, [64, 64]),
        ((16,) * 4, 3, [32, 16, 16]),
        ((8, 1), 2, [4, 4]),  # a single core would hold the other up
        ((8, 8, 1), 2, [9, 8]),
        ((2,), 5, [1] * 5),
    ],
    ids=str,
)
def test_shares(sizes: tuple[int, ...], nodes: int, wanted: list[int]) -> None:
    given = sockets(*sizes)
    shares = deal(given, nodes)
    assert [len(share) for share in shares] == wanted
    every = [cpu for share in shares for cpu in share]
    assert len(set(every)) == len(every) or nodes > len(given)
    if nodes >= len(sizes):  # none is of two sockets
        assert all(len({given[cpu].numa for cpu in share}) == 1 for share in shares)


def test_few_cores_are_shared_in_turn() -> None:
    assert deal([Core(4, 0), Core(6, 0)], 5) == [[4], [6], [4], [6], [4]]


# ---- this process ----------------------------------------------------------------------


@pytest.fixture
def sixty_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "physical_cores", lambda allowed: sockets(32, 32))
    monkeypatch.setattr(cores, "cpu_limit", lambda: None)


@pytest.mark.usefixtures("sixty_four")
def test_without_a_quota() -> None:
    assert usable_cores() == pool_cores() == list(range(64))
    assert divide_cores(2) == [list(range(32)), list(range(32, 64))]


@pytest.mark.usefixtures("sixty_four")
@pytest.mark.parametrize(("limit", "threads"), [(2.0, 2), (3.9, 3), (0.5, 1)])
def test_a_quota(limit: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `docker --cpus=2`: threads stay nowhere, since other containers' would stay there."""
    monkeypatch.setattr(cores, "cpu_limit", lambda: limit)
    assert usable_cores() == list(range(threads))
    assert pool_cores() == threads
    assert divide_cores(threads) == [[cpu] for cpu in range(threads)]


def test_more_cores_than_a_team_has_threads() -> None:
    most = lib.ZMOE_MAX_THREADS
    for wanted in (most + 100, list(range(most + 100))):
        pool = ThreadPool(wanted)
        assert pool.threads == most
        pool.close()


# ---- lists -----------------------------------------------------------------------------


def test_lists() -> None:
    assert parse_cpus("0-2,8,10-10\n") == [0, 1, 2, 8, 10]
    for text in ("", "a", "1,", "1-", "-1", "2-1", "0x1", "1-2-3", "0-99999999999", "²"):
        with pytest.raises(InputError, match="CPU"):
            parse_cpus(text)
