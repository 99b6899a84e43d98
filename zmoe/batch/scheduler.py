"""Which rows run next: admission, chunks of prompts, preemption.

After the scheduler of vLLM's v1 engine: one budget of rows per step, running sequences first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Items

from zmoe.batch.blocks import Blocks, Found
from zmoe.batch.drafts import Drafts
from zmoe.batch.plan import (
    BLOCK,
    PREVIOUS,
    UNBOUNDED,
    Plan,
    Span,
    blocks_of,
    blocks_of_window,
    passes,
)
from zmoe.batch.rates import Rates
from zmoe.batch.sequence import Request, Sequence
from zmoe.batch.snapshots import Snapshots
from zmoe.batch.states import StatefulBlocks, most_snapshots
from zmoe.errors import InputError, QueueFullError

FLOOR = 16  # rows of a chunk beside decoding sequences: fewer read almost as many experts


class Scheduler:
    """Plans the steps of a cluster; pure, so `now` is any clock's seconds.

    `blocks` are those that every node has, `max_rows` the most rows of a step and `parallel` the
    most sequences that run at a time. On MLX's caches (not `paged`) blocks only count
    positions. `exact` says that the caches cannot be cut, as where layers are recurrent. With a
    `window`, rows see that many keys at most, and a sequence's positions are not limited by its
    caches; paged ones are not `exact` then. While sequences decode, chunks of prompts are as large
    as a step of `step_seconds` allows. At most `max_queue` requests wait (None: any number),
    `queue_seconds` each. `drafts` is the number of draft rows per sequence, None to choose it by
    what pays, 0 for none. `step` is the number of the next step.

    The caller runs `plan()`, samples, and calls `advance()`, with plans in order. It may plan one
    step ahead of the results: tokens are `PREVIOUS` then, and there are no drafts.
    """

    def __init__(
        self,
        *,
        blocks: int,
        max_rows: int,
        parallel: int = 32,
        paged: bool = True,
        exact: bool = False,
        window: int | None = None,
        step_seconds: float = 0.25,
        max_queue: int | None = None,
        queue_seconds: float = 600.0,
        drafts: int | None = 0,
    ) -> None:
        if not 1 <= parallel <= max_rows:
            raise InputError(f"{parallel} sequences in steps of {max_rows} rows: expected 1 to all")
        if blocks < 1:
            raise InputError(f"{blocks} blocks of keys and values: expected at least 1")
        self._ids = itertools.count()
        most = None if window is None else blocks_of_window(window, max_rows)
        self._most = most
        self._memory: Blocks | Snapshots
        if not paged:
            self._memory = Snapshots(blocks, exact, self._ids, most)
        elif exact:
            assert most is None
            self._memory = StatefulBlocks(blocks, self._ids, most_snapshots(parallel))
        else:
            self._memory = Blocks(blocks, most)
        self._paged, self._exact = paged, exact
        self._max_rows, self._parallel, self._step_seconds = max_rows, parallel, step_seconds
        self._max_queue, self._queue_seconds = max_queue, queue_seconds
        self._drafts = drafts
        self.step = 1
        self._sequences: dict[int, Sequence] = {}
        self._waiting: dict[int, Sequence] = {}  # these three by age
        self._prefilling: dict[int, Sequence] = {}
        self._decoding: dict[int, Sequence] = {}
        self._long: Sequence | None = None  # the one long prompt among those prefilling
        self._changed = False  # whether something happened that may let a waiting one in
        self.rates = Rates()
        self.preemptions = 0  # since the beginning

    @property
    def waiting(self) -> int:
        """How many requests wait, those preempted included."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many sequences prefill or decode."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def blocks(self) -> int:
        """Blocks of keys and values, those of running sequences included."""
        return self._memory.count

    @property
    def available(self) -> int:
        """Blocks that belong to no running sequence."""
        return self._memory.available

    @property
    def capacity(self) -> int:
        """The most positions that a sequence can have."""
        unbounded = self._most is not None and self._most <= self._memory.count
        return UNBOUNDED if unbounded else self._memory.count * BLOCK

    def resize(self, blocks: int) -> None:
        """Count `blocks` blocks from now on; for MLX's caches, whose size only a step tells."""
        assert not self._paged
        self._memory.count = blocks

    def submit(self, request: Request, now: float) -> Sequence:
        """Queue a request.

        Raises InputError where it could never run, QueueFullError where too many wait.
        """
        prompt = len(request.tokens)
        if not prompt or request.max_tokens < 1:
            raise InputError(f"{prompt} tokens of prompt, {request.max_tokens} to generate")
        if prompt + 1 > self.capacity:
            raise InputError(
                f"the prompt has {prompt} tokens, and the cache of keys and values holds "
                f"{self.capacity} positions: one fewer must be left free"
            )
        full = self._max_queue is not None and len(self._waiting) >= self._max_queue
        if full and not request.accepted:
            raise QueueFullError(len(self._waiting))
        sequence = Sequence(
            id=next(self._ids),
            tokens=list(request.tokens),
            prompt=prompt,
            limit=min(prompt + request.max_tokens, self.capacity + 1),
            salt=request.salt,
            submitted=now,
            borders=self._memory.borders(prompt, request.borders),
            drafts=None if self._drafts == 0 else Drafts(self._drafts, again=self._exact),
        )
        self._sequences[sequence.id] = self._waiting[sequence.id] = sequence
        self._changed = True
        return sequence

    def end(self, number: int) -> None:
        """End a sequence, for whatever reason; its text stays cached. Nothing if it has ended."""
        sequence = self._sequences.pop(number, None)
        if sequence is None:
            return
        if self._waiting.pop(number, None) is None:
            self._leave(sequence, keep=True)
        self._changed = True

    def known(self, tokens: Items[int]) -> Found:
        """Where the longest beginning of `tokens` is that is computed: in full blocks, or in a
        snapshot or a running sequence.
        """
        return self._memory.known(_text([*tokens, 0]))

    def adopt(self, tokens: Items[int], fill: Callable[[list[int]], None]) -> int:
        """Have `fill` write a text into blocks, the full ones, or into a snapshot of that number,
        where prompts then find it.

        Returns the number of tokens for which there was room; `fill` may raise.
        """
        return self._memory.adopt(_text(tokens), fill)

    @property
    def positions(self) -> int:
        """How many the running sequences have computed."""
        running = (*self._prefilling.values(), *self._decoding.values())
        return sum(sequence.position for sequence in running)

    def forget(self) -> None:
        """All caches of all nodes are empty, so that what runs begins anew; steps that are planned
        and not yet advanced are not run.
        """
        for sequence in [*self._prefilling.values(), *self._decoding.values()]:
            self._preempt(sequence)
        for sequence in self._waiting.values():
            sequence.ahead = 0
        self._memory.forget()
        self._changed = True

    def expire(self, now: float) -> list[Sequence]:
        """End the requests that have waited too long for their first step; returns them."""
        late = []
        for sequence in self._waiting.values():  # by age
            if sequence.queued is None:
                if now - sequence.submitted <= self._queue_seconds:
                    break
                late.append(sequence)
        for sequence in late:
            self.end(sequence.id)
        return late

    def plan(self, now: float) -> Plan | None:
        """The next step; None where nothing can run, or not before `advance()`."""
        rows = _Rows(self._paged)
        self._decode(rows)
        self._admit(now)
        if self._prefilling:
            self._prefill(rows)
        if not rows.spans:
            return None
        memory = self._memory
        plan = Plan(
            self.step,
            tuple(rows.spans),
            tuple(rows.tokens),
            tuple(rows.blocks),
            tuple(memory.free),
            tuple(memory.forks),
        )
        memory.free.clear()
        memory.forks.clear()
        self.step += len(passes(plan.spans, self._paged))
        return plan

    def plan_ahead(self, now: float) -> Plan | None:
        """The next step before `advance()` of the last one, if it only decodes, and nothing else
        can be done once the tokens are known: no drafts, and nobody's first step.
        """
        if self._prefilling or (self._waiting and self._changed):
            return None
        may_draft = self._room_for_drafts() > 0
        for sequence in self._decoding.values() if may_draft else ():
            if sequence.drafts is not None and sequence.drafts.may_propose(sequence.tokens):
                return None
        return self.plan(now)

    def advance(self, plan: Plan, sampled: Items[Items[int]]) -> list[Sequence]:
        """Take in the results of a step: the tokens that each of the plan's spans gave.

        None without logits; one; or, with drafts, those accepted and one more. Returns the
        sequences that have ended because they reached their limit.
        """
        ended = []
        for span, tokens in zip(plan.spans, sampled, strict=True):
            sequence = self._sequences.get(span.sequence)
            if sequence is None:
                continue
            end = span.position + span.rows
            if span.logits:
                sequence.tokens += tokens
                sequence.ahead -= 1
                if sequence.verifying:
                    end = self._verified(sequence, span, len(tokens))
            else:
                self._changed = True  # others may find what is now computed
            if not sequence.room:  # preempted meanwhile
                self._changed = True
                continue
            assert end <= sequence.position  # it has not begun anew since: no room in that step
            if end // BLOCK > sequence.kept:
                self._memory.keep(sequence, end)
            if len(sequence.tokens) >= sequence.limit:
                self.end(sequence.id)
                ended.append(sequence)
        return ended

    def _verified(self, sequence: Sequence, span: Span, tokens: int) -> int:
        """Go back to the last draft that was right, or as far as the caches have to; returns the
        position after it.
        """
        assert sequence.drafts is not None
        sequence.drafts.verified(span.logits - 1, tokens - 1)
        sequence.verifying = False
        if tokens == span.logits or not self._exact:
            sequence.position = span.end - span.logits + tokens
        else:  # a state is there before the step and after it alone
            sequence.position = span.position
        return sequence.position

    def _decode(self, rows: _Rows) -> None:
        """One row for each sequence whose prompt is done, after those to be computed again, and
        drafts where they pay.
        """
        memory, room = self._memory, self._room_for_drafts()
        for sequence in list(self._decoding.values()):
            end = sequence.position + self._due(sequence)
            if sequence.verifying or len(sequence.tokens) + sequence.ahead >= sequence.limit:
                continue  # no row before the results are there
            if sequence.id not in self._decoding:
                continue  # preempted for one before it
            if end > sequence.room and not self._grow(sequence, end):
                continue
            memory.snapshot(sequence)
            if sequence.ahead:
                rows.add(sequence, (PREVIOUS,), 1)
                continue
            due = sequence.tokens[sequence.position :]
            draft = self._draft(sequence, room, len(self._decoding)) if room > 0 else ()
            rows.add(sequence, (*due, *draft), 1 + len(draft))
            room -= len(draft)

    def _room_for_drafts(self) -> int:
        """How many draft rows the step may have: none beside prompts, or where it is full."""
        alone = self._paged or (len(self._decoding) == 1 and not self._exact)
        prompts = self._prefilling or (self._waiting and self._changed)
        if self._drafts == 0 or prompts or not alone or not self._decoding:
            return 0
        most = self._max_rows
        if self._drafts is None:
            most = min(most, self.rates.rows(self._step_seconds))
        return most - sum(map(self._due, self._decoding.values()))

    @staticmethod
    def _due(sequence: Sequence) -> int:
        """The rows that a sequence needs for its next token."""
        return max(1, len(sequence.tokens) - sequence.position)

    def _draft(self, sequence: Sequence, room: int, rows: int) -> list[int]:
        assert sequence.drafts is not None
        room = min(room, sequence.limit - len(sequence.tokens) - 1)
        draft = sequence.drafts.propose(sequence.tokens, room, rows, self.rates)
        end = len(sequence.tokens) + len(draft)
        if end > sequence.room and not self._memory.grow(sequence, end):
            return []
        sequence.verifying = bool(draft)
        return draft

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Make room up to `end`, by preempting the newest ones; False if itself was among them."""
        while not self._memory.grow(sequence, end):
            newest = self._sequences[max(*self._decoding, *self._prefilling, -1)]
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Let it wait until there is room for it, and begin anew."""
        self._leave(sequence, keep=False)
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting[sequence.id] = sequence
        self._waiting = dict(sorted(self._waiting.items()))

    def _leave(self, sequence: Sequence, keep: bool) -> None:
        """It runs no longer."""
        if self._decoding.pop(sequence.id, None) is None:
            del self._prefilling[sequence.id]
        if self._long is sequence:
            self._long = None
        self._memory.end(sequence, keep)
        sequence.verifying = False

    def _admit(self, now: float) -> None:
        """Let waiting ones begin, in order, while there is room for them.

        A long prompt waits while another one is prefilled, and lets short ones pass.
        """
        if not self._changed:
            return
        self._changed = False
        for sequence in list(self._waiting.values()):
            if self.running == self._parallel or sequence.ahead:
                return
            found = self._memory.find(sequence)
            long = len(sequence.tokens) - found.length > self._max_rows // 2
            if long and self._long:
                continue
            if not self._memory.begin(sequence, found, reserve=self.running):
                return
            del self._waiting[sequence.id]
            self._prefilling[sequence.id] = sequence
            if long:
                self._long = sequence
            if sequence.queued is None:
                sequence.queued = now - sequence.submitted
                sequence.cached = sequence.position

    def _prefill(self, rows: _Rows) -> None:
        """Chunks of prompts: at least half of what remains of the step is for the long one."""
        room = self._max_rows - len(rows.tokens)
        if self._decoding:
            in_time = self.rates.rows(self._step_seconds) - len(rows.tokens)
            room = min(room, max(FLOOR, in_time))
        short = [s for s in self._prefilling.values() if s is not self._long]
        if self._long:
            wanted = sum(len(sequence.tokens) - sequence.position for sequence in short)
            room -= self._chunk(rows, self._long, room - min(room // 2, wanted))
        for sequence in short:
            if not room:
                return
            room -= self._chunk(rows, sequence, room)

    def _chunk(self, rows: _Rows, sequence: Sequence, room: int) -> int:
        """The next rows of its prompt, at most `room`; returns their number."""
        start, length = sequence.position, len(sequence.tokens)
        stop = self._memory.snapshot(sequence) if sequence.borders else length
        end = min(start + room, stop, length)
        rows.add(sequence, sequence.tokens[start:end], int(end == length))
        if end == length:
            del self._prefilling[sequence.id]
            if self._decoding and sequence.id < next(reversed(self._decoding)):
                self._decoding = dict(sorted([*self._decoding.items(), (sequence.id, sequence)]))
            else:
                self._decoding[sequence.id] = sequence
            if self._long is sequence:
                self._long, self._changed = None, True
        return end - start


def _text(tokens: Items[int]) -> Sequence:
    """A text that nobody generates."""
    return Sequence(
        id=-1,
        tokens=list(tokens),
        prompt=len(tokens),
        limit=0,
        salt=b"",
        submitted=0.0,
        borders=[],
        drafts=None,
    )


class _Rows:
    """The rows of the plan in the making."""

    def __init__(self, paged: bool) -> None:
        self._paged = paged
        self.spans: list[Span] = []
        self.tokens: list[int] = []
        self.blocks: list[int] = []

    def add(self, sequence: Sequence, tokens: Items[int], logits: int) -> None:
        """The next rows of a sequence, which then stands after them unless some are drafts."""
        position = sequence.position
        span = Span(sequence.id, position, len(tokens), logits)
        self.spans.append(span)
        self.tokens += tokens
        if span.end > sequence.sent * BLOCK:
            sent = blocks_of(span.end)
            self.blocks += sequence.blocks[sequence.sent : sent]
            sequence.sent = sent
        if logits:
            sequence.ahead += 1
        if not sequence.verifying:
            sequence.position = span.end
