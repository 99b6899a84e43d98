"""A node's part of a step on paged caches: many sequences, each as if it were alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from zmoe.batch.plan import Plan, blocks_of
from zmoe.engine.base import Floats, SteppedReducer
from zmoe.errors import ZmoeError

Blocks = npt.NDArray[np.uint32]
State = npt.NDArray[np.uint8]
MOST_REPEATED = 2  # steps, after the loss of a node
_NO_BLOCKS = np.empty(0, np.uint32)


class PagedStep(Protocol):
    """The spans that the layers run next."""

    def begin(self, spans: Sequence[tuple[int, int, Blocks, State | None, State | None]]) -> None:
        """Take (position, rows, the sequence's blocks, its state before and after) of each span."""
        ...


class PagedModel(Protocol):
    """A model with paged caches, of `bytes_per_block` for 64 positions in all layers.

    Its recurrent layers, if it has any, keep `state_bytes` of each sequence.
    """

    state_bytes: int

    @property
    def step(self) -> PagedStep: ...

    @property
    def caches(self) -> Mapping[int, Any]: ...

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
    """`blocks` in the order of positions, of which the first `length` positions are filled.

    `state` is what recurrent layers keep of these positions. It is never written to again: each
    step takes other memory for the states after it, so that earlier ones can be gone back to.
    `began` is the length and the state with which its last step began.
    """

    blocks: Blocks
    length: int
    state: State | None = None
    began: tuple[int, State | None] = (0, None)


class PagedEngine:
    """Runs plans on a model whose layers are all in C, in lock-step with the other ranks."""

    paged, can_batch, plans_ahead = True, True, False

    def __init__(self, model: PagedModel, reducer: SteppedReducer) -> None:
        self._model, self._reducer = model, reducer
        self._sequences: dict[int, _Sequence] = {}
        # Of the last steps begun: the number of each, and the sequences before it.
        self._before: deque[tuple[int, dict[int, _Sequence]]] = deque(maxlen=MOST_REPEATED)
        self._blocks = 0
        self._states: list[State] = []  # all memory for them
        self.state_bytes = model.state_bytes
        self.can_trim = not model.state_bytes

    @property
    def block_bytes(self) -> int:
        """See Engine."""
        return self._model.bytes_per_block

    @property
    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """Keys and values of all layers, by block."""
        return {
            f"layers.{layer}.{name}": part
            for layer, cache in self._model.caches.items()
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
        states = self._take_states(len(plan.spans)) if self.state_bytes else ()
        for copy in plan.copies:
            self._model.copy(copy.to, copy.source)
        spans = []
        for span, after in zip_longest(plan.spans, states):
            held = sequences[span.sequence]
            spans.append((span.position, span.rows, held.blocks, held.began[1], after))
            sequences[span.sequence] = held._replace(state=after)
        self._model.step.begin(spans)
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

    # ---- recurrent states --------------------------------------------------------------

    def state_of(self, sequence: int) -> State | None:
        """What recurrent layers keep of a sequence that this node holds; None for other models."""
        return self._sequences[sequence].state

    def hold(self, sequence: int, state: State, length: int) -> None:
        """Have a sequence of `length` positions that others may begin with.

        Raises ZmoeError for a number that another sequence has.
        """
        if sequence in self._sequences:
            raise ZmoeError(f"a state as sequence {sequence}, which this node holds already")
        self._states.append(state)
        for sequences in (self._sequences, *(before for _, before in self._before)):
            sequences[sequence] = _Sequence(_NO_BLOCKS, length, state)

    def _take_states(self, count: int) -> list[State]:
        """Memory for `count` states, which is that of no sequence, now or before the last steps."""
        known = [self._sequences, *(sequences for _, sequences in self._before)]
        used = {
            id(state)
            for sequences in known
            for held in sequences.values()
            for state in (held.state, held.began[1])
        }
        spare = [state for state in self._states if id(state) not in used]
        new = [np.empty(self.state_bytes, np.uint8) for _ in range(count - len(spare))]
        self._states += new
        return [*spare, *new][:count]

    def _state_at(
        self, number: int, position: int, sequences: Mapping[int, _Sequence]
    ) -> State | None:
        """The state of a sequence of `sequences` after its first `position` positions: where it
        ends, or where its last step began. Raises ZmoeError for any other.
        """
        if not (self.state_bytes and position):
            return None
        held = sequences.get(number)
        for length, state in () if held is None else ((held.length, held.state), held.began):
            if length == position:
                return state
        raise ZmoeError(
            f"a plan goes on with sequence {number} from position {position}: "
            "this node has no state of it there"
        )

    def _checked(self, plan: Plan) -> dict[int, _Sequence]:
        """The sequences as `plan` leaves them, but for the states after it; raises ZmoeError for
        what cannot be.
        """
        named = [*plan.blocks, *chain(*plan.copies)]
        if named and not 0 <= min(named) <= max(named) < self._blocks:
            raise ZmoeError(f"a plan with a block outside of 0 to {self._blocks - 1}")
        if plan.forks and not self.state_bytes:
            raise ZmoeError(
                f"a plan forks sequence {plan.forks[0].old}: paged caches copy blocks instead"
            )
        sequences = dict(self._sequences)
        for sequence in plan.free:
            if sequences.pop(sequence, None) is None:
                raise ZmoeError(f"a plan ends sequence {sequence}, which this node does not hold")
        for fork in plan.forks:
            if fork.new in sequences:
                raise ZmoeError(f"a plan forks sequence {fork.old} into one that there is already")
            state = self._state_at(fork.old, fork.length, sequences)
            sequences[fork.new] = _Sequence(_NO_BLOCKS, fork.length, state)
        taken = 0
        for number, position, rows, _ in plan.spans:
            held = sequences.get(number)
            table = _NO_BLOCKS if held is None else held.blocks
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
            state = self._state_at(number, position, sequences)
            sequences[number] = _Sequence(table, position + rows, None, (position, state))
        if taken != len(plan.blocks):
            raise ZmoeError(f"a plan brings {len(plan.blocks)} blocks: its spans lack {taken}")
        return sequences
