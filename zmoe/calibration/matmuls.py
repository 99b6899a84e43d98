"""Rates of the kernels' matmuls, by format, and by how many processes compute at once.

The processes map one file, as nodes of one machine map a checkpoint: they read
the same dense weights at the same time, and experts of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from zmoe.calibration.weights import FORMATS, LARGE, SMALL, Weights, expert_bytes, write_weights
from zmoe.errors import ZmoeError
from zmoe.kernels.threads import ThreadPool
from zmoe.perf.measured import MatmulRate
from zmoe.topology.cores import divide_cores, usable_cores

FILE_BYTES = 1 << 30  # beyond caches, also those of page tables
TURN_S = 0.1  # of a figure in a round
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


class Matmuls:
    """Processes that measure matmuls, in rounds between which anything may happen: what
    memory gives changes from minute to minute. A context manager.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is where a file of FILE_BYTES is written."""
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> Matmuls:
        with self._stack as stack:
            path = self._folder / "weights"
            write_weights(path, FILE_BYTES)
            self._groups = [stack.enter_context(_group(cores, path)) for cores in core_sharings()]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def measure(self, formats: Iterable[str] = FORMATS) -> None:
        """A round of these formats. Raises ZmoeError when a process of ours fails."""
        for name in formats:
            for group in self._groups:
                group.measure(name)

    def rates(self, formats: Iterable[str] = FORMATS, rounds: int = 0) -> tuple[MatmulRate, ...]:
        """Of these formats, by the medians of the last `rounds` rounds; 0: of all."""
        return tuple(group.rate(name, rounds) for name in formats for group in self._groups)


class _Group:
    """Running processes that measure at once."""

    def __init__(self, threads: int, pipes: Sequence[Connection]) -> None:
        self._threads, self._pipes = threads, pipes
        self._found: dict[str, list[list[float]]] = {name: [] for name in FORMATS}

    def measure(self, name: str) -> None:
        """One round; the mean over the processes counts."""
        for pipe in self._pipes:
            pipe.send(name)
        answers: list[list[float]] = []
        for pipe in self._pipes:
            if not pipe.poll(DEADLINE_S):
                raise ZmoeError(f"matmuls of {name} took longer than {DEADLINE_S:g} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise ZmoeError(f"a process that measured matmuls of {name} ended") from None
        self._found[name].append([statistics.mean(kind) for kind in zip(*answers)])

    def rate(self, name: str, rounds: int) -> MatmulRate:
        """See Matmuls.rates."""
        found = self._found[name][-rounds:]
        read, dense, many, large, small = map(statistics.median, zip(*found))
        of_large, of_small = (expert_bytes(name, shape) for shape in (LARGE, SMALL))
        experts, expert_s = line_of_experts(of_large, of_small, 1 / large, 1 / small, read)
        nodes = len(self._pipes)
        return MatmulRate(name, nodes, self._threads, dense, experts, expert_s, many)


def line_of_experts(
    large: int, small: int, large_s: float, small_s: float, most: float
) -> tuple[float, float]:
    """Bytes a second, `most` at most, and seconds that each expert takes besides, from the
    bytes and seconds of a large one and a small one.
    """
    speed = min(most, (large - small) / max(large_s - small_s, 1e-12))
    speed = max(speed, large / large_s)
    return speed, max(0.0, large_s - large / speed)  # a rounding below 0 at most


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
            with _without_interrupts():
                process.start()
            processes.append(process)
            theirs.close()
        yield _Group(len(cores[0]), pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started meanwhile; ours comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    cores: Cores, share: tuple[int, int], path: Path, barrier: Any, pipe: Connection
) -> None:
    """A process: for each format that it is told, the rates of all kinds of matmuls."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    pool = ThreadPool(cores)
    weights = Weights(pool, path)
    works: dict[str, list[Callable[[], float]]] = {}
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        if name not in works:
            works[name] = [
                weights.read(share),
                weights.dense(name, Random(1)),  # in the same order everywhere
                weights.many(name),
                *(
                    weights.experts(name, shape, share, Random(share[0]))
                    for shape in (LARGE, SMALL)
                ),
            ]
        rates = []
        for work in works[name]:
            barrier.wait(DEADLINE_S)
            rates.append(_rate(pool, work))
        pipe.send(rates)


def _rate(pool: ThreadPool, work: Callable[[], float]) -> float:
    """Of what `work` does, a second of the kernels' time (of all, where it is no matmul)."""
    before, done, start = pool.matmul_s, 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < TURN_S:
        done += work()
    return done / (pool.matmul_s - before or elapsed)
