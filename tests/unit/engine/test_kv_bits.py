"""Keys and values in 8 bits, against the same engine with those of the model's dtype."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.families import EXPERTS, VOCAB, build
from tests.ranks import round_robin
from zmoe.batch.plan import Copy, Plan, Span, blocks_of
from zmoe.config import EngineConfig
from zmoe.engine.base import Engine, Floats
from zmoe.engine.engine import make_engine
from zmoe.exchange.local import SingleNode
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.obs import Spans

BLOCKS = 12
LONG, SHORT = (
    tuple(np.random.default_rng(seed).integers(0, VOCAB, count).tolist())
    for seed, count in ((1, 150), (2, 20))
)


def engine_of(folder: Path, kv_bits: int | None) -> Engine:
    info, reducer, pool = describe(Skeleton(folder)), SingleNode(), ThreadPool(2)
    placement = round_robin(1, EXPERTS, len(info.moe_layers))
    shard = load_shard(info, placement, reducer, spans=Spans(), pool=pool)
    assert shard.paged is not None
    config = EngineConfig(kv_bits=kv_bits)
    engine = make_engine(shard.model, reducer, config, shard.head, shard.paged)
    engine.make_cache(BLOCKS)
    return engine


def run(
    engine: Engine,
    *spans: Span,
    tokens: tuple[int, ...],
    blocks: tuple[int, ...] = (),
    copies: tuple[Copy, ...] = (),
) -> Floats:
    logits = engine.run(Plan(1, spans, tokens, blocks, copies=copies))
    assert logits is not None
    return logits


def logits_of_all(engine: Engine) -> Floats:
    count = len(LONG)
    blocks = tuple(range(blocks_of(count)))
    return run(engine, Span(1, 0, count, count), tokens=LONG, blocks=blocks)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss", "dbrx"])
def test_logits_are_near_those_of_the_models_dtype(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path)
    want, got = (logits_of_all(engine_of(folder, bits)) for bits in (None, 8))
    errors = np.abs(got - want).max(axis=1) / np.abs(want).max()
    assert 0 < np.median(errors) < 0.03  # in a few rows the router chooses other experts


def test_a_row_is_the_same_however_its_sequence_is_run(tmp_path: Path) -> None:
    engine = engine_of(build("qwen3_moe", tmp_path), 8)
    want = logits_of_all(engine)
    got = [run(engine, Span(2, 0, 1, 1), tokens=LONG[:1], blocks=(7,))]
    got += [run(engine, Span(2, at, 1, 1), tokens=LONG[at : at + 1]) for at in range(1, 30)]
    beside = Span(3, 0, 20, 0)
    got.append(
        run(
            engine,
            beside,
            Span(2, 30, 61, 61),
            tokens=(*SHORT, *LONG[30:91]),
            blocks=(9, 4),
        )
    )
    got.append(run(engine, Span(2, 91, 59, 59), tokens=LONG[91:], blocks=(11,)))
    assert (np.concatenate(got) == want).all()


def test_a_copy_of_a_block_has_its_scales(tmp_path: Path) -> None:
    engine = engine_of(build("qwen3_moe", tmp_path), 8)
    want = logits_of_all(engine)
    run(engine, Span(2, 0, 1, 1), tokens=LONG[:1], blocks=(8,), copies=(Copy(7, 0), Copy(8, 7)))
    got = run(engine, Span(2, 1, 50, 50), tokens=LONG[1:51])
    assert (got == want[1:51]).all()


def test_a_block_holds_a_byte_per_element_and_two_scales_per_head(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    elements, scales = 2 * 64 * heads * config["head_dim"], 2 * 64 * heads
    assert engine_of(folder, None).block_bytes == 4 * elements
    assert engine_of(folder, 8).block_bytes == elements + 4 * scales
