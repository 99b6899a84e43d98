"""Where pages lie. Tests run on one NUMA node mostly: another that there is none of is far."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.topology.test_cores import machine
from zmoe.topology.cores import numa_nodes
from zmoe.topology.memory import move_near, near_numa_nodes

NONE_SUCH = 63


def test_what_is_near(tmp_path: Path) -> None:
    root = machine(tmp_path, [], [range(4), range(4, 8), range(8, 12)])
    assert near_numa_nodes(root, [1, 2]) == {0}
    assert near_numa_nodes(root, [1, 5]) == {0, 1}
    assert near_numa_nodes(root, [1, 5, 9]) == frozenset()  # all of it: nothing is nearer
    assert near_numa_nodes(root / "none", [1]) == frozenset()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_pages_that_cannot_move_are_counted() -> None:
    size = 20 * mmap.PAGESIZE
    memory = np.ones(size + mmap.PAGESIZE, np.uint8)
    address = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    everywhere = set(numa_nodes().values()) or {0}
    if not move_near([NONE_SUCH], address, size):
        pytest.skip("this system does not say where pages lie")
    assert move_near([NONE_SUCH], address, size) == size
    assert move_near([NONE_SUCH], address + size // 2 + 5, 1) == mmap.PAGESIZE
    assert move_near(everywhere, address, size) == 0
    assert memory.all()
