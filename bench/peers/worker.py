"""The worker's side of bench/exchange.py, and the protocol that it shares with csrc/worker.h.

A worker connects to the parent's Unix socket and speaks in lines:

    worker  hello RANK ADDRESS            ADDRESS: what its peers need to reach it
    parent  peers ADDRESS...              of all ranks, in order
    worker  ready
    parent  run BYTES ITERATIONS WARMUP   any number of times
    worker  done NANOSECONDS...           one figure for each iteration
    parent  quit                          or just the end of the file

`BYTES` is the payload of one rank: float32, every element RANK + 1, so that the
sum is known.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

RUN_DEADLINE_S = 120  # a run that takes longer has lost a peer: SIGALRM ends it


class Worker:
    """The link to the parent; `argv` begins with CONTROL RANK NODES."""

    def __init__(self) -> None:
        signal.alarm(RUN_DEADLINE_S)
        path, rank, nodes = sys.argv[1:4]
        self.rank, self.nodes = int(rank), int(nodes)
        self.peers = [peer for peer in range(self.nodes) if peer != self.rank]
        link = socket.socket(socket.AF_UNIX)
        link.connect(path)
        self._link = link.makefile("rw", encoding="ascii")
        self._running = False
        threading.Thread(target=self._end_with_parent, args=(link,), daemon=True).start()
        self.tolerance = 0.0  # of a sum, relative

    def _end_with_parent(self, link: socket.socket) -> None:
        """End a run whose parent is gone: a rank may wait there for one that has ended."""
        poller = select.poll()
        poller.register(link, 0)  # a hang-up is always reported
        poller.poll()
        if self._running:
            os._exit(1)

    def meet(self, address: str) -> list[str]:
        """Tell the others `address`; returns the addresses of all ranks."""
        print("hello", self.rank, address, file=self._link, flush=True)
        words = self._link.readline().split()
        if len(words) != 1 + self.nodes:
            os._exit(1)  # the parent is gone
        return words[1:]

    def serve(self, run: Callable[[int, int, int], list[int]]) -> NoReturn:
        """Obey the parent: `run(bytes, iterations, warmup)` returns the times in ns.

        Ends the process without the interpreter's tidying up: libraries may
        wait there for peers that have gone.
        """
        try:
            print("ready", file=self._link, flush=True)
            self._obey(run)
        except OSError:
            os._exit(1)  # the parent is gone
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    def _obey(self, run: Callable[[int, int, int], list[int]]) -> None:
        while True:
            signal.alarm(0)
            words = self._link.readline().split()
            if words[:1] != ["run"]:
                return
            signal.alarm(RUN_DEADLINE_S)
            size, iterations, warmup = map(int, words[1:])
            self._running = True
            times = run(size, iterations, warmup)
            self._running = False
            print("done", *times, file=self._link, flush=True)

    def payload(self, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What this rank gives: `size` bytes."""
        return np.full(size // 4, self.rank + 1, dtype=np.float32)

    def check(self, total: Any) -> None:
        """Raise RuntimeError unless `total` (an array) is the sum over all ranks."""
        expected = self.nodes * (self.nodes + 1) / 2
        if not (np.abs(np.asarray(total) - expected) <= self.tolerance * expected).all():
            raise RuntimeError(f"rank {self.rank} got a wrong sum")


def timed(
    worker: Worker, make_step: Callable[[int], Callable[[], Any]]
) -> Callable[[int, int, int], list[int]]:
    """A `run` for Worker.serve: times each call of `make_step(bytes)`'s step.

    A step does one all-reduce and returns the sum, which is checked after the
    last one.
    """

    def run(size: int, iterations: int, warmup: int) -> list[int]:
        step, clock = make_step(size), time.perf_counter_ns
        samples = [0] * iterations
        total: Any = None
        for _ in range(warmup):
            step()
        for i in range(iterations):
            begun = clock()
            total = step()
            samples[i] = clock() - begun
        worker.check(total)
        return samples

    return run
