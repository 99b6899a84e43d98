"""The leader's loop: plan a step, run it on all nodes, sample, hand the tokens out."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zmoe.batch.plan import Plan
from zmoe.batch.scheduler import Scheduler
from zmoe.batch.sequence import Request
from zmoe.config import Batching, EngineConfig
from zmoe.engine.base import CachesEmptied, Engine, Floats
from zmoe.engine.counts import Counts
from zmoe.engine.draw import Draw, Drawn
from zmoe.engine.stream import Stream
from zmoe.errors import InputError, QueueTimeoutError, ZmoeError
from zmoe.obs import Spans

Begin = Callable[[Plan, Sequence[Draw]], Callable[[], Floats | Drawn | None]]


@dataclass(frozen=True)
class _Step:
    """A step that has begun; `end` ends it. `is_drawn`: whether the device draws its tokens."""

    plan: Plan
    end: Callable[[], Floats | Drawn | None]
    is_drawn: bool


class Batcher:
    """Runs many streams on one cluster, step by step; one thread at a time."""

    def __init__(
        self,
        run: Callable[[Plan], Floats | None],
        engine: Engine,
        blocks: int,
        config: EngineConfig,
        batching: Batching,
        spans: Spans,
        begin: Begin | None = None,
    ) -> None:
        """`run` runs a plan on all nodes, whose caches have `blocks` blocks. `begin` begins one
        whose tokens are drawn on the device, where the engine plans ahead.
        """
        parallel = config.parallel if engine.can_batch else 1
        self._run, self._begin, self._spans = run, begin, spans
        self._ahead: _Step | None = None  # under way, planned before the last one's results
        self.scheduler = Scheduler(
            blocks=blocks,
            max_rows=config.max_rows,
            parallel=parallel,
            paged=engine.paged,
            exact=not engine.can_trim,
            window=config.max_kv_size,
            step_seconds=batching.step_ms / 1e3,
            max_queue=batching.max_queue,
            queue_seconds=batching.queue_timeout,
            drafts=batching.drafts,
        )
        self._streams: dict[int, Stream] = {}
        self._counted: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._step_seconds = 0.0
        self._forced: int | None = None
        self._held_back: Plan | None = None

    # ---- streams ---------------------------------------------------------------------

    def submit(self, stream: Stream) -> int:
        """Queue `stream`; returns its number.

        Raises InputError for one that can never run, QueueFullError where too many wait.
        """
        self.end_forced()
        sequence = self.scheduler.submit(stream.request, time.monotonic())
        stream.bound(sequence.limit - len(stream.prompt))
        self._streams[sequence.id] = stream
        return sequence.id

    def end(self, number: int) -> None:
        """End a stream, whether or not it has ended already."""
        self._streams.pop(number, None)
        self.scheduler.end(number)

    def counts(self, exchange: Mapping[str, int]) -> Counts:
        """What has been done so far; `exchange` are the exchange's own counters."""
        scheduler, counted = self.scheduler, self._counted
        return Counts(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks=scheduler.blocks,
            blocks_available=scheduler.available,
            steps=counted["steps"],
            prompt_tokens=counted["prompt_tokens"],
            cached_tokens=counted["cached_tokens"],
            generated_tokens=counted["generated_tokens"],
            drafted_tokens=counted["drafted_tokens"],
            accepted_tokens=counted["accepted_tokens"],
            preemptions=scheduler.preemptions,
            step_seconds=self._step_seconds,
            spans=dict(self._seconds),
            exchange=dict(exchange),
        )

    @property
    def busy(self) -> bool:
        """Whether any stream has not ended."""
        return bool(self._streams)

    def step(self) -> None:
        """Run one step, which gives tokens to the streams that were in it."""
        try:
            self._step(time.perf_counter())
        except CachesEmptied:
            self.forget()

    def forget(self) -> None:
        """All caches of all nodes are empty, and no step is under way: what runs begins anew."""
        self._ahead = None
        self.scheduler.forget()

    def _step(self, begun: float) -> None:
        now = time.monotonic()
        self._expire(now)
        step, self._ahead = self._ahead, None
        if step is None:
            plan = self.scheduler.plan(now)
            if plan is None:
                assert not self._streams  # the oldest one can always run
                return
            self._spans.take()
            step = self._begun(plan, begun)
        following = self.scheduler.plan_ahead(now) if step.is_drawn else None
        if following is not None:
            self._ahead = self._begun(following, begun)
        sampled, took = self._results(step, begun)
        self._account(step.plan, sampled, begun, took)

    def _expire(self, now: float) -> None:
        for late in self.scheduler.expire(now):
            waited = f"{now - late.submitted:.0f} s"
            self._streams.pop(late.id).fail(
                QueueTimeoutError(
                    f"the request waited {waited} for others to end, and was given up"
                )
            )

    def _begun(self, plan: Plan, now: float) -> _Step:
        """Run a step, or where the device draws its tokens begin one."""
        for span in plan.spans:
            stream = self._streams[span.sequence]
            if stream.started is None:
                stream.started, stream.timings.cached_tokens = now, span.position
                self._counted["prompt_tokens"] += len(stream.prompt)
                self._counted["cached_tokens"] += span.position
        draws = self._draws(plan) if self._begin is not None else []
        if self._begin is not None and draws:
            return _Step(plan, self._begin(plan, draws), True)
        logits = self._run(plan)
        return _Step(plan, lambda: logits, False)

    def _draws(self, plan: Plan) -> list[Draw]:
        """What draws the tokens of all spans on the device; none if one is for the host."""
        draws = []
        for span in plan.spans:
            draw = self._streams[span.sequence].draw(span.end) if span.logits == 1 else None
            if draw is not None:
                draws.append(draw)
            elif span.logits:
                return []
        return draws

    def _results(self, step: _Step, begun: float) -> tuple[list[list[int]], float]:
        """End a step: the tokens that each of its spans gave, and the seconds that it took."""
        found, plan = step.end(), step.plan
        took = time.perf_counter() - begun
        self.scheduler.rates.took(len(plan.tokens), took)
        if isinstance(found, Drawn):
            sampled = self._take_drawn(plan, found)
        else:
            sampled = self._sample(plan, found)
        self.scheduler.advance(plan, sampled)
        return sampled, took

    def _take_drawn(self, plan: Plan, drawn: Drawn) -> list[list[int]]:
        """The token that each span gives, or none. A stream may have ended since it was planned."""
        sampled, row = [], 0
        for span in plan.spans:
            stream, tokens = self._streams.get(span.sequence), list[int]()
            if span.logits and stream is not None:
                token, largest = int(drawn.tokens[row]), float(drawn.largest[row])
                try:
                    pick = stream.sampler.drawn(token, span.end, largest)
                except ZmoeError as error:
                    stream.fail(error)
                else:
                    tokens.append(token)
                    stream.take(pick)
            row += span.logits
            sampled.append(tokens)
        return sampled

    def _sample(self, plan: Plan, logits: Floats | None) -> list[list[int]]:
        """The tokens that each span gives: none, one, or the drafts that are right and one more."""
        sampled, row, start = [], 0, 0
        for span in plan.spans:
            start += span.rows
            tokens: list[int] = []
            if span.logits:
                assert logits is not None
                drafts = plan.tokens[start - span.logits + 1 : start]
                rows = logits[row : row + span.logits]
                tokens = _draw(self._streams[span.sequence], rows, span.end - len(drafts), drafts)
                row += span.logits
            sampled.append(tokens)
        return sampled

    def _account(
        self, plan: Plan, sampled: Sequence[Sequence[int]], begun: float, took: float
    ) -> None:
        """Tell each stream what the step was for it, and end those that have ended."""
        spans, whole = self._spans.take(), time.perf_counter() - begun
        self._counted["steps"] += 1
        for name, spent in spans.items():
            self._seconds[name] += spent
        self._step_seconds += whole
        for span, tokens in zip(plan.spans, sampled, strict=True):
            stream = self._streams.get(span.sequence)
            if stream is None:  # it has ended since this was planned
                continue
            timings = stream.timings
            drafted, accepted = max(0, span.logits - 1), max(0, len(tokens) - 1)
            self._counted["generated_tokens"] += len(tokens)
            self._counted["drafted_tokens"] += drafted
            self._counted["accepted_tokens"] += accepted
            if stream.picked - stream.given == len(tokens):
                timings.prefill += took
                stream.prefilled(min(span.end, len(stream.prompt)))
                if tokens and stream.started is not None:
                    timings.first_token = begun + whole - stream.started
            else:
                timings.count(whole, len(tokens), spans)
                timings.drafted += drafted
                timings.accepted += accepted
            if stream.ended:
                self.end(span.sequence)

    def forgets(self, most: int) -> bool:
        """Whether emptying all caches costs no more than `most` positions to be computed again."""
        begun = self._ahead is not None and self.busy  # else it is of streams that have ended
        return self._forced is None and not begun and self.scheduler.positions <= most

    # ---- one sequence whose caller brings the tokens -------------------------------------

    def force(self, tokens: Sequence[int], reset: bool) -> Floats:
        """Append `tokens` to a sequence, which `reset` begins anew: the logits (vocabulary,)
        after the last. No stream may be running.
        """
        if self._streams:
            raise ZmoeError("generations are running on this cluster: let them end first")
        if self._ahead is not None:  # of streams that have ended
            step, self._ahead = self._ahead, None
            try:
                self._results(step, time.perf_counter())
            except CachesEmptied:
                self.forget()
        while reset or self._forced is None:
            self.end_forced()
            room = self.scheduler.capacity + 1 - len(tokens)
            sequence = self.scheduler.submit(Request(tokens, max(1, room)), time.monotonic())
            self._forced = sequence.id
            try:
                return self._until_logits()
            except CachesEmptied:
                self.end_forced()
                self.forget()
        for token in tokens:
            assert self._held_back is not None
            self.scheduler.advance(self._held_back, [[token]])
            try:
                logits = self._until_logits()
            except CachesEmptied:
                self.end_forced()
                self.forget()
                raise ZmoeError(
                    "a node was lost, and with it the sequence: begin it anew"
                ) from None
        return logits

    def end_forced(self) -> None:
        """End the sequence of force(), if there is one."""
        if self._forced is not None:
            self.scheduler.end(self._forced)
            self._forced = self._held_back = None

    def _until_logits(self) -> Floats:
        while True:
            plan = self.scheduler.plan(time.monotonic())
            if plan is None:
                raise InputError(
                    f"the sequence has {self.scheduler.capacity} tokens, all that the cache of "
                    "keys and values holds"
                )
            logits = self._run(plan)
            if logits is not None:
                self._held_back = plan
                row: Floats = logits[0]
                return row
            self.scheduler.advance(plan, [[]])


def _draw(stream: Stream, rows: Floats, position: int, drafts: Sequence[int]) -> list[int]:
    """Sample the stream's tokens from `position` on, one row of logits each, while the drafts
    are right.
    """
    tokens: list[int] = []
    for row, draft in zip(rows, (*drafts, None)):
        try:
            pick = stream.pick(row, position + len(tokens))
        except ZmoeError as error:
            stream.fail(error)
            break
        tokens.append(pick.token)
        if not stream.take(pick) or pick.token != draft:
            break
    return tokens
