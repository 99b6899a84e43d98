"""Several ranks in one process, each in its own thread: for tests of one layer or model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from zmoe.moe.ownership import Ownership
from zmoe.types import Placement, nothing

T = TypeVar("T")
DEADLINE_S = 60.0


class Meeting:
    """Where the ranks' partial sums meet: a barrier and a place for each rank."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.barrier = threading.Barrier(nodes, timeout=DEADLINE_S)
        self.parts: list[np.ndarray | None] = [None] * nodes
        self.keys: list[object] = [None] * nodes


class Call(NamedTuple):
    """One all-reduce as its caller asked for it."""

    layer: int
    shape: tuple[int, int]
    contributed: bool


class ThreadReducer:
    """A Reducer among threads, as strict as the contract allows.

    Results live in two buffers by turns, and the one that may no longer be
    used is overwritten with NaN, so that whoever holds a result too long, or
    evaluates too late, is found out.
    """

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.nodes, self._meeting = rank, meeting.nodes, meeting
        self._results: list[mx.array | None] = [None, None]
        self._turn = 0
        self.step = 0
        self.calls: list[Call] = []

    def all_reduce(
        self,
        layer: int,
        partial: mx.array | None,
        shape: tuple[int, int],
        dtype: mx.Dtype,
        digest: int,
        overlap: Callable[[], None] = nothing,
    ) -> mx.array:
        meeting = self._meeting
        if partial is not None:
            assert partial.shape == shape and partial.dtype == dtype
        self.calls.append(Call(layer, shape, partial is not None))
        overlap()
        part = None if partial is None else np.array(partial.astype(mx.float32))
        meeting.parts[self.rank] = part
        meeting.keys[self.rank] = (layer, shape, digest)
        meeting.barrier.wait()
        assert len(set(meeting.keys)) == 1, meeting.keys
        total = sum((p for p in meeting.parts if p is not None), np.zeros(shape, np.float32))
        meeting.barrier.wait()
        return self._lend(total, dtype)

    def all_reduce_host(
        self,
        layer: int,
        partial: np.ndarray | None,
        out: np.ndarray,
        dtype: mx.Dtype,
        digest: int,
        overlap: Callable[[], None] = nothing,
    ) -> None:
        part = None if partial is None else mx.array(partial).astype(dtype)
        total = self.all_reduce(layer, part, out.shape, dtype, digest, overlap)
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
        finally:
            mx.clear_streams()  # or MLX may abort the process when it exits

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
        assert not thread.is_alive()
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
