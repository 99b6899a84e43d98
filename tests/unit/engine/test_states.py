"""Plans on paged caches of models with recurrent layers: what they keep of each sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.families import build
from tests.unit.engine.test_paged import LONG, SHORT, close, engine_of, expected, run
from zmoe.batch.plan import BLOCK, Fork, Plan, Span
from zmoe.batch.states import most_snapshots
from zmoe.cli.plan.known_hardware import MACHINES
from zmoe.engine.base import Floats
from zmoe.engine.paged import MOST_REPEATED, PagedEngine
from zmoe.errors import ZmoeError
from zmoe.perf.cost import Cluster
from zmoe.perf.memory import node_bytes
from zmoe.perf.model_config import read_shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3_next", tmp_path_factory.mktemp("model"))


def alone(folder: Path, *spans: Span) -> list[Floats]:
    """The logits of LONG in a run of its own, through other blocks."""
    engine, out = engine_of(folder), []
    for span in spans:
        blocks = (2, 4, 6)[span.position // 64 + (span.position % 64 > 0) : (span.end + 63) // 64]
        found = run(engine, span, tokens=LONG[span.position : span.end], blocks=blocks)
        assert found is not None
        out.append(found)
    return out


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_sequences_together_are_as_alone_in_mlx_lm(family: str, tmp_path: Path) -> None:
    """In chunks, decoding beside: as in mlx-lm, and the same to the bit as without the others."""
    folder = build(family, tmp_path)
    engine, long, short = engine_of(folder), expected(folder, LONG), expected(folder, SHORT)
    assert engine.state_bytes > 0 and not engine.can_trim
    spans = Span(7, 0, 100, 2), Span(3, 0, 10, 0)
    first = run(engine, *spans, tokens=(*LONG[:100], *SHORT[:10]), blocks=(5, 1, 8))
    spans = Span(3, 10, 1, 1), Span(7, 100, 49, 1), Span(9, 0, 20, 20)
    tokens = (SHORT[10], *LONG[100:149], *SHORT)
    second = run(engine, *spans, tokens=tokens, blocks=(0, 3))
    third = run(engine, Span(7, 149, 1, 1), Span(3, 11, 1, 1), tokens=(LONG[149], SHORT[11]))
    assert first is not None and second is not None and third is not None
    assert close(first, long[98:100])
    assert close(second, np.concatenate([short[10:11], long[148:149], short]))
    assert close(third, np.stack([long[149], short[11]]))
    same = alone(folder, Span(1, 0, 149, 1), Span(1, 149, 1, 1))
    assert (second[1:2] == same[0]).all() and (third[:1] == same[1]).all()


def test_steps_are_undone(folder: Path) -> None:
    """Of the two last steps the states before are there, whatever was computed since."""
    engine = engine_of(folder)
    steps = [
        Plan(1, (Span(0, 0, 70, 1),), LONG[:70], (4, 2)),
        Plan(2, (Span(0, 70, 1, 1), Span(1, 0, 5, 1)), (LONG[70], *SHORT[:5]), (7,)),
        Plan(3, (Span(1, 5, 1, 1), Span(0, 71, 1, 1)), (SHORT[5], LONG[71])),
    ]
    first = [engine.run(plan) for plan in steps]
    for last in (2, 1, 1, 2):
        engine.undo(last)
        other = Plan(last + 1, (Span(0, 69 + last, 2, 1),), (9, 9))
        engine.run(other)
        engine.undo(last)
        for number in range(last + 1, 4):
            assert (engine.run(steps[number - 1]) == first[number - 1]).all()  # type: ignore[union-attr]
    assert len(engine._states) <= 8


def test_a_sequence_begins_with_the_state_of_another(folder: Path) -> None:
    """The snapshot stays as it is, whoever begins with it; going back to a step is going on."""
    engine, want = engine_of(folder), alone(folder, Span(1, 0, 128, 1), Span(1, 128, 2, 1))
    run(engine, Span(0, 0, 128, 1), tokens=LONG[:128], blocks=(4, 2))
    span = Span(0, 128, 2, 1)
    got = run(engine, span, tokens=LONG[128:130], blocks=(9,), forks=(Fork(5, 0, 128),))
    assert (got == want[1]).all()
    for number in (1, 2):
        span, fork = Span(number, 128, 2, 1), Fork(number, 5, 128)
        tokens, blocks = LONG[128:130], (4, 2, 9 + number)
        again = run(engine, span, tokens=tokens, blocks=blocks, forks=(fork,))
        assert (again == got).all()
        run(engine, Span(number, 130, 3, 0), tokens=(1, 2, 3))
    # Drafts were wrong, and again: the last step is computed anew, up to where they were right.
    for _ in range(3):
        run(engine, Span(2, 130, 4, 0), tokens=(*LONG[130:132], 7, 8))
    plan = Plan(9, (Span(2, 130, 2, 2),), LONG[130:132], free=(5,))
    for _ in range(2):
        again = engine.run(plan)
        assert close(again, expected(folder, LONG[:132])[130:])
        engine.undo(8)


ROW = Plan(9, (Span(0, 20, 1, 1),), (1,))
BAD = {
    "a plan goes on with sequence 0 from position 19: this node has no": replace(
        ROW, spans=(Span(0, 19, 1, 1),)
    ),
    "a plan goes on with sequence 1 from position 20: this node has no": replace(
        ROW, spans=(Span(1, 20, 1, 1),), blocks=(3,)
    ),
    "a plan goes on with sequence 0 from position 12: this node has no": replace(
        ROW, forks=(Fork(1, 0, 12),)
    ),
    "a plan goes on with sequence 7 from position 20: this node has no": replace(
        ROW, forks=(Fork(1, 7, 20),)
    ),
    "a plan forks sequence 0 into one that there is already": replace(ROW, forks=(Fork(0, 0, 20),)),
}


def test_a_plan_that_does_not_fit_changes_nothing(folder: Path) -> None:
    engine = engine_of(folder)
    run(engine, Span(0, 0, 12, 0), tokens=LONG[:12], blocks=(4,))
    run(engine, Span(0, 12, 5, 0), tokens=LONG[12:17])
    run(engine, Span(0, 17, 3, 0), tokens=LONG[17:20])
    for message, plan in BAD.items():
        with pytest.raises(ZmoeError, match=message):
            engine.run(plan)
    got = run(engine, Span(0, 20, 1, 1), tokens=LONG[20:21])
    assert close(got, expected(folder, LONG[:21])[-1:])


def test_memory_is_used_again(folder: Path) -> None:
    """Four states for each sequence that runs, and one for each that does not."""
    engine: PagedEngine = engine_of(folder)
    run(engine, Span(0, 0, 3, 0), Span(1, 0, 2, 0), tokens=LONG[:5], blocks=(0, 1))
    for at in range(3, 40):
        run(engine, Span(0, at, 1, 0), Span(1, at - 1, 1, 0), tokens=LONG[:2])
    assert len(engine._states) == 8
    run(engine, Span(0, 40, 1, 0), tokens=LONG[:1], free=(1,), forks=(Fork(2, 0, 40),))
    for at in range(41, 60):
        run(engine, Span(0, at, 1, 0), tokens=LONG[:1])
    assert len(engine._states) == 8


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_the_planner_counts_what_is_allocated(family: str, tmp_path: Path) -> None:
    """From the config alone: keys and values of the layers that have them, states of the others."""
    folder = build(family, tmp_path, "bfloat16")
    engine, shape = engine_of(folder), read_shape(folder / "config.json", family)
    assert shape.cache_bytes(BLOCK) == engine.block_bytes
    assert shape.state_bytes == engine.state_bytes > 0
    one, three = (
        node_bytes(shape, Cluster((MACHINES["m2-ultra"],), None), [0], sequences, BLOCK)[0]
        for sequences in (1, 3)
    )
    states = 2 * (2 + MOST_REPEATED) + most_snapshots(3) - most_snapshots(1)
    assert three - one == 2 * engine.block_bytes + states * engine.state_bytes
