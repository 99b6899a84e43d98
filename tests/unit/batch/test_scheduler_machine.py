"""Any order of events: nothing leaks, nobody starves, each sequence reads its own text only."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.batch.nodes import VOCABULARY, MlxNode, PagedNode, StatefulNode, alone
from zmoe.batch.blocks import Blocks
from zmoe.batch.plan import BLOCK, Plan, passes
from zmoe.batch.scheduler import Scheduler
from zmoe.batch.sequence import Request, Sequence
from zmoe.batch.snapshots import Snapshots
from zmoe.batch.states import StatefulBlocks
from zmoe.errors import InputError, QueueFullError

TEXTS = [[(i * i * k) % VOCABULARY for i in range(500)] for k in (1, 2)]
QUEUE_SECONDS = 50.0


class Machine(RuleBasedStateMachine):
    """A scheduler, a node that follows its plans, and what each request asked for."""

    paged = True
    exact = False
    at_once = 2  # steps

    @initialize(
        count=st.integers(2, 14),
        max_rows=st.integers(2, 130),
        parallel=st.integers(1, 6),
        drafts=st.sampled_from([None, 0, 3]),
    )
    def start(self, count: int, max_rows: int, parallel: int, drafts: int | None) -> None:
        self.parallel, self.max_rows = min(parallel, max_rows), max_rows
        self.scheduler = Scheduler(
            blocks=count,
            max_rows=max_rows,
            parallel=self.parallel,
            paged=self.paged,
            exact=self.exact,
            max_queue=8,
            queue_seconds=QUEUE_SECONDS,
            drafts=drafts,
        )
        paged = StatefulNode if self.exact else PagedNode
        self.node: Any = paged(count) if self.paged else MlxNode(count, self.exact)
        self.now, self.step = 0.0, 1
        self.live: dict[int, tuple[Sequence, list[int]]] = {}
        self.texts: dict[int, list[int]] = {}  # what the nodes hold of each sequence
        self.running: list[tuple[Plan, list[list[int]]]] = []

    @rule(
        text=st.integers(0, 1),
        shared=st.integers(0, 300),
        own=st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
        max_tokens=st.integers(1, 90),
        salt=st.sampled_from([b"", b"", b"key"]),
        borders=st.sets(st.integers(1, 300), max_size=2).map(tuple),
    )
    def submit(
        self,
        text: int,
        shared: int,
        own: list[int],
        max_tokens: int,
        salt: bytes,
        borders: tuple[int, ...],
    ) -> None:
        prompt = TEXTS[text][:shared] + own
        waiting = self.scheduler.waiting
        try:
            request = Request(prompt, max_tokens, salt, borders)
            sequence = self.scheduler.submit(request, self.now)
        except InputError:
            assert not prompt or len(prompt) >= self.scheduler.capacity
        except QueueFullError:
            assert waiting == 8
        else:
            assert waiting < 8
            count = min(max_tokens, self.scheduler.capacity + 1 - len(prompt))
            self.live[sequence.id] = (sequence, prompt + alone(prompt, count))
            self.texts[sequence.id] = []

    @precondition(lambda self: len(self.running) < self.at_once)
    @rule()
    def plan(self) -> None:
        """One step, or one more before the results of the last one are taken in."""
        preempted = {n: sequence.preemptions for n, (sequence, _) in self.live.items()}
        waiting = {n for n, (sequence, _) in self.live.items() if not sequence.room}
        sent = {n: sequence.position for n, (sequence, _) in self.live.items()}
        plan = self.scheduler.plan(self.now)
        for number, (sequence, _) in self.live.items():
            if sequence.preemptions > preempted[number]:
                assert number > min(self.live.keys() - waiting)
        self.check_progress(plan, waiting, sent)
        if plan is None:
            return
        assert 0 < len(plan.tokens) <= self.max_rows
        assert len({span.sequence for span in plan.spans}) == len(plan.spans) <= self.parallel
        assert {span.sequence for span in plan.spans} <= self.live.keys()
        assert plan.step == self.step
        self.step += len(passes(plan.spans, self.paged))
        for span in plan.spans:
            if self.live[span.sequence][0].preemptions > preempted[span.sequence]:
                raise AssertionError("preempted, and yet it runs")
            # A prefix hit, or a start from nothing: the text then is that of the prompt.
            tokens, text = self.live[span.sequence][0].tokens, self.texts[span.sequence]
            if len(text) < span.position:
                text += tokens[len(text) : span.position]
        self.running.append((plan, self.node.run(plan, self.texts)))

    def check_progress(self, plan: Plan | None, waiting: set[int], sent: dict[int, int]) -> None:
        """The oldest one that runs has a row, unless results decide what it needs."""
        spans = {span.sequence for span in plan.spans} if plan else set()
        runs = sorted(self.live.keys() - waiting)
        if runs:
            oldest = self.live[runs[0]][0]
            unknown = oldest.verifying or len(oldest.tokens) + oldest.ahead >= oldest.limit
            assert runs[0] in spans or unknown
        elif waiting:
            assert spans or self.live[min(waiting)][0].ahead

    @precondition(lambda self: self.running)
    @rule()
    def advance(self) -> None:
        plan, sampled = self.running.pop(0)
        ended = self.scheduler.advance(plan, sampled)
        for number in [n for n, (s, _) in self.live.items() if len(s.tokens) >= s.limit]:
            sequence, expected = self.live.pop(number)
            assert sequence.tokens == expected
            assert sequence in ended
            ended.remove(sequence)
        assert not ended
        for sequence, expected in self.live.values():
            assert sequence.tokens == expected[: len(sequence.tokens)]

    @rule(seconds=st.floats(0.001, 2.0), rows=st.integers(1, 130))
    def took(self, seconds: float, rows: int) -> None:
        self.scheduler.rates.took(rows, seconds)

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def end(self, choice: Any) -> None:
        number = choice.choice(sorted(self.live))
        self.scheduler.end(number)
        self.scheduler.end(number)
        del self.live[number]

    @rule(seconds=st.floats(0.0, 40.0))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        late = self.scheduler.expire(self.now)
        for sequence in late:
            assert self.now - sequence.submitted > QUEUE_SECONDS and sequence.queued is None
            del self.live[sequence.id]

    @rule(steps=st.integers(1, 20))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            while self.running:
                self.advance()
            self.plan()

    @invariant()
    def memory_is_accounted_for(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.running <= self.parallel
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)
        memory = self.scheduler._memory
        sequences = [sequence for sequence, _ in self.live.values()]
        if isinstance(memory, Blocks):
            check_blocks(memory, sequences)
        if isinstance(memory, StatefulBlocks):
            check_states(memory, sequences, self.node.states)
        if isinstance(memory, Snapshots):
            check_snapshots(memory, sequences, self.node.caches)

    def teardown(self) -> None:
        """All that is left ends by itself, in a bounded number of steps, and returns its memory."""
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        # Every step computes at least one row of the oldest; preempted ones begin anew.
        most = 10 + sum(sequence.limit + 1 for sequence, _ in self.live.values())
        while self.live:
            self.run(1)
            while self.running:
                self.advance()
            steps += 1
            assert steps <= most
        while self.running:
            self.advance()
        assert self.scheduler.plan(self.now) is None
        assert self.scheduler.available == self.node.count
        self.memory_is_accounted_for()


def check_blocks(memory: Blocks, sequences: list[Sequence]) -> None:
    """Each block is in one place, with as many owners as there are."""
    owned = Counter(block for sequence in sequences for block in sequence.blocks)
    assert [owned[block] for block in range(memory.count)] == memory._owners
    unused = range(memory._unused, memory.count)
    places = [*owned, *memory._spare, *memory._cached, *unused]
    assert sorted(places) == list(range(memory.count))
    assert memory.available == memory.count - len(owned)
    assert not memory._prefixes.keys() & {*memory._spare, *unused}
    assert {block: prefix for prefix, block in memory._blocks.items()} == memory._prefixes


def check_snapshots(
    memory: Snapshots, sequences: list[Sequence], caches: dict[int, list[int]]
) -> None:
    """The nodes hold what is counted, once the pending operations are done."""
    running = {sequence.id for sequence in sequences if sequence.room}
    assert running == {sequence.id for sequence in memory._running}
    new = {fork.new for fork in memory.forks}
    held = (caches.keys() - set(memory.free)) | new
    assert memory._texts.keys() <= held
    assert held - memory._texts.keys() <= running
    blocks = sum(-(-len(text) // BLOCK) for _, text in memory._texts.values())
    assert blocks == memory._kept
    assert len(running) * memory._longest + blocks <= memory.count


def check_states(
    memory: StatefulBlocks, sequences: list[Sequence], states: dict[int, tuple[int, int]]
) -> None:
    """The nodes hold what is known, once the pending operations are done, and no more of it than
    there may be.
    """
    assert not memory.forks
    snapshots = memory._snapshots.values()
    assert len(set(snapshots)) == len(snapshots) <= memory._most_snapshots
    running = {sequence.id for sequence in sequences if sequence.room}
    held = states.keys() - set(memory.free)
    assert set(snapshots) <= held
    assert held - set(snapshots) <= running


class StatefulMachine(Machine):
    exact = True
    at_once = 1  # states are there of the last steps alone


class MlxMachine(Machine):
    paged = False


class ExactMachine(MlxMachine):
    exact = True


@pytest.mark.parametrize("machine", [Machine, StatefulMachine, MlxMachine, ExactMachine])
def test_any_order_of_events(machine: type[Machine]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
