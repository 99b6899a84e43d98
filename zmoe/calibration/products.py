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

from zmoe.calibration.weights import FORMATS, TOP_K, Weights, write_experts
from zmoe.cluster.launch import divide_cores
from zmoe.compute.team import Team, usable_cores
from zmoe.errors import ZmoeError
from zmoe.planner.measured import ProductRate

FILE_BYTES = 256 << 20  # beyond most caches
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
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zmoe")))
        groups = [stack.enter_context(_group(cores)) for cores in core_sharings()]
        for name in FORMATS:
            progress(f"products of {name}")
            path = folder / name
            count = write_experts(path, name, FILE_BYTES)
            rates += [group.measure(path, name, count) for group in groups]
            path.unlink()
    return tuple(rates)


class _Group:
    """Running processes that measure at once."""

    def __init__(self, threads: int, pipes: Sequence[Connection]) -> None:
        self._threads, self._pipes = threads, pipes

    def measure(self, path: Path, name: str, count: int) -> ProductRate:
        """The mean over the processes, in the median of the rounds."""
        for pipe in self._pipes:
            pipe.send((path, name, count))
        answers: list[list[list[float]]] = []
        for pipe in self._pipes:
            if not pipe.poll(DEADLINE_S):
                raise ZmoeError(f"products of {name} took longer than {DEADLINE_S:g} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise ZmoeError(f"a process that measured products of {name} ended") from None
        nodes = len(answers)
        rates = (
            statistics.median(sum(turn) / nodes for turn in zip(*kind)) for kind in zip(*answers)
        )
        return ProductRate(name, nodes, self._threads, *rates)


@contextmanager
def _group(cores: Sequence[Cores]) -> Iterator[_Group]:
    """A process on each of `cores`, ended afterwards."""
    context = multiprocessing.get_context("spawn")
    barrier, nodes = context.Barrier(len(cores)), len(cores)
    pipes, processes = [], []
    try:
        for rank, own in enumerate(cores):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            given = (own, rank, nodes, barrier, theirs)
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


def _serve(cores: Cores, rank: int, nodes: int, barrier: Any, pipe: Connection) -> None:
    """A process: for each file that it is told, the rates of ProductRate by round."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    team = Team(cores)
    while True:
        try:
            path, name, count = pipe.recv()
        except EOFError:
            return
        weights = Weights(team, path, name, count)
        size = max(TOP_K, count // nodes)  # of its own experts
        own = range(min(rank * size, count - size), count)[:size]
        works = (weights.dense(Random(1)), weights.experts(own, Random(rank)), weights.many)
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
