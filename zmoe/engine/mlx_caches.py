"""Steps on mlx-lm's caches: for the families and devices whose layers are not in C."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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

from zmoe.batch.plan import BLOCK, PREVIOUS, Plan, Span, passes
from zmoe.engine.base import Floats, Graph, LogitRows, SteppedReducer
from zmoe.engine.draw import Draw, Drawn, draw
from zmoe.errors import PeerError, ZmoeError

Caches = list[Any]  # one per layer


@dataclass
class _Pass:
    """A pass that is under way: on `caches`, the `tokens` of each sequence of `order`.

    Of these some are `wanting` logits, after the flattened `rows`; `draws`, if not empty, has a
    Draw of each of these. `ids` (sequences, tokens) are the tokens.

    Of the wanting there are `logits` (rows, vocabulary), float32, or the `largest` of each row,
    (rows,). `picked` (sequences,), uint32, are the tokens that were drawn on the device, 0
    where none was. `told` and `sums`: see Graph.tell(). `state` is what else is to be
    evaluated. Once it has ended, `found` has what it gave each sequence.
    """

    step: int
    caches: Caches
    order: tuple[int, ...]
    wanting: tuple[int, ...]
    tokens: list[list[int]]
    rows: list[int]
    draws: list[Draw]
    ids: mx.array
    logits: mx.array | None = None
    largest: mx.array | None = None
    picked: mx.array | None = None
    told: mx.array | None = None
    sums: list[mx.array] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)
    found: dict[int, Floats | Drawn] | None = None

    @property
    def size(self) -> int:
        """How many rows it has."""
        return sum(map(len, self.tokens))

    def arrays(self) -> list[Any]:
        """All that is to be evaluated."""
        several = (self.logits, self.largest, self.picked, self.told)
        return [*self.state, *(each for each in several if each is not None)]


class MlxEngine:
    """Runs plans on the caches of mlx-lm, which hold each sequence apart, or many side by side.

    The sequences that run one row share a pass, on batch caches; each other one has a pass of
    its own. With `plans_ahead`, where nothing is evaluated within a pass, a step may begin while
    the one before is under way, with tokens that the host has not seen. `can_batch`: whether the
    model's caches can be put side by side; `can_trim`: whether a sequence can go back.
    """

    paged, state_bytes = False, 0

    def __init__(
        self,
        model: Callable[..., mx.array],
        reducer: SteppedReducer,
        head: LogitRows,
        max_kv_size: int | None,
        graph: Graph | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self._model, self._reducer, self._head = model, reducer, head
        self._graph, self.plans_ahead = graph, plans_ahead
        self._under_way: deque[_Pass] = deque()
        self._picked: dict[int, tuple[mx.array, int]] = {}  # with the row of each sequence
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
        """See Engine."""
        found = self.begin(plan, logits)()
        assert not isinstance(found, Drawn)
        return found

    def begin(
        self, plan: Plan, logits: bool = True, draws: Sequence[Draw] = ()
    ) -> Callable[[], Floats | Drawn | None]:
        """Begin a step; the result ends it, and returns what run() does.

        With `draws`, one for each of the wanted rows, that is the tokens drawn from them. An
        engine that plans ahead may begin the next step before this one has ended; PREVIOUS then
        stands for a token that was drawn. Steps end in the order in which they began.
        Raises what run() does, in either part.
        """
        self._check(plan)
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
        wanting = [span.sequence for span in plan.spans if span.logits and logits]
        draw_of = dict(zip(wanting, draws, strict=True)) if draws else {}
        begun: list[_Pass] = []
        for step, spans in enumerate(passes(plan.spans, paged=False), plan.step):
            if begun:
                self._settle(begun[-1])
            self._reducer.step = step
            if not logits:
                spans = tuple(span._replace(logits=0) for span in spans)
            begun.append(self._begin_pass(step, plan.digest, spans, tokens, draw_of))
        if not self.plans_ahead:  # a lazy array would read buffers that the next step rewrites
            self._settle(begun[-1])

        def end() -> Floats | Drawn | None:
            self._settle(begun[-1])
            found = {s: rows for each in begun for s, rows in (each.found or {}).items()}
            return _joined([found[sequence] for sequence in wanting])

        return end

    def forget(self) -> None:
        """End all sequences, and the passes that are under way."""
        self._under_way.clear()
        self._picked.clear()
        self._alone.clear()
        self._lengths.clear()
        self._side_by_side, self._batch = [], []

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
        start = 0
        for span in plan.spans:
            given, start = plan.tokens[start : start + span.rows], start + span.rows
            held = lengths.get(span.sequence, 0)
            drawn = span.sequence in self._picked and span.position == held
            if PREVIOUS in given and not (drawn and span.rows == 1):
                raise ZmoeError(f"a plan of a token of sequence {span.sequence} that is not drawn")
            if span.position > held:
                raise ZmoeError(f"a plan at position {span.position} of a sequence of {held}")
            if 0 < span.position < held and not self.can_trim:
                raise ZmoeError("a plan that goes back in a sequence whose cache cannot")

    # ---- prompt caches -------------------------------------------------------------

    @property
    def layout(self) -> Caches:
        """The caches of a sequence that has not begun."""
        return self._empty()

    def copy(self, sequence: int, length: int) -> Caches:
        """A copy of a sequence's caches, cut to its first `length` positions."""
        if self._under_way:
            self._settle(self._under_way[-1])
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

    def _begin_pass(
        self,
        step: int,
        plan: int,
        spans: Sequence[Span],
        tokens: dict[int, list[int]],
        draw_of: dict[int, Draw],
    ) -> _Pass:
        """`plan` is the digest of the step's plan, and `tokens` are those of each sequence."""
        caches = self._alone_or_side_by_side(spans)
        order = tuple(self._side_by_side) if len(spans) > 1 else (spans[0].sequence,)
        of = {span.sequence: span for span in spans}
        wanting = tuple(sequence for sequence in order if of[sequence].logits)
        rows, end = list[int](), 0
        for sequence in order:
            end += of[sequence].rows
            rows += range(end - of[sequence].logits, end)
        given = [tokens[sequence] for sequence in order]
        draws = [draw_of[sequence] for sequence in wanting] if draw_of else []
        ids = self._ids(order, given)
        begun = _Pass(step, caches, order, wanting, given, rows, draws, ids)
        if self._graph is not None:
            self._graph.begin(step, plan, begun.size)
        self._compute(begun)
        self._under_way.append(begun)
        if len(spans) == 1:  # a merge holds the caches of its sequences twice for a moment
            held = 2 * sum(cache.nbytes for cache in caches)
            positions = max(KVCache.step, spans[0].end)
            self.block_bytes = max(self.block_bytes, held * BLOCK // positions)
        return begun

    def _compute(self, begun: _Pass) -> None:
        """Run the model, draw tokens where there is a Draw of each, and tell them to all nodes;
        if the engine plans ahead, in the background.
        """
        order, wanting, rows = begun.order, begun.wanting, begun.rows
        with self._waiting():
            self._head.rows = np.array(rows, np.intp)
            out = self._model(begun.ids, cache=begun.caches)
            begun.logits = out.reshape(-1, out.shape[-1]).astype(mx.float32) if rows else None
            picked = mx.zeros(len(order), mx.uint32)
            if begun.logits is not None and begun.draws:
                drawn, begun.largest = draw(begun.logits, begun.draws)
                begun.logits = None
                if wanting == order:
                    picked = drawn
                else:
                    picked[mx.array([order.index(s) for s in wanting])] = drawn
            else:
                begun.state = [cache.state for cache in begun.caches]
            if self._graph is not None:
                picked, begun.told, begun.sums = self._graph.tell(picked)
            if self.plans_ahead:
                begun.picked = picked
                self._picked |= {s: (picked, row) for row, s in enumerate(order)}
                mx.async_eval(*begun.arrays())
                begun.state = []  # or the caches would be copied when they next change

    def _ids(self, order: Sequence[int], given: list[list[int]]) -> mx.array:
        """The tokens of a pass, (sequences, rows of each)."""
        if [PREVIOUS] not in given:
            return mx.array(given)
        columns, rows = list[mx.array](), list[int]()
        for sequence, each in zip(order, given):
            is_known = each != [PREVIOUS]
            column, row = (mx.array(each, mx.uint32), 0) if is_known else self._picked[sequence]
            columns.append(column)
            rows.append(row)
        first = columns[0]
        if all(column is first for column in columns) and rows == list(range(len(first))):
            return first[:, None]
        parts = [column[row : row + 1] for column, row in zip(columns, rows)]
        return mx.concatenate(parts)[:, None]

    def _settle(self, last: _Pass) -> None:
        """End the passes up to `last`."""
        while last.found is None:
            ended = self._under_way.popleft()
            try:
                self._evaluate(ended)
            except PeerError:
                if not self._repeat(ended):
                    raise
            ended.found = _found(ended)

    def _evaluate(self, ended: _Pass) -> None:
        with self._waiting():
            mx.eval(*ended.arrays())
        if self._graph is not None:
            assert ended.told is not None
            self._graph.check(ended.step, np.array(ended.told))

    def _repeat(self, failed: _Pass) -> bool:
        """Compute a pass anew, and those that were begun after it, where that may help and the
        caches can go back.
        """
        later, graph = list(self._under_way), self._graph
        same = all(each.caches is failed.caches and each.order == failed.order for each in later)
        if graph is None or not (self.can_trim and same):
            return False
        with self._waiting():  # they wait for nobody now
            mx.eval(*(each.arrays() for each in later))
        if not graph.repeat(failed.sums):
            return False
        for each in (failed, *later):
            trim_prompt_cache(failed.caches, each.size // len(each.order))
        self._compute(failed)
        self._evaluate(failed)
        for each in later:
            each.ids = self._ids(each.order, each.tokens)
            graph.begin_again(each.size)
            self._compute(each)
        return True

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self._graph is None else self._graph.waiting()

    def _alone_or_side_by_side(self, spans: Sequence[Span]) -> Caches:
        """The caches of a pass, of as many positions as it begins with."""
        if len(spans) == 1:
            return self._caches_of(spans[0])
        for span in spans:
            if self._lengths.get(span.sequence, 0) != span.position:
                self._go_back(span)
        self._put_side_by_side([span.sequence for span in spans])
        self._lengths |= {span.sequence: span.end for span in spans}
        return self._batch

    def _caches_of(self, span: Span) -> Caches:
        caches = self._take_out(span.sequence)
        if surplus := self._lengths.get(span.sequence, 0) - span.position:
            if span.position == 0:
                caches = self._alone[span.sequence] = self._empty()
            else:
                trim_prompt_cache(caches, surplus)
        self._lengths[span.sequence] = span.end
        return caches

    # ---- sequences -------------------------------------------------------------------

    def _empty(self) -> Caches:
        caches: Caches = make_prompt_cache(self._model, self._max_kv_size)
        return caches

    def _end(self, sequence: int) -> None:
        if sequence in self._side_by_side:
            self._leave([sequence])
        self._alone.pop(sequence, None)
        self._lengths.pop(sequence, None)
        self._picked.pop(sequence, None)

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


def _found(ended: _Pass) -> dict[int, Floats | Drawn]:
    """What each sequence gets of an evaluated pass."""
    found: dict[int, Floats | Drawn] = {}
    if ended.largest is not None and ended.picked is not None:
        picked, largest = np.array(ended.picked), np.array(ended.largest)
        for row, sequence in enumerate(ended.wanting):
            at = ended.order.index(sequence)
            found[sequence] = Drawn(picked[at : at + 1], largest[row : row + 1])
    elif ended.logits is not None:
        rows = np.array(ended.logits)
        several = len(ended.wanting) > 1  # which have a row each
        for row, sequence in enumerate(ended.wanting):
            found[sequence] = rows[row : row + 1] if several else rows
    return found


def _joined(rows: Sequence[Floats | Drawn]) -> Floats | Drawn | None:
    """All that the sequences got, in their order."""
    drawn = [each for each in rows if isinstance(each, Drawn)]
    if drawn:
        return Drawn(*(np.concatenate(parts) for parts in zip(*drawn)))
    logits = [each for each in rows if not isinstance(each, Drawn)]
    return np.concatenate(logits) if logits else None
