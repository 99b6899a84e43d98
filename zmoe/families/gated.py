"""Adapters of pattern A: a router submodule returns the ids and the weights."""

from __future__ import annotations

import mlx.core as mx

from zmoe.families.routers import by_gate, by_router, shared_experts
from zmoe.moe.adapter import Adapter, Block, Routing


def _laguna(block: Block, x: mx.array) -> Routing:
    ids, weights = block.gate(x)
    return Routing(x, ids, weights * block.routed_scaling_factor)


def _with_shared(attribute: str) -> Adapter:
    def shared(block: Block, x: mx.array, routing: Routing) -> mx.array:
        output: mx.array = getattr(block, attribute)(x)
        return output

    return Adapter(_laguna if attribute == "shared_expert" else by_gate, shared=shared)


_GATE = Adapter(by_gate, shared=shared_experts)

ADAPTERS = {
    "deepseek.DeepseekMoE": _GATE,
    "deepseek_v2.DeepseekV2MoE": _GATE,
    "deepseek_v3.DeepseekV3MoE": _GATE,
    "deepseek_v32.DeepseekV32MoE": _GATE,
    "exaone_moe.MoE": _GATE,
    "glm4_moe.MoE": _GATE,
    "glm4_moe_lite.Glm4MoeLiteMoE": _GATE,
    "mimo_v2_flash.MoE": _GATE,
    "bailing_moe.BailingMoeSparseMoeBlock": _GATE,
    "bailing_moe_linear.SparseMoeBlock": _GATE,
    "bailing_hybrid.SparseMoeBlock": _GATE,
    "bailing_moe_v3.BailingSparseMoE": _GATE,
    "dots1.Dots1MoE": Adapter(by_gate, switch="experts", shared=shared_experts),
    "step3p5.Step3p5MoE": _with_shared("share_expert"),
    "laguna.MoE": _with_shared("shared_expert"),
    "granitemoe.GraniteMoeMoE": Adapter(by_router),
    "granitemoehybrid.GraniteMoeHybridMoE": Adapter(by_router),
}
