"""Plans on paged caches: what they refuse, and each sequence as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from tests.families import EXPERTS, build
from tests.ranks import Meeting, ThreadReducer, round_robin
from zmoe.batch.plan import Copy, Fork, Plan, Span, blocks_of, check
from zmoe.engine.base import Floats
from zmoe.engine.paged import PagedEngine
from zmoe.errors import ZmoeError
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.obs import Spans

BLOCKS = 12
VOCABULARY = 96


def engine_of(folder: Path, max_kv_size: int | None = None) -> PagedEngine:
    info = describe(Skeleton(folder))
    placement = round_robin(1, EXPERTS, len(info.moe_layers))
    reducer = ThreadReducer(0, Meeting(1))
    shard = load_shard(info, placement, reducer, spans=Spans(), pool=ThreadPool(2))
    assert shard.paged is not None
    shard.paged.limit(max_kv_size)
    engine = PagedEngine(shard.paged, reducer)
    engine.make_cache(BLOCKS)
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> PagedEngine:
    return engine_of(folder)


def prompt(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist())


def run(
    engine: PagedEngine, *spans: Span, tokens: tuple[int, ...], **more: object
) -> Floats | None:
    plan = replace(Plan(0, spans, tokens), **more)  # type: ignore[arg-type]
    check(plan, len(tokens), VOCABULARY)
    return engine.run(plan)


def close(got: Floats | None, want: Floats) -> bool:
    assert got is not None
    return bool(np.abs(got - want).max() <= 1e-5 * np.abs(want).max())


LONG, SHORT = prompt(150, 1), prompt(20, 2)


def expected(folder: Path, tokens: tuple[int, ...]) -> Floats:
    """mlx-lm's logits of all rows."""
    out: Floats = np.array(load_model(folder)[0](mx.array([tokens]))[0].astype(mx.float32))
    return out


def test_sequences_together_are_as_alone_in_mlx_lm(engine: PagedEngine, folder: Path) -> None:
    """Two prompts in chunks through shuffled blocks, decoding beside, logits of some rows."""
    long, short = expected(folder, LONG), expected(folder, SHORT)
    got = run(
        engine,
        Span(7, 0, 100, 2),
        Span(3, 0, 10, 0),
        tokens=(*LONG[:100], *SHORT[:10]),
        blocks=(5, 1, 8),
    )
    assert close(got, long[98:100])
    got = run(
        engine,
        Span(3, 10, 1, 1),
        Span(7, 100, 49, 0),
        Span(9, 0, 20, 20),
        tokens=(SHORT[10], *LONG[100:149], *SHORT),
        blocks=(0, 3),
    )
    assert close(got, np.concatenate([short[10:11], short]))
    got = run(engine, Span(7, 149, 1, 1), Span(3, 11, 1, 1), tokens=(LONG[149], SHORT[11]))
    assert close(got, np.stack([long[149], short[11]]))
    assert run(engine, Span(9, 19, 1, 0), tokens=SHORT[-1:]) is None


def test_what_lies_beyond_a_position_is_dropped(engine: PagedEngine, folder: Path) -> None:
    run(engine, Span(0, 0, 20, 0), tokens=prompt(20, 5), blocks=(4,))
    run(engine, Span(0, 0, 80, 0), tokens=(*LONG[:70], *prompt(10, 6)), blocks=(2,))
    got = run(engine, Span(0, 70, 3, 3), tokens=LONG[70:73])
    assert close(got, expected(folder, LONG[:73])[70:])


def test_a_prefix_is_shared_and_a_copy_goes_its_own_way(engine: PagedEngine, folder: Path) -> None:
    run(engine, Span(0, 0, 100, 0), tokens=LONG[:100], blocks=(4, 2))
    other = (*LONG[:70], *prompt(5, 8))
    got = run(
        engine,
        Span(1, 70, 5, 5),
        Span(0, 100, 1, 1),
        tokens=(*other[70:], LONG[100]),
        copies=(Copy(9, 2),),
        blocks=(4, 9),
    )
    want = [expected(folder, other)[70:], expected(folder, LONG[:101])[100:]]
    assert close(got, np.concatenate(want))


def test_an_ended_sequence_starts_anew(engine: PagedEngine, folder: Path) -> None:
    run(engine, Span(0, 0, 20, 0), tokens=LONG[:20], blocks=(4,))
    got = run(engine, Span(0, 0, 20, 1), tokens=SHORT, blocks=(4,), free=(0,))
    assert close(got, expected(folder, SHORT)[-1:])


def test_a_new_cache_holds_no_sequence(engine: PagedEngine, folder: Path) -> None:
    run(engine, Span(0, 0, 20, 0), tokens=LONG[:20], blocks=(4,))
    engine.make_cache(2 * BLOCKS)
    with pytest.raises(ZmoeError, match="a plan brings 0 blocks: its spans lack 1"):
        run(engine, Span(0, 20, 1, 1), tokens=LONG[20:21])
    got = run(engine, Span(0, 0, 20, 1), tokens=SHORT, blocks=(2 * BLOCKS - 1,))
    assert close(got, expected(folder, SHORT)[-1:])


def test_who_needs_no_logits_gets_none(engine: PagedEngine, folder: Path) -> None:
    plan = Plan(1, (Span(0, 0, 20, 1),), SHORT, (4,))
    assert engine.run(plan, logits=False) is None
    got = run(engine, Span(0, 19, 1, 1), tokens=SHORT[19:])
    assert close(got, expected(folder, SHORT)[-1:])


def test_a_window_uses_its_blocks_again(folder: Path) -> None:
    """The same logits as with a block for every 64 positions, in blocks for the window alone."""
    window, chunk, ring, length = 100, 30, 5, 0
    reused, whole = (engine_of(folder, window) for _ in range(2))
    whole.make_cache(64)
    for turn, rows in enumerate([7, 1, chunk] * 60):
        tokens, span = prompt(rows, turn), Span(0, length, rows, 1)
        new = range(blocks_of(length), blocks_of(span.end))
        length = span.end
        blocks = tuple(block and 1 + (block - 1) % ring for block in new)  # the first one stays
        got = run(reused, span, tokens=tokens, blocks=blocks)
        want = run(whole, span, tokens=tokens, blocks=tuple(new))
        assert got is not None and (got == want).all()
    assert length > 5 * 64 * ring


def test_bytes_per_block(engine: PagedEngine, folder: Path) -> None:
    args = load_model(folder)[0].args
    per_position = 2 * args.num_key_value_heads * args.head_dim * 4
    assert engine.block_bytes == 64 * args.num_hidden_layers * per_position


ROW = Plan(0, (Span(0, 20, 1, 1),), (1,))
BAD = {
    "a plan with a block outside of 0 to 11": replace(ROW, blocks=(BLOCKS,)),
    "a plan with a block outside of 0 to 11$": replace(ROW, copies=(Copy(0, -1),)),
    "a plan forks sequence 0: paged caches": replace(ROW, forks=(Fork(1, 0, 5),)),
    "a plan ends sequence 4, which this node": replace(ROW, free=(4,)),
    "a plan runs sequence 0 from position 21: this node holds 20": replace(
        ROW, spans=(Span(0, 21, 1, 1),)
    ),
    "a plan brings 1 blocks: its spans lack 0": replace(ROW, blocks=(1,)),
    "a plan brings 0 blocks: its spans lack 1": replace(ROW, spans=(Span(1, 0, 1, 1),)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_plan_that_does_not_fit_changes_nothing(
    message: str, engine: PagedEngine, folder: Path
) -> None:
    run(engine, Span(0, 0, 20, 0), tokens=LONG[:20], blocks=(4,))
    with pytest.raises(ZmoeError, match=message):
        engine.run(BAD[message])
    got = run(engine, Span(0, 20, 1, 1), tokens=LONG[20:21])
    assert close(got, expected(folder, LONG[:21])[-1:])
