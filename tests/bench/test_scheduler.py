"""How long a step of 32 sequences takes to be planned, sent and taken in."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmoe.batch.blocks import Blocks
from zmoe.batch.drafts import Drafts
from zmoe.batch.plan import BLOCK, Plan
from zmoe.batch.rates import Rates
from zmoe.batch.scheduler import Scheduler
from zmoe.batch.sequence import Request, Sequence
from zmoe.cluster.messages import Step, decode, encode

SEQUENCES = 32
PROMPT = 128
STEPS = 200  # of a measurement: some blocks are filled, and others begun
ENOUGH = 1000  # tokens, so that no sequence ends meanwhile
LONG = 4000  # tokens
VOCABULARY = 151_936


def prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(VOCABULARY, size=length)]


def tokens_of(plan: Plan) -> list[list[int]]:
    return [[7 * span.position % VOCABULARY] if span.logits else [] for span in plan.spans]


def decoding() -> Scheduler:
    """A scheduler of 32 sequences whose prompts are done."""
    scheduler = Scheduler(blocks=4096, max_rows=512, parallel=SEQUENCES)
    for number in range(SEQUENCES):
        scheduler.submit(Request(prompt(number, PROMPT), ENOUGH), 0.0)
    while True:
        plan = scheduler.plan(0.0)
        assert plan is not None
        scheduler.advance(plan, tokens_of(plan))
        if len(plan.spans) == len(plan.tokens) == SEQUENCES:
            return scheduler


def test_plan(benchmark: BenchmarkFixture) -> None:
    scheduler = decoding()
    plans: list[Plan] = []

    def advance() -> None:
        for plan in plans[-1:]:
            scheduler.advance(plan, tokens_of(plan))

    def plan_step() -> None:
        planned = scheduler.plan(0.0)
        assert planned is not None
        plans.append(planned)

    benchmark.pedantic(plan_step, setup=advance, rounds=STEPS)
    assert all(len(plan.spans) == SEQUENCES for plan in plans)


def test_advance(benchmark: BenchmarkFixture) -> None:
    scheduler = decoding()

    def next_step() -> tuple[tuple[Plan, list[list[int]]], dict[str, object]]:
        plan = scheduler.plan(0.0)
        assert plan is not None
        return (plan, tokens_of(plan)), {}

    benchmark.pedantic(scheduler.advance, setup=next_step, rounds=STEPS)
    assert scheduler.running == SEQUENCES


def test_message(benchmark: BenchmarkFixture) -> None:
    """From the leader's plan to the worker's."""
    plan = decoding().plan(0.0)
    assert plan is not None
    assert benchmark(lambda: decode(encode(Step(plan)))) == Step(plan)


def sequence(number: int, tokens: list[int]) -> Sequence:
    return Sequence(
        id=number,
        tokens=tokens,
        prompt=len(tokens),
        limit=len(tokens) + 1,
        salt=b"",
        submitted=0.0,
        borders=[],
        drafts=None,
    )


@pytest.mark.parametrize("known", ["hit", "miss"])
def test_blocks_of_a_long_prompt(benchmark: BenchmarkFixture, known: str) -> None:
    """Look for its beginning, take blocks, let others find them, and give them back."""
    tokens, blocks, begun = prompt(0, LONG), Blocks(4096), 0

    def turn() -> int:
        nonlocal begun
        begun += 1
        each = sequence(begun, tokens if known == "hit" else [begun, *tokens[1:]])
        found = blocks.find(each)
        blocks.begin(each, found, reserve=0)
        blocks.keep(each, LONG)
        blocks.end(each)
        return found.length

    turn()
    assert benchmark(turn) == (LONG // BLOCK * BLOCK if known == "hit" else 0)
    assert blocks.available == blocks.count


def test_draft(benchmark: BenchmarkFixture) -> None:
    """Prompt lookup in a long text that grows by a token per step."""
    text, drafts, rates = prompt(0, LONG) * 2, Drafts(4), Rates()
    drafts.propose(text, 4, 1, rates)

    def turn() -> list[int]:
        text.append(text[len(text) - LONG])
        return drafts.propose(text, 4, 1, rates)

    draft = benchmark(turn)
    after = len(text) - LONG
    assert draft == text[after : after + 4]
