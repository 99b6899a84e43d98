"""Rates of the kernels' products, by format, and by how many processes compute at once.

The processes map one file, as nodes of one machine map a checkpoint: they read
the same dense weights at the same time, and experts of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from zmoe.calibration.weights import FORMATS, LARGE, SMALL, Weights, expert_bytes, write_weights
from zmoe.cluster.launch import divide_cores
from zmoe.compute.team import Team, usable_cores
from zmoe.errors import ZmoeError
from zmoe.planner.measured import ProductRate

FILE_BYTES = 1 << 30  # beyond caches, also those of page tables
TURN_S, ROUNDS = 0.1, 4  # of a figure, whose rounds are spread over all figures of its format
DEADLINE_S = 60.0
MOST_NODES = 4

Progress = Callable[[str], None]
Cores = tuple[int, ...]


def core_sharings(most: int = MOST_NODES) -> list[tuple[Cores, ...]]:
    """The cores of processes that compute at once: as up to `most` nodes share out ours, and
    the first of these alone.
    """
    found: dict[tuple[int, int], tuple[Cores, ...]] = {}
    for nodes in range(1, most + 1):
        dealt = divide_cores(nodes) or [usable_cores()]
        places = tuple(dict.fromkeys(map(tuple, dealt)))  # nodes on one core take turns
        for some in (places[:1], places):
            found.setdefault((len(some), len(some[0])), some)
    return list(found.values())


def measure_products(progress: Progress) -> tuple[ProductRate, ...]:
    """Of every format. Raises ZmoeError when a process of ours fails."""
    rates = []
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zmoe"))) / "weights"
        progress("writing weights")
        write_weights(path, FILE_BYTES)
        groups = [stack.enter_context(_group(cores, path)) for cores in core_sharings()]
        for name in FORMATS:
            progress(f"products of {name}")
            rates += [group.measure(name) for group in groups]
    return tuple(rates)


class _Group:
    """Running processes that measure at once."""

    def __init__(self, threads: int, pipes: Sequence[Connection]) -> None:
        self._threads, self._pipes = threads, pipes

    def measure(self, name: str) -> ProductRate:
        """The mean over the processes, in the median of the rounds."""
        for pipe in self._pipes:
            pipe.send(name)
        answers: list[list[list[float]]] = []
        for pipe in self._pipes:
            if not pipe.poll(DEADLINE_S):
                raise ZmoeError(f"products of {name} took longer than {DEADLINE_S:g} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise ZmoeError(f"a process that measured products of {name} ended") from None
        nodes = len(answers)
        dense, many, large, small = (
            statistics.median(sum(turn) / nodes for turn in zip(*kind)) for kind in zip(*answers)
        )
        of_large, of_small = (expert_bytes(name, shape) for shape in (LARGE, SMALL))
        experts, expert_s = line_of_experts(of_large, of_small, 1 / large, 1 / small)
        return ProductRate(name, nodes, self._threads, dense, experts, expert_s, many)


def line_of_experts(large: int, small: int, large_s: float, small_s: float) -> tuple[float, float]:
    """Bytes a second, and seconds that each expert takes besides, from the bytes and seconds
    of two; where these make no line, the large one's speed.
    """
    if large_s > small_s:
        speed = (large - small) / (large_s - small_s)
        if large_s > large / speed:
            return speed, large_s - large / speed
    return large / large_s, 0.0


@contextmanager
def _group(cores: Sequence[Cores], path: Path) -> Iterator[_Group]:
    """A process on each of `cores`, ended afterwards."""
    context = multiprocessing.get_context("spawn")
    barrier, nodes = context.Barrier(len(cores)), len(cores)
    pipes, processes = [], []
    try:
        for rank, own in enumerate(cores):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            given = (own, (rank, nodes), path, barrier, theirs)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
        yield _Group(len(cores[0]), pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(1.0)
            process.kill()


def _serve(
    cores: Cores, share: tuple[int, int], path: Path, barrier: Any, pipe: Connection
) -> None:
    """A process: for each format that it is told, by round the rates of all kinds of products."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    team = Team(cores)
    weights = Weights(team, path)
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        works = (
            weights.dense(name, Random(1)),  # in the same order everywhere
            weights.many(name),
            *(weights.experts(name, shape, share, Random(share[0])) for shape in (LARGE, SMALL)),
        )
        found: list[list[float]] = [[] for _ in works]
        for _ in range(ROUNDS):
            for rates, work in zip(found, works):
                barrier.wait(DEADLINE_S)
                rates.append(_rate(team, work))
        pipe.send(found)


def _rate(team: Team, work: Callable[[], float]) -> float:
    """Of what `work` does, a second of the kernels' time."""
    before, done = team.products_s, 0.0
    until = time.perf_counter() + TURN_S
    while time.perf_counter() < until:
        done += work()
    return done / (team.products_s - before)
