"""A node's part of a step on paged caches: many sequences, each as if it were alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from zmoe.batch.plan import Plan, blocks_of
from zmoe.engine.base import Floats, SteppedReducer
from zmoe.errors import ZmoeError

Blocks = npt.NDArray[np.uint32]
MOST_REPEATED = 2  # steps, after the loss of a node


class PagedStep(Protocol):
    """The spans that the attention layers run next."""

    def begin(self, spans: Sequence[tuple[int, int, Blocks]]) -> None:
        """Take (position, rows, the sequence's blocks) of each span."""
        ...


class PagedModel(Protocol):
    """A model with paged caches, of `bytes_per_block` for 64 positions in all layers."""

    @property
    def step(self) -> PagedStep: ...

    @property
    def caches(self) -> Sequence[Any]: ...

    @property
    def bytes_per_block(self) -> int: ...

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> Floats | None:
        """The logits (len(rows), vocabulary) after `rows` of the step, whose `tokens` are given."""
        ...

    def allocate(self, blocks: int) -> None: ...

    def copy(self, to: int, source: int) -> None: ...

    def limit(self, max_kv_size: int | None) -> None: ...

    def quantize(self, bits: int | None) -> None: ...


class _Sequence(NamedTuple):
    """`blocks` in the order of positions, of which the first `length` positions are filled."""

    blocks: Blocks
    length: int


class PagedEngine:
    """Runs plans on a model whose layers are all in C, in lock-step with the other ranks."""

    paged, can_batch, can_trim, plans_ahead = True, True, True, False

    def __init__(self, model: PagedModel, reducer: SteppedReducer) -> None:
        self._model, self._reducer = model, reducer
        self._sequences: dict[int, _Sequence] = {}
        # Of the last steps begun: the number of each, and the sequences before it.
        self._before: deque[tuple[int, dict[int, _Sequence]]] = deque(maxlen=MOST_REPEATED)
        self._blocks = 0

    @property
    def block_bytes(self) -> int:
        """See Engine."""
        return self._model.bytes_per_block

    @property
    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """Keys and values of all layers, by block."""
        return {
            f"layers.{layer}.{name}": part
            for layer, cache in enumerate(self._model.caches)
            for name, part in cache.memory.items()
        }

    def make_cache(self, blocks: int) -> None:
        """See Engine."""
        self._sequences = {}
        self._model.allocate(blocks)
        self._blocks = blocks

    def run(self, plan: Plan, logits: bool = True) -> Floats | None:
        """See Engine. A step that failed in the exchange is repeated after undo()."""
        sequences = self._checked(plan)
        self._before.append((plan.step, self._sequences))
        self._sequences = sequences
        for copy in plan.copies:
            self._model.copy(copy.to, copy.source)
        self._model.step.begin(
            [(s.position, s.rows, self._sequences[s.sequence].blocks) for s in plan.spans]
        )
        self._reducer.step = plan.step
        if self._reducer.nodes > 1:  # or nobody compares it
            self._reducer.plan = plan.digest
        wanted: list[int] = []
        end = 0
        for span in plan.spans if logits else ():
            end += span.rows
            wanted += range(end - span.logits, end)
        return self._model.forward(plan.tokens, wanted)

    def undo(self, last: int) -> None:
        """Go back to where step `last` ended. What later ones wrote is written over by those that
        come instead. Raises ZmoeError for a step of which too many have begun since.
        """
        while self._before and self._before[-1][0] > last:
            step, self._sequences = self._before.pop()
            if step > last + 1 and not self._before:
                raise ZmoeError(f"step {last} is too long ago to be gone back to")

    def forget(self) -> None:
        """End all sequences; the blocks stay."""
        self._sequences = {}
        self._before.clear()

    def _checked(self, plan: Plan) -> dict[int, _Sequence]:
        """The sequences as `plan` leaves them; raises ZmoeError for what cannot be."""
        named = [*plan.blocks, *chain(*plan.copies)]
        if named and not 0 <= min(named) <= max(named) < self._blocks:
            raise ZmoeError(f"a plan with a block outside of 0 to {self._blocks - 1}")
        if plan.forks:
            raise ZmoeError(
                f"a plan forks sequence {plan.forks[0].old}: paged caches copy blocks instead"
            )
        sequences = dict(self._sequences)
        for sequence in plan.free:
            if sequences.pop(sequence, None) is None:
                raise ZmoeError(f"a plan ends sequence {sequence}, which this node does not hold")
        taken = 0
        for number, position, rows, _ in plan.spans:
            held = sequences.get(number)
            table = np.empty(0, np.uint32) if held is None else held.blocks
            if held is not None and position > held.length:
                raise ZmoeError(
                    f"a plan runs sequence {number} from position {position}: "
                    f"this node holds {held.length}"
                )
            lacks = blocks_of(position + rows) - len(table)
            if lacks > 0:
                new = np.array(plan.blocks[taken : taken + lacks], np.uint32)
                table = np.concatenate([table, new])
                taken += lacks
            sequences[number] = _Sequence(table, position + rows)
        if taken != len(plan.blocks):
            raise ZmoeError(f"a plan brings {len(plan.blocks)} blocks: its spans lack {taken}")
        return sequences
