"""Steps on mlx-lm's caches: for the families and devices whose layers are not in C."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import _extend_cache, _merge_caches
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from zmoe.batch.plan import BLOCK, Plan, Span, passes
from zmoe.engine.base import Floats, Graph, LogitRows, Rows, SteppedReducer
from zmoe.errors import ZmoeError

Caches = list[Any]  # one per layer


_LONGEST_PAUSE = 64  # steps


@dataclass(frozen=True)
class _Ahead:
    """A pass that is under way before its plan is known: one row, `tokens`, of each sequence.

    `order` are the sequences in the rows of `caches`; `tokens` (rows,) are the likeliest of the
    pass before; `logits` (rows, vocabulary), float32.
    """

    order: tuple[int, ...]
    caches: Caches
    tokens: mx.array
    logits: mx.array


class MlxEngine:
    """Runs plans on the caches of mlx-lm, which hold each sequence apart, or many side by side.

    The sequences that run one row share a pass, on batch caches; each other one has a pass of
    its own. With `looks_ahead`, a decode step also begins the next one, with each sequence's
    likeliest token, before the caller has picked one: so the device need not wait for the host.
    `can_batch`: whether the model's caches can be put side by side; `can_trim`:
    whether a sequence can go back.
    """

    paged = False

    def __init__(
        self,
        model: Callable[..., mx.array],
        reducer: SteppedReducer,
        head: LogitRows,
        max_kv_size: int | None,
        graph: Graph | None = None,
        looks_ahead: bool = False,
    ) -> None:
        self._model, self._reducer, self._head = model, reducer, head
        self._graph, self._looks_ahead = graph, looks_ahead
        self._is_one_pass = False  # which the plan takes
        self._ahead: _Ahead | None = None
        self._wrong = self._pause = 0  # guesses in a row, and decode steps to go without one
        self._max_kv_size = max_kv_size
        self._alone: dict[int, Caches] = {}
        self._side_by_side: list[int] = []  # the sequences in the rows of `_batch`
        self._batch: Caches = []
        self._lengths: dict[int, int] = {}
        self.block_bytes = 1
        empty = make_prompt_cache(model, max_kv_size)
        self.can_batch = max_kv_size is None and all(hasattr(c, "merge") for c in empty)
        self.can_trim = can_trim_prompt_cache(empty) and all(
            isinstance(c, (KVCache, ConcatenateKVCache)) for c in empty
        )

    def make_cache(self, blocks: int) -> None:
        """See Engine."""
        raise ZmoeError(f"{blocks} blocks of cache for a model whose caches are not paged")

    def run(self, plan: Plan, logits: bool = True) -> Floats | None:
        """See Engine. Everything is evaluated on return, since a lazy array would read buffers
        of the exchange that the next steps rewrite.
        """
        self._check(plan)
        ahead = self._ahead
        if ahead is not None and logits and self._was_right(ahead, plan):
            return self._go_on(ahead, plan)
        self._take_back()
        if self._reducer.nodes > 1:  # or nobody compares it
            self._reducer.plan = plan.digest
        for sequence in plan.free:
            self._end(sequence)
        for fork in plan.forks:
            self._fork(fork.new, fork.old, fork.length)
        start, tokens = 0, dict[int, list[int]]()
        for span in plan.spans:
            tokens[span.sequence] = list(plan.tokens[start : start + span.rows])
            start += span.rows
        found: dict[int, Floats] = {}
        todo = passes(plan.spans, paged=False)
        self._is_one_pass = len(todo) == 1
        for step, spans in enumerate(todo, plan.step):
            self._reducer.step = step
            if not logits:
                spans = tuple(span._replace(logits=0) for span in spans)
            with self._graph.step(step, plan.digest) if self._graph else nullcontext():
                if len(spans) == 1:
                    found.update(self._run_alone(spans[0], tokens[spans[0].sequence]))
                else:
                    found.update(self._run_side_by_side(spans, tokens))
        wanted = [found[s.sequence] for s in plan.spans if s.logits and logits]
        return np.concatenate(wanted) if wanted else None

    def _check(self, plan: Plan) -> None:
        if plan.blocks or plan.copies:
            raise ZmoeError("a plan with blocks, on a node without paged caches")
        lengths = {s: n for s, n in self._lengths.items() if s not in plan.free}
        for fork in plan.forks:
            held = lengths.get(fork.old, 0)
            if fork.new in lengths or not 0 < fork.length <= held:
                raise ZmoeError(f"a plan that forks {fork.length} of {held} positions")
            if fork.length < held and not self.can_trim:
                raise ZmoeError("a plan that forks a part of a sequence whose cache cannot go back")
            lengths[fork.new] = fork.length
        if not self.can_batch and len(plan.spans) > 1:
            raise ZmoeError("a plan of several sequences for a model that runs one at a time")
        for span in plan.spans:
            held = lengths.get(span.sequence, 0)
            if span.position > held:
                raise ZmoeError(f"a plan at position {span.position} of a sequence of {held}")
            if 0 < span.position < held and not self.can_trim:
                raise ZmoeError("a plan that goes back in a sequence whose cache cannot")

    # ---- looking ahead ---------------------------------------------------------------

    def _was_right(self, ahead: _Ahead, plan: Plan) -> bool:
        """Whether `plan` is the pass that was begun."""
        likeliest: list[int] = np.array(ahead.tokens).tolist()
        tokens = dict(zip(ahead.order, likeliest))
        follows = (
            not plan.free
            and not plan.forks
            and {span.sequence for span in plan.spans} == set(ahead.order)
            and all(
                span.rows == span.logits == 1 and span.position == self._lengths[span.sequence]
                for span in plan.spans
            )
        )
        if follows and tuple(tokens[span.sequence] for span in plan.spans) == plan.tokens:
            self._wrong = 0
            return True
        if follows:
            self._wrong += 1
            self._pause = min(2**self._wrong, _LONGEST_PAUSE)
        return False

    def _take_back(self) -> None:
        """Drop the pass that was begun, if there is one."""
        if self._ahead is not None:
            trim_prompt_cache(self._ahead.caches, 1)
            self._ahead = None

    def _go_on(self, ahead: _Ahead, plan: Plan) -> Floats:
        self._ahead = None
        for span in plan.spans:
            self._lengths[span.sequence] = span.end
        self._look_ahead(ahead.order, ahead.caches, ahead.logits)
        rows = [ahead.order.index(span.sequence) for span in plan.spans]
        return np.array(ahead.logits)[rows]

    def _look_ahead(self, order: Sequence[int], caches: Caches, logits: mx.array) -> None:
        """Begin the pass after the one that gives `logits`, a row of each sequence."""
        if self._pause > 0:
            self._pause -= 1
            return
        mx.async_eval(logits)
        tokens = logits.argmax(axis=-1)
        following = self._logits(tokens[:, None], caches, np.arange(len(order)))
        mx.async_eval(tokens, following)
        self._ahead = _Ahead(tuple(order), caches, tokens, following)

    # ---- prompt caches -------------------------------------------------------------

    @property
    def layout(self) -> Caches:
        """The caches of a sequence that has not begun."""
        return self._empty()

    def copy(self, sequence: int, length: int) -> Caches:
        """A copy of a sequence's caches, cut to its first `length` positions."""
        self._take_back()
        caches = copy.deepcopy(self._take_out(sequence))
        if surplus := self._lengths[sequence] - length:
            trim_prompt_cache(caches, surplus)
        return caches

    def hold(self, sequence: int, caches: Caches, length: int) -> None:
        """Have a sequence of `length` positions that others may begin with.

        Raises ZmoeError for a number that another sequence has.
        """
        if sequence in self._lengths:
            raise ZmoeError(f"a prompt cache as sequence {sequence}, which this node holds already")
        self._alone[sequence], self._lengths[sequence] = caches, length

    # ---- passes --------------------------------------------------------------------

    def _run_alone(self, span: Span, tokens: list[int]) -> dict[int, Floats]:
        caches = self._take_out(span.sequence)
        if surplus := self._lengths.get(span.sequence, 0) - span.position:
            if span.position == 0:
                caches = self._alone[span.sequence] = self._empty()
            else:
                trim_prompt_cache(caches, surplus)
        self._lengths[span.sequence] = span.end
        rows = np.arange(span.rows - span.logits, span.rows)
        found = self._forward([span.sequence], [tokens], caches, rows)
        # A merge holds the caches of its sequences twice for a moment.
        held = 2 * sum(cache.nbytes for cache in caches)
        self.block_bytes = max(self.block_bytes, held * BLOCK // max(KVCache.step, span.end))
        return {span.sequence: found}

    def _run_side_by_side(
        self, spans: Sequence[Span], tokens: dict[int, list[int]]
    ) -> dict[int, Floats]:
        for span in spans:
            if self._lengths.get(span.sequence, 0) != span.position:
                self._go_back(span)
        self._put_side_by_side([span.sequence for span in spans])
        order = self._side_by_side
        for span in spans:
            self._lengths[span.sequence] = span.end
        by_sequence = {span.sequence: span for span in spans}
        rows = [row for row, s in enumerate(order) if by_sequence[s].logits]
        ids = [tokens[s] for s in order]
        out = self._forward(order, ids, self._batch, np.array(rows, np.intp))
        return {order[row]: out[i : i + 1] for i, row in enumerate(rows)}

    def _logits(self, ids: mx.array, caches: Caches, rows: Rows) -> mx.array:
        """The logits after `rows` of the flattened `ids` (batch, tokens), float32 and lazy."""
        self._head.rows = rows
        out = self._model(ids, cache=caches)
        return out.reshape(-1, out.shape[-1]).astype(mx.float32)

    def _forward(
        self, order: Sequence[int], ids: list[list[int]], caches: Caches, rows: Rows
    ) -> Floats:
        """The same of the sequences `order`, evaluated."""
        logits = self._logits(mx.array(ids), caches, rows)
        may_look = self._looks_ahead and self._is_one_pass and self.can_trim
        if may_look and len(rows) == len(order):
            self._look_ahead(order, caches, logits)
            return np.array(logits)
        state = [c.state for c in caches]
        evaluate = mx.eval if self._graph is None else self._graph.evaluate
        if not len(rows):
            evaluate(state)
            return np.empty((0, 0), np.float32)
        evaluate(state, logits)
        return np.array(logits)

    # ---- sequences -------------------------------------------------------------------

    def _empty(self) -> Caches:
        caches: Caches = make_prompt_cache(self._model, self._max_kv_size)
        return caches

    def _end(self, sequence: int) -> None:
        if sequence in self._side_by_side:
            self._leave([sequence])
        self._alone.pop(sequence, None)
        self._lengths.pop(sequence, None)

    def _fork(self, new: int, old: int, length: int) -> None:
        self._alone[new] = self.copy(old, length)
        self._lengths[new] = length

    def _go_back(self, span: Span) -> None:
        caches = self._take_out(span.sequence)
        trim_prompt_cache(caches, self._lengths[span.sequence] - span.position)
        self._lengths[span.sequence] = span.position

    def _take_out(self, sequence: int) -> Caches:
        """The caches of one sequence, apart from the others; empty ones for a new sequence."""
        if sequence in self._side_by_side:
            row = self._side_by_side.index(sequence)
            self._alone[sequence] = [cache.extract(row) for cache in self._batch]
            self._leave([sequence])
        return self._alone.setdefault(sequence, self._empty())

    def _leave(self, sequences: Sequence[int]) -> None:
        kept = [row for row, s in enumerate(self._side_by_side) if s not in sequences]
        self._side_by_side = [self._side_by_side[row] for row in kept]
        if not kept:
            self._batch = []
        for cache in self._batch:
            cache.filter(mx.array(kept))

    def _put_side_by_side(self, sequences: Sequence[int]) -> None:
        """Make the batch caches hold exactly `sequences`, in any order."""
        for sequence in set(self._side_by_side) - set(sequences):
            self._take_out(sequence)
        new = [s for s in sequences if s not in self._side_by_side]
        if new:
            merged = _merge_caches([self._alone.pop(s, None) or self._empty() for s in new])
            self._batch = _extend_cache(self._batch, merged)
            self._side_by_side += new
