"""A model that is only described."""

from __future__ import annotations

from zmoe.placement.types import ModelInfo


def described(
    experts: int = 16,
    layers: int = 4,
    *,
    hidden: int = 256,
    slice_alignment: int = 64,
    **others: int,
) -> ModelInfo:
    """`layers` MoE layers of `experts`, each `hidden` wide, cut at multiples of the alignment."""
    sizes = {
        "top_k": 4,
        "expert_parameters": 1 << 19,
        "expert_bytes": 1 << 20,
        "dense_bytes": 10 << 20,
        **others,
    }
    return ModelInfo(
        path="some/model",
        model_type="dbrx",
        fingerprint="f00d",
        dtype="float32",
        quantization="none",
        layers=layers,
        moe_layers=tuple(range(layers)),
        experts=experts,
        hidden_size=128,
        moe_intermediate_size=hidden,
        slice_alignment=slice_alignment,
        exchange_width=128,
        vocabulary=64,
        context_length=None,
        **sizes,
    )
