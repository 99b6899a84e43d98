"""What the leader decides between two steps, at 32 sequences."""

from __future__ import annotations

import itertools
import random

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmoe.batch.blocks import Blocks
from zmoe.batch.drafts import Drafts
from zmoe.batch.plan import BLOCK
from zmoe.batch.rates import Rates
from zmoe.batch.scheduler import Scheduler
from zmoe.batch.sequence import Request, Sequence

SEQUENCES = 32
VOCABULARY = 152_000
PROMPT = 4_000


def decoding(sequences: int, paged: bool, drafts: int | None) -> Scheduler:
    """A scheduler whose sequences all decode; their prompts have nothing in common."""
    one = Scheduler(blocks=1 << 18, max_rows=512, paged=paged, drafts=drafts, parallel=SEQUENCES)
    draw = random.Random(1)
    for _ in range(sequences):
        one.submit(Request([draw.randrange(VOCABULARY) for _ in range(128)], 10**9), 0.0)
    for _ in range(100):  # far more than the prompts need
        turn(one, itertools.repeat(7))
    return one


def turn(one: Scheduler, tokens: itertools.repeat[int] | itertools.cycle[int]) -> int:
    """One step without the cluster; returns its rows."""
    plan = one.plan(0.0)
    assert plan is not None
    one.advance(plan, [[next(tokens)] if span.logits else [] for span in plan.spans])
    one.rates.took(len(plan.tokens), 0.01 * len(plan.tokens))
    return len(plan.tokens)


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "mlx"])
@pytest.mark.parametrize("drafts", [0, None], ids=["plain", "drafts"])
def test_step(benchmark: BenchmarkFixture, paged: bool, drafts: int | None) -> None:
    """Plan and advance, with the growth of tables and their prefixes."""
    one = decoding(SEQUENCES, paged, drafts)
    draw = random.Random(2)
    tokens = itertools.cycle([draw.randrange(VOCABULARY) for _ in range(9973)])
    assert benchmark(turn, one, tokens) >= SEQUENCES


def test_step_beside_a_prompt(benchmark: BenchmarkFixture) -> None:
    """31 rows and a chunk of a long prompt that never ends."""
    one = decoding(SEQUENCES - 1, True, 0)
    one.submit(Request([7] * 10**7, 1), 0.0)
    turn(one, itertools.repeat(7))
    assert benchmark(turn, one, itertools.repeat(7)) > SEQUENCES


def prompt(number: int = 0) -> Sequence:
    tokens = list(range(PROMPT))
    return Sequence(number, tokens, PROMPT, 10**9, b"", 0.0, [], None)


def test_find_a_cached_prompt(benchmark: BenchmarkFixture) -> None:
    blocks, known = Blocks(1024), prompt()
    assert blocks.begin(known, blocks.find(known), 0)
    blocks.keep(known, PROMPT)
    assert benchmark(blocks.find, prompt()).length == PROMPT // BLOCK * BLOCK


def test_begin_and_end_of_a_cached_prompt(benchmark: BenchmarkFixture) -> None:
    blocks, known = Blocks(1024), prompt()
    assert blocks.begin(known, blocks.find(known), 0)
    blocks.keep(known, PROMPT)
    blocks.end(known)
    found = blocks.find(known)

    def begin_and_end() -> bool:
        begun = blocks.begin(known, found, 0)
        blocks.end(known)
        return begun

    assert benchmark(begin_and_end)
    assert blocks.available == 1024


def test_draft(benchmark: BenchmarkFixture) -> None:
    """One more token in the index, and the lookup of what may follow."""
    draw, drafts, rates = random.Random(3), Drafts(4), Rates()
    tokens = [draw.randrange(50) for _ in range(PROMPT)]
    drafts.propose(tokens, 8, 1, rates)

    def draft() -> list[int]:
        tokens.append(draw.randrange(50))
        return drafts.propose(tokens, 8, 1, rates)

    assert len(benchmark(draft)) in (0, 4)
