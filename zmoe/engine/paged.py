"""A node's part of a step on paged caches: many sequences, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.batch.plan import BLOCK, PREVIOUS, Plan, Span, blocks_of
from zmoe.errors import ZmoeError

Logits = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint32]


class SteppedReducer(Protocol):
    """A reducer whose frames carry the number of the step."""

    step: int


class Head(Protocol):
    """Of which rows the next pass computes logits (None: the last), and how many each has."""

    rows: npt.NDArray[np.int32] | None
    vocabulary: int


class PagedStep(Protocol):
    """The spans that the attention layers run next."""

    def begin(self, spans: Sequence[tuple[int, int, Blocks]]) -> None:
        """Take (position, rows, the sequence's blocks) of each span."""
        ...


class PagedLayers(Protocol):
    """The paged caches of a model's layers, of `bytes_per_block` for 64 positions in all."""

    step: Any  # a PagedStep

    @property
    def caches(self) -> Sequence[Any]: ...

    @property
    def bytes_per_block(self) -> int: ...

    def allocate(self, blocks: int) -> None: ...

    def copy(self, to: int, source: int) -> None: ...

    def limit(self, max_kv_size: int | None) -> None: ...


@dataclass(frozen=True)
class _Sequence:
    """`blocks` in the order of positions, of which the first `length` positions are filled."""

    blocks: Blocks
    length: int


class PagedEngine:
    """Runs plans on a model whose layers are all in C, in lock-step with the other ranks."""

    def __init__(
        self,
        model: Callable[..., mx.array],
        reducer: SteppedReducer,
        head: Head,
        layers: PagedLayers,
    ) -> None:
        self._model, self._reducer, self._head, self._layers = model, reducer, head, layers
        self._sequences: dict[int, _Sequence] = {}
        self._blocks = 0

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values of 64 positions in all layers."""
        return self._layers.bytes_per_block

    def allocate(self, blocks: int) -> None:
        """Make room for that many blocks; the contents of those there are stay."""
        self._layers.allocate(blocks)
        self._blocks = blocks

    def run(self, plan: Plan) -> Logits:
        """Run a step; returns the logits (wanted rows, vocabulary) in the order of the rows.

        Raises ZmoeError, with nothing changed, for a plan that does not fit what this node
        holds; PeerError and DivergenceError from the exchange. A step that failed there is
        repeated by a plan of the same positions.
        """
        self._sequences = self._checked(plan)
        for copy in plan.copies:
            self._layers.copy(copy.to, copy.source)
        self._layers.step.begin(
            [(s.position, s.rows, self._sequences[s.sequence].blocks) for s in plan.spans]
        )
        ends = np.cumsum([span.rows for span in plan.spans])
        wanted = [np.arange(end - s.logits, end) for s, end in zip(plan.spans, ends)]
        self._head.rows = np.concatenate([np.empty(0, np.int32), *wanted]).astype(np.int32)
        self._reducer.step = plan.step
        if not plan.spans:
            return np.empty((0, self._head.vocabulary), np.float32)
        out = self._model(mx.array([plan.tokens]), cache=self._layers.caches)
        # A lazy array would read buffers of the exchange that the next steps rewrite.
        logits: Logits = np.asarray(out.astype(mx.float32)).reshape(-1, self._head.vocabulary)
        return logits

    def _checked(self, plan: Plan) -> dict[int, _Sequence]:
        """The sequences as `plan` leaves them; raises ZmoeError for what cannot be."""
        _check_tokens(plan, self._head.vocabulary)
        named = [*plan.blocks, *(block for c in plan.copies for block in (c.to, c.source))]
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
        taken, ran = 0, set()
        for span in plan.spans:
            if span.sequence in ran:
                raise ZmoeError(f"a plan runs sequence {span.sequence} twice")
            ran.add(span.sequence)
            held = sequences.get(span.sequence)
            table = np.empty(0, np.uint32) if held is None else held.blocks
            if held is not None and span.position > held.length:
                raise ZmoeError(
                    f"a plan runs sequence {span.sequence} from position {span.position}: "
                    f"this node holds {held.length}"
                )
            lacks = max(0, blocks_of(span.end) - len(table))
            if lacks:
                new = np.array(plan.blocks[taken : taken + lacks], np.uint32)
                table = np.concatenate([table, new])
                taken += lacks
            sequences[span.sequence] = _Sequence(table, span.end)
        if taken != len(plan.blocks):
            raise ZmoeError(f"a plan brings {len(plan.blocks)} blocks: its spans lack {taken}")
        return sequences


def _check_tokens(plan: Plan, vocabulary: int) -> None:
    for span in plan.spans:
        if span.rows < 1 or span.position < 0 or not 0 <= span.logits <= span.rows:
            raise ZmoeError(
                f"a plan runs {span.rows} rows of sequence {span.sequence} from position "
                f"{span.position}, {span.logits} with logits"
            )
    rows = sum(span.rows for span in plan.spans)
    if len(plan.tokens) != rows:
        raise ZmoeError(f"a plan of {rows} rows with {len(plan.tokens)} tokens")
    if PREVIOUS in plan.tokens:
        raise ZmoeError("a plan refers to the last step's sample, which CPU nodes do not hold")
    if rows and not 0 <= min(plan.tokens) <= max(plan.tokens) < vocabulary:
        raise ZmoeError(f"a plan with a token outside of 0 to {vocabulary - 1}")


class OneSequence:
    """Plans of a single sequence, with blocks for as many positions as it has so far.

    With `max_kv_size` its blocks are used again once no row sees them any more; `chunk` is
    the most rows of a step.
    """

    def __init__(self, engine: PagedEngine, max_kv_size: int | None, chunk: int) -> None:
        self._engine = engine
        self._ring = None if max_kv_size is None else blocks_of(max_kv_size + chunk) + 2
        self._position = self._held = self._room = 0
        self._ended = False

    def reset(self) -> None:
        """Start a new sequence with the next step."""
        self._ended = self._held > 0
        self._position = self._held = 0

    def run(self, step: int, tokens: Sequence[int], logits: bool) -> Logits:
        """Append `tokens`; returns the logits (1 or 0, vocabulary) after the last."""
        span = Span(0, self._position, len(tokens), int(logits))
        held = max(self._held, blocks_of(span.end))
        new = [self._block(i) for i in range(self._held, held)]
        if max(new, default=0) >= self._room:
            self._room = max(2 * self._room, max(new) + 1, 4096 // BLOCK)
            self._engine.allocate(self._room)
        plan = Plan(step, (span,), tuple(tokens), tuple(new), (0,) if self._ended else ())
        out = self._engine.run(plan)
        self._position, self._held, self._ended = span.end, held, False
        return out

    def _block(self, index: int) -> int:
        """The number of the sequence's block `index`; the first one is never used again."""
        if self._ring is None or index == 0:
            return index
        return 1 + (index - 1) % self._ring
