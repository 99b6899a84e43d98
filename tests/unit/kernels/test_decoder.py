"""csrc/kernels/decoder.h against the modules of mlx-lm, in float32 and one process.

tests/c/test_decoder.c and test_attention.c go into sizes, types and threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from tests.families import FAMILIES, random_model
from zmoe import native
from zmoe.families import routers

F32 = npt.NDArray[np.float32]
TOLERANCE = 1e-5
ffi = native.ffi
lib: Any = native.lib  # the declarations of decoder.h are not in zmoe/_native.pyi


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """MLX would compile each router with the C compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@dataclass
class Structs:
    """Makes C structs, and keeps alive what they point to."""

    kept: list[Any] = field(default_factory=list)

    def keep(self, value: Any) -> Any:
        self.kept.append(value)
        return value

    def floats(self, array: mx.array | F32 | None) -> Any:
        if array is None:
            return ffi.NULL
        data = self.keep(np.ascontiguousarray(np.array(array), np.float32))
        return self.keep(ffi.from_buffer("float[]", data))

    def weight(self, linear: Any) -> Any:
        out_features, in_features = linear.weight.shape
        return self.keep(
            ffi.new(
                "zmoe_weight *",
                {
                    "data": self.floats(linear.weight),
                    "bias": self.floats(linear.get("bias")),
                    "out_features": out_features,
                    "in_features": in_features,
                },
            )
        )

    def norm(self, norm: Any) -> Any:
        if norm is None:
            return ffi.new("zmoe_norm *")[0]
        kind = lib.ZMOE_NORM_LAYER if isinstance(norm, nn.LayerNorm) else lib.ZMOE_NORM_RMS
        return self.keep(
            ffi.new(
                "zmoe_norm *",
                {
                    "kind": kind,
                    "width": norm.weight.shape[0],
                    "eps": norm.eps,
                    "weight": self.floats(norm.weight),
                    "bias": self.floats(norm.get("bias")),
                },
            )
        )[0]


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    out = ffi.new("zmoe_thread_pool **")
    assert lib.zmoe_thread_pool_create(request.param, ffi.NULL, 50, lib.zmoe_isa_best(), out) == 0
    assert lib.zmoe_thread_pool_reserve(out[0], 64 << 20) == 0
    yield out[0]
    lib.zmoe_thread_pool_destroy(out[0])


def close(ours: F32, theirs: mx.array) -> bool:
    expected = np.array(theirs).reshape(ours.shape)
    return float(np.abs(ours - expected).max()) <= TOLERANCE * float(np.abs(expected).max())


# ---- attention ----------------------------------------------------------------------


def block_of(model: Any) -> tuple[Any, Any]:
    """The input norm and the attention of the first layer."""
    if model.model_type == "dbrx":
        first = model.transformer.blocks[0].norm_attn_norm
        return first.norm_1, first.attn
    return model.model.layers[0].input_layernorm, model.model.layers[0].self_attn


def describe(norm: Any, attention: Any, window: int, structs: Structs) -> Any:
    """The zmoe_attention of a module of mlx-lm."""
    fused = "Wqkv" in attention
    names = ["Wqkv"] if fused else ["q_proj", "k_proj", "v_proj"]
    weights = [structs.weight(attention[name]) for name in names]
    output = structs.weight(attention["out_proj" if fused else "o_proj"])
    head_dim = attention.rope.dims if not hasattr(attention, "head_dim") else attention.head_dim
    if "q_norm" in attention and attention.q_norm.weight.shape[0] < output.in_features:
        head_dim = attention.q_norm.weight.shape[0]  # glm4_moe rotates a part of it
    heads = output.in_features // head_dim
    kv_outs = sum(weight.out_features for weight in weights) - output.in_features
    return structs.keep(
        ffi.new(
            "zmoe_attention *",
            {
                "input": structs.norm(norm),
                "projections": structs.keep(
                    ffi.new("zmoe_weight[]", [weight[0] for weight in weights])
                ),
                "n_projections": len(weights),
                "output": output,
                "query_norm": structs.norm(attention.get("q_norm")),
                "key_norm": structs.norm(attention.get("k_norm")),
                "heads": heads,
                "kv_heads": kv_outs // 2 // head_dim,
                "head_dim": head_dim,
                "scale": head_dim**-0.5,
                "clip": getattr(attention, "clip_qkv", 0.0),
                "rope_dims": attention.rope.dims,
                "rope_traditional": attention.rope.traditional,
                "sinks": structs.floats(attention.get("sinks")),
                "window": window,
                "dtype": native.Dtype.F32,
            },
        )
    )


def angles(rope: Any, first: int, rows: int) -> tuple[F32, F32]:
    """Cosines and sines (rows, dims / 2) of positions from `first` on, scaled as YaRN has it."""
    if isinstance(rope, nn.RoPE):
        periods = rope.base ** (np.arange(0, rope.dims, 2) / rope.dims)
    else:
        periods = np.array(rope._freqs, np.float64)
    turns = np.arange(first, first + rows)[:, None] / periods
    scale = getattr(rope, "mscale", 1.0)
    return (scale * np.cos(turns)).astype(np.float32), (scale * np.sin(turns)).astype(np.float32)


class Attention:
    """The C attention of a module of mlx-lm, with a cache of its own, its blocks shuffled."""

    def __init__(self, pool: Any, norm: Any, module: Any, window: int) -> None:
        self.pool, self.rope, self.structs = pool, module.rope, Structs()
        self.struct = describe(norm, module, window, self.structs)
        self.blocks, self.length = np.array([2, 0, 1], np.uint32), 0
        size = self.struct.kv_heads * self.blocks.size * 64 * self.struct.head_dim
        keys, values = (self.structs.keep(np.full(size, np.nan, np.float32)) for _ in range(2))
        self.cache = ffi.new(
            "zmoe_kv_cache *",
            {"keys": ffi.from_buffer(keys), "values": ffi.from_buffer(values), "blocks": 3},
        )

    def __call__(self, x: mx.array) -> F32:
        h = np.array(x[0])
        table = ffi.from_buffer("uint32_t[]", self.blocks)
        span = ffi.new("zmoe_span *", {"blocks": table, "n_blocks": 3, "rows": len(h)})
        span.position = self.length
        self.length += len(h)
        cosines, sines = angles(self.rope, 0, self.length)
        status = lib.zmoe_attention_step(
            self.pool,
            self.struct,
            self.cache,
            span,
            1,
            ffi.from_buffer("float[]", cosines),
            ffi.from_buffer("float[]", sines),
            ffi.from_buffer("float[]", h),
            lib.ZMOE_EXACT,
        )
        assert status == native.Status.OK
        return h


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", {}),
    "traditional": ("mixtral", {"rope_traditional": True, "num_attention_heads": 2}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "olmoe_grouped": ("olmoe", {"attention_bias": True}),
    "dbrx": ("dbrx", {"attn_config": {"kv_n_heads": 1, "clip_qkv": 1.5, "rope_theta": 1e4}}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss_yarn": ("gpt_oss", {"sliding_window": 5, "rope_scaling": YARN}),
    "qwen2_moe": ("qwen2_moe", {}),
    "glm4_moe": ("glm4_moe", {"attention_bias": True}),
}


def model_of(family: str, changes: dict[str, Any]) -> Any:
    return random_model({**copy.deepcopy(FAMILIES[family].config), **changes}, seed=3)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_mlx_lm(case: str, pool: Any) -> None:
    """A prefill of many rows, single steps, and a chunk of a few."""
    family, changes = CASES[case]
    model = model_of(family, changes)
    norm, module = block_of(model)
    window = model.args.sliding_window if family == "gpt_oss" else 0
    ours, cache = Attention(pool, norm, module, window), KVCache()
    for rows in (20, 1, 1, 7, 1, 70, 1):
        x = 2 * mx.random.normal((1, rows, norm.weight.shape[0]))
        mask = create_attention_mask(x, cache, window_size=window or None)
        added = module(norm(x), mask, cache)
        assert close(ours(x) - np.array(x[0]), added), f"{rows} rows after {cache.offset - rows}"
    assert ours.length == cache.offset


# ---- routers --------------------------------------------------------------------------

Route = Callable[[mx.array], tuple[mx.array, mx.array]]
EXPERTS, TOP_K, WIDTH = 24, 5, 48


def check_route(pool: Any, expected: Route, x: mx.array, structs: Structs, **router: Any) -> None:
    """The same experts with the same weights, in whatever order; ours best first."""
    rows, k = x.shape[0], router["top_k"]
    ids, weights = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    out = np.empty(x.shape, np.float32)
    status = lib.zmoe_route(
        pool,
        ffi.new("zmoe_router *", router),
        structs.floats(x),
        rows,
        ffi.from_buffer(out),
        native.Dtype.F32,
        ffi.from_buffer("int32_t[]", ids),
        ffi.from_buffer("float[]", weights),
    )
    assert status == native.Status.OK
    their_ids, their_weights = (np.array(part).reshape(rows, k) for part in expected(x))
    order = np.argsort(their_ids, axis=-1)
    np.testing.assert_array_equal(np.sort(ids), np.take_along_axis(their_ids, order, -1))
    mine = np.take_along_axis(weights, np.argsort(ids, axis=-1), -1)
    assert close(mine, mx.array(np.take_along_axis(their_weights, order, -1)))


@pytest.mark.parametrize("rows", [1, 9])
def test_routers_are_those_of_the_adapters(rows: int, pool: Any) -> None:
    structs = Structs()
    gate, norm = nn.Linear(WIDTH, EXPERTS), nn.RMSNorm(WIDTH)
    x = mx.random.normal((rows, WIDTH))

    def logits(h: mx.array) -> mx.array:
        return 3 * gate(norm(h))

    scaled = nn.Linear(WIDTH, EXPERTS)
    scaled.update({"weight": 3 * gate.weight, "bias": 3 * gate.bias})
    common = {"input": structs.norm(norm), "gate": structs.weight(scaled), "top_k": TOP_K}

    def check(expected: Route, **router: Any) -> None:
        check_route(pool, expected, x, structs, **common, **router)

    for normalize in (False, True):
        check(
            lambda h, norm=normalize: routers.softmax_then_top_k(logits(h), TOP_K, norm),
            kind=lib.ZMOE_SOFTMAX_TOP_K,
            normalize=normalize,
        )
    check(lambda h: routers.top_k_then_softmax(logits(h), TOP_K), kind=lib.ZMOE_TOP_K_SOFTMAX)
