"""A window of keys: the blocks of a sequence that take turns."""

from __future__ import annotations

import random

import pytest

from zmoe.batch.blocks import Blocks
from zmoe.batch.plan import BLOCK, UNBOUNDED, Plan, blocks_of, blocks_of_window
from zmoe.batch.scheduler import Scheduler
from zmoe.batch.sequence import Request, Sequence
from zmoe.errors import InputError

KEPT = 4


def scheduler(window: int, rows: int, sequences: int, drafts: int = 0) -> Scheduler:
    blocks = sequences * blocks_of_window(window, rows)
    return Scheduler(blocks=blocks, max_rows=rows, parallel=sequences, window=window, drafts=drafts)


class Node:
    """Holds which sequence and position each slot of a block was written for last."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._tables: dict[int, list[int]] = {}
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}

    def run(self, plan: Plan) -> None:
        """Write all rows of the plan, as a layer does, and then let each read what it sees."""
        for ended in plan.free:
            del self._tables[ended]
        blocks = iter(plan.blocks)
        for span in plan.spans:
            table = self._tables.setdefault(span.sequence, [])
            table += [next(blocks) for _ in range(len(table), blocks_of(span.end))]
            for position in range(span.position, span.end):
                self._slots[self._slot(span.sequence, position)] = (span.sequence, position)
        assert next(blocks, None) is None
        for span in plan.spans:
            for row in range(span.position, span.end):
                latest = range(max(0, row + 1 - (self._window - KEPT)), row + 1)
                for seen in (*range(min(KEPT, row + 1)), *latest):
                    assert self._slots[self._slot(span.sequence, seen)] == (span.sequence, seen)

    def _slot(self, sequence: int, position: int) -> tuple[int, int]:
        return self._tables[sequence][position // BLOCK], position % BLOCK


@pytest.mark.parametrize(
    ("window", "rows", "drafts"), [(9, 4, 0), (100, 28, 3), (64, 7, 3), (200, 150, 5)]
)
def test_every_row_finds_what_it_sees(window: int, rows: int, drafts: int) -> None:
    """Some sequences end early, and drafts are wrong at times."""
    rng = random.Random(window)
    one, node = scheduler(window, rows, 3, drafts), Node(window)
    lengths = [1, 3 * window, 900, 5, 70, 2000]
    for length in lengths:
        one.submit(Request([rng.randrange(3) for _ in range(length)], 700), 0.0)
    ended = 0
    while (plan := one.plan(0.0)) is not None:
        node.run(plan)
        sampled = []
        for span, start in zip(plan.spans, _starts(plan)):
            right = rng.randint(0, max(0, span.logits - 1))
            drafted = list(plan.tokens[start + span.rows - span.logits + 1 :][:right])
            sampled.append([*drafted, rng.randrange(3)] if span.logits else [])
        for sequence in one.advance(plan, sampled):
            assert len(sequence.tokens) >= sequence.prompt + 700
            ended += 1
    assert ended == len(lengths)
    assert one.available == 3 * blocks_of_window(window, rows)


def _starts(plan: Plan) -> list[int]:
    return [sum(span.rows for span in plan.spans[:i]) for i in range(len(plan.spans))]


def test_a_window_takes_no_more_blocks_however_long_the_text() -> None:
    one = scheduler(64, 16, 1)
    assert one.capacity == UNBOUNDED
    sequence = one.submit(Request([7] * 3000, 2000), 0.0)
    seen: set[int] = set()
    while (plan := one.plan(0.0)) is not None:
        seen |= set(plan.blocks)
        one.advance(plan, [[7] * span.logits for span in plan.spans])
    assert len(sequence.tokens) == 5000 and len(seen) == blocks_of_window(64, 16)


def test_nothing_is_shared_in_a_window() -> None:
    blocks = Blocks(20, most=5)
    one, other = (
        Sequence(i, [1] * 300, 300, 10**6, b"", 0.0, [], None, position=0) for i in range(2)
    )
    assert blocks.begin(one, blocks.find(one), 0)
    blocks.keep(one, 300)
    assert one.blocks == [0, 1, 2, 3, 4] and blocks.grow(one, 8 * BLOCK)
    assert one.blocks == [0, 1, 2, 3, 4, 1, 2, 3]
    assert blocks.find(other).length == 0
    blocks.end(one)
    assert blocks.available == 20


def test_a_cache_smaller_than_the_window_bounds_the_positions() -> None:
    one = Scheduler(blocks=4, max_rows=16, parallel=1, window=1000)
    assert one.capacity == 4 * BLOCK
    with pytest.raises(InputError, match="holds 256 positions"):
        one.submit(Request([1] * 256, 1), 0.0)


def test_on_mlx_a_window_is_no_longer_than_itself() -> None:
    one = Scheduler(
        blocks=blocks_of_window(64, 16), max_rows=16, parallel=1, paged=False, exact=True, window=64
    )
    sequence = one.submit(Request([7] * 3000, 2000), 0.0)
    while (plan := one.plan(0.0)) is not None:
        one.advance(plan, [[7] * span.logits for span in plan.spans])
    assert len(sequence.tokens) == 5000
