"""Shapes of the table against what their makers publish."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zmoe.cli.plan.known_models import MODELS, PUBLISHED
from zmoe.perf.shape import BF16, MXFP4, GroupedAttention, LatentAttention, affine


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_are_the_published_ones(name: str) -> None:
    shape, (total, active) = MODELS[name], PUBLISHED[name]
    assert shape.name == name
    rounding = 0.03 if name == "kimi-k2" else 0.01  # "1T"
    assert shape.parameters / 1e9 == pytest.approx(total, rel=rounding)
    with_embedding = shape.active_parameters + shape.head_parameters
    nearest = min((shape.active_parameters, with_embedding), key=lambda n: abs(n / 1e9 - active))
    assert nearest / 1e9 == pytest.approx(active, rel=0.07)


def test_dbrx_as_the_paper_gives_it() -> None:
    dbrx = MODELS["dbrx"]
    assert dbrx.expert_parameters == 3 * 6144 * 10752
    assert dbrx.expert_bytes == pytest.approx(396e6, rel=0.001)
    assert dbrx.attention_parameters == 6144 * (6144 + 2 * 8 * 128) + 6144 * 6144


def test_latent_attention() -> None:
    v3 = MODELS["deepseek-v3"].attention
    assert isinstance(v3, LatentAttention)
    by_hand = (
        7168 * 1536  # query down
        + 1536 * 128 * 192  # query up
        + 7168 * 576  # latent and position
        + 512 * 128 * 256  # keys and values up
        + 128 * 128 * 7168  # output
    )
    assert v3.parameters(7168) == by_hand
    assert v3.cache_elements == 576
    without_rank = LatentAttention(16, 0, 512, 128, 64, 128)
    assert without_rank.parameters(2048) - without_rank.parameters(0) == 2048 * (
        16 * 192 + 576 + 16 * 128
    )


def test_windowed_layers_look_back_less() -> None:
    attention = GroupedAttention(64, 8, 64, window=128, windowed_layers=18)
    assert attention.attended(4096, 36) == (4096 + 128) / 2
    assert attention.attended(100, 36) == 100


def test_formats_count_scales_and_biases() -> None:
    assert BF16.bytes(10) == 20
    assert affine(4).bits_per_weight == 4.5
    assert affine(4, 32).bits_per_weight == 5
    assert affine(32).bits_per_weight == 32
    assert MXFP4.bits_per_weight == 4.25


def test_fewer_bits_are_fewer_bytes() -> None:
    dbrx = MODELS["dbrx"]
    sizes = [dbrx.with_format(affine(bits)).dense_bytes for bits in (2, 3, 4, 6, 8, 16)]
    assert sizes == sorted(sizes)


def test_a_tied_head_is_read_but_not_stored_twice() -> None:
    dbrx = MODELS["dbrx"]
    tied = replace(dbrx, tied=True)
    assert dbrx.parameters - tied.parameters == dbrx.head_parameters
    assert dbrx.active_parameters == tied.active_parameters


def test_the_cache_grows_with_the_context() -> None:
    dbrx = MODELS["dbrx"]
    assert dbrx.cache_bytes(2) == 2 * 40 * 2 * 8 * 128 * 2
