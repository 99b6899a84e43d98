"""Keeping weights in the memory of the sockets that compute with them (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zmoe.topology.cgroups import ROOT
from zmoe.topology.cores import numa_nodes

_MOVE_PAGES = {"x86_64": 279, "aarch64": 239}  # the system call's number
_MOVE = 2  # MPOL_MF_MOVE: pages that no other process maps

Places = npt.NDArray[np.int32]


def near_numa_nodes(root: Path = ROOT, allowed: Collection[int] | None = None) -> frozenset[int]:
    """Return the NUMA nodes of the `allowed` CPUs, by default those that this process may use.

    The result is empty if these are all NUMA nodes: then no memory is nearer than other memory.
    """
    of_cpu = numa_nodes(root)
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    near = frozenset(of_cpu[cpu] for cpu in allowed if cpu in of_cpu)
    return near if near != set(of_cpu.values()) else frozenset()


def move_near(near: Collection[int], address: int, size: int) -> int:
    """Move the resident pages of [address, address + size) to the NUMA nodes `near`, in turn.

    Returns the number of bytes that still lie elsewhere, because another process maps those
    pages too or because there was no room. Where the system cannot locate pages, it moves
    nothing and returns 0.
    """
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    pages = np.arange(begin, address + size, mmap.PAGESIZE, dtype=np.uintp)
    pages = _far(near, pages)
    if pages.size:
        _move_pages(pages, np.resize(np.array(sorted(near), np.int32), pages.size))
    return _far(near, pages).size * mmap.PAGESIZE


def _far(near: Collection[int], pages: npt.NDArray[np.uintp]) -> npt.NDArray[np.uintp]:
    """Return those of `pages` that lie in the memory of other NUMA nodes."""
    places = _move_pages(pages, None)
    return pages[(places >= 0) & ~np.isin(places, list(near))]


def _move_pages(pages: npt.NDArray[np.uintp], to: Places | None) -> Places:
    """Call move_pages(2): returns the NUMA node of each page, or a negative error number."""
    places = np.full(pages.size, -1, np.int32)
    if (number := _MOVE_PAGES.get(platform.machine())) is not None and pages.size:
        ctypes.CDLL(None).syscall(
            ctypes.c_long(number),
            ctypes.c_long(0),
            ctypes.c_ulong(pages.size),
            ctypes.c_void_p(pages.ctypes.data),
            ctypes.c_void_p(None if to is None else to.ctypes.data),
            ctypes.c_void_p(places.ctypes.data),
            ctypes.c_long(_MOVE),
        )
    return places
