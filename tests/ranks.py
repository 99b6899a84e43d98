"""Several ranks in one process, each in its own thread: for tests of one layer or model."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from zmoe.exchange.base import Call, Partial, nothing
from zmoe.moe.graph import Graph
from zmoe.placement.assignment import Ownership
from zmoe.placement.types import Placement

T = TypeVar("T")
DEADLINE_S = 60.0


class Meeting:
    """Where the ranks' partial sums meet: a barrier and a place for each rank."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.barrier = threading.Barrier(nodes, timeout=DEADLINE_S)
        self.parts: list[np.ndarray | None] = [None] * nodes
        self.keys: list[object] = [None] * nodes


class Seen(NamedTuple):
    """One all-reduce as its caller asked for it."""

    layer: int
    shape: tuple[int, int]
    contributed: bool


def in_halves(partial: Partial[Any], rows: int) -> list[tuple[int, int, Any]]:
    """(start, stop, part) of a partial: of a function in two halves where there are two rows."""
    if not callable(partial):
        return [(0, rows, partial)]
    middle = rows // 2
    bounds = [(0, middle), (middle, rows)] if middle else [(0, rows)]
    return [(start, stop, partial(start, stop)) for start, stop in bounds]


class ThreadReducer:
    """A Reducer among threads, as strict as the contract allows.

    Partials that are functions are asked for in halves. Results live in two
    buffers by turns, and the one that may no longer be used is overwritten with
    NaN, so that whoever holds a result too long, or evaluates too late, is found
    out.
    """

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.nodes, self._meeting = rank, meeting.nodes, meeting
        self._results: list[mx.array | None] = [None, None]
        self._turn = 0
        self.step = self.plan = 0
        self.calls: list[Seen] = []

    def dispatch(self, *given: object) -> None:
        pass

    def sum_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        return dtype

    def takes_whole(self, call: Call) -> bool:
        return call.rows == 1

    def all_reduce(
        self,
        call: Call,
        partial: Partial[mx.array],
        overlap: Callable[[], None] = nothing,
    ) -> mx.array:
        shape = (call.rows, call.width)
        meeting, mine = self._meeting, np.zeros(shape, np.float32)
        parts = in_halves(partial, call.rows)
        for start, stop, part in parts:
            if part is not None:
                assert part.shape == (stop - start, call.width) and part.dtype == call.dtype
                mine[start:stop] = np.array(part.astype(mx.float32))
        contributed = any(part is not None for *_, part in parts)
        self.calls.append(Seen(call.layer, shape, contributed))
        overlap()
        meeting.parts[self.rank] = mine if contributed else None
        meeting.keys[self.rank] = (call.layer, shape, call.digest, self.plan)
        meeting.barrier.wait()
        assert len(set(meeting.keys)) == 1, meeting.keys
        total = sum((p for p in meeting.parts if p is not None), np.zeros(shape, np.float32))
        meeting.barrier.wait()
        return self._lend(total, call.dtype)

    def all_reduce_host(
        self,
        call: Call,
        partial: Partial[np.ndarray],
        out: np.ndarray,
        overlap: Callable[[], None] = nothing,
    ) -> None:
        def encoded(start: int, stop: int) -> mx.array | None:
            part = partial(start, stop) if callable(partial) else partial
            return None if part is None else mx.array(part).astype(call.dtype)

        part = encoded if callable(partial) else encoded(0, len(out))
        total = self.all_reduce(call, part, overlap)
        out[...] = np.array(total.astype(mx.float32))

    def _lend(self, total: np.ndarray, dtype: mx.Dtype) -> mx.array:
        stale = self._results[self._turn]
        if stale is not None:
            memoryview(stale).cast("B")[:] = b"\xff" * stale.nbytes  # NaN in every float
        result = mx.array(total).astype(dtype)
        mx.eval(result)
        self._results[self._turn] = result
        self._turn = 1 - self._turn
        return result


class ThreadGraph(Graph):
    """A graph whose ranks are threads: it evaluates, to meet the others."""

    def __init__(self, reducer: ThreadReducer, dtype: mx.Dtype) -> None:
        groups: Any = None
        super().__init__(groups, 0, 0, dtype)
        self._reducer = reducer

    def sum(self, layer: int, partial: mx.array, ids: mx.array | None = None) -> mx.array:
        assert partial.dtype == self.dtype
        rows = partial.reshape(-1, partial.shape[-1])
        total = self._reducer.all_reduce(Call(layer, *rows.shape, rows.dtype, 0), rows)
        copied = mx.array(np.array(total.astype(mx.float32))).astype(partial.dtype)
        return copied.reshape(partial.shape)


class RankThread:
    """The thread of one rank, kept for all tests.

    MLX starts a thread of its own for each that computes, and never ends it; what walks
    over all of them, as `mx.clear_cache` does, would soon take most of the time.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        mx.clear_streams()  # or MLX may abort the process when it exits

    def _end(self) -> None:
        self._jobs.put(None)
        self._thread.join(1)

    def start(self, job: Callable[[int], None], rank: int) -> threading.Event:
        """Run `job(rank)`; what is returned is set when it is over."""
        over = threading.Event()

        def run() -> None:
            try:
                job(rank)
            finally:
                over.set()

        self._jobs.put(run)
        return over


_threads: list[RankThread] = []


def rank_thread(rank: int) -> RankThread:
    """The thread of `rank`, started when it is first asked for."""
    while len(_threads) <= rank:
        _threads.append(RankThread())
    return _threads[rank]


def on_ranks(nodes: int, work: Callable[[ThreadReducer], T]) -> list[T]:
    """Run `work` once per rank in threads of their own; its results by rank."""
    meeting = Meeting(nodes)
    results: list[T | None] = [None] * nodes
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadReducer(rank, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    ends = [rank_thread(rank).start(run, rank) for rank in range(nodes)]
    if not all([over.wait(2 * DEADLINE_S) for over in ends]):
        _threads.clear()  # the next test gets others
        raise AssertionError(f"a rank of {nodes} has not ended within {2 * DEADLINE_S:g} s")
    if errors:
        first = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        raise (first or errors)[0]
    return [result for result in results if result is not None]


def round_robin(nodes: int, experts: int, layers: int) -> Placement:
    """Expert e of layer m belongs to rank (e + m) % nodes: uneven and different per layer."""
    owned = tuple(
        tuple(tuple(e for e in range(experts) if (e + m) % nodes == r) for r in range(nodes))
        for m in range(layers)
    )
    return Placement(nodes, experts, owned)


def owning(experts: int, owned: Sequence[int]) -> Ownership:
    """A layer of which this node owns `owned` and nobody else anything."""
    return Ownership(Placement(1, experts, ((tuple(owned),),)), 0, 0)
