"""The adapters of all families: one entry per class of MoE block, by kind of router.

The key is the block's class as `module.Class` in mlx_lm.models; several families
may share a block. docs/add-a-family.md says how an entry is found and tested.
"""

from __future__ import annotations

from zmoe.families import outputs, routers
from zmoe.families.outputs import gated_shared_expert, shared_experts, shared_module
from zmoe.moe.adapter import Adapter

_GATE = Adapter(routers.by_gate, shared=shared_experts)

ADAPTERS: dict[str, Adapter] = {
    # ---- a submodule returns ids and weights ----
    "bailing_hybrid.SparseMoeBlock": _GATE,
    "bailing_moe.BailingMoeSparseMoeBlock": _GATE,
    "bailing_moe_linear.SparseMoeBlock": _GATE,
    "bailing_moe_v3.BailingSparseMoE": _GATE,
    "deepseek.DeepseekMoE": _GATE,
    "deepseek_v2.DeepseekV2MoE": _GATE,
    "deepseek_v3.DeepseekV3MoE": _GATE,
    "deepseek_v32.DeepseekV32MoE": _GATE,
    "deepseek_v41.MoE": Adapter(
        routers.by_gate,
        switch="experts.switch_mlp",
        shared=outputs.deepseek_v41_shared,
        finish=outputs.deepseek_v41_finish,
    ),
    "dots1.Dots1MoE": Adapter(routers.by_gate, switch="experts", shared=shared_experts),
    "exaone_moe.MoE": _GATE,
    "gemma4_text.Experts": Adapter(routers.by_caller, switch="switch_glu"),
    "glm4_moe.MoE": _GATE,
    "glm4_moe_lite.Glm4MoeLiteMoE": _GATE,
    "granitemoe.GraniteMoeMoE": Adapter(routers.by_router),
    "granitemoehybrid.GraniteMoeHybridMoE": Adapter(routers.by_router),
    "laguna.MoE": Adapter(routers.by_scaled_gate, shared=shared_module("shared_expert")),
    "longcat_flash.LongcatFlashMoE": Adapter(
        routers.by_router, shared=outputs.longcat_identities, skips_ids=True
    ),
    "mimo_v2_flash.MoE": _GATE,
    "step3p5.Step3p5MoE": Adapter(routers.by_gate, shared=shared_module("share_expert")),
    # ---- softmax, then top-k ----
    "dbrx.SparseMoeBlock": Adapter(routers.dbrx, switch="experts"),
    "ernie4_5_moe.Ernie4_5_MoeMLP": Adapter(routers.ernie, shared=shared_experts),
    "hunyuan.MoeBlock": Adapter(routers.softmax_top_k_unnormalized, shared=outputs.shared_mlp),
    "mellum.MellumSparseMoeBlock": Adapter(routers.softmax_top_k),
    "mistral4.Mistral4MoE": Adapter(routers.mistral4, shared=shared_experts),
    "olmoe.OlmoeSparseMoeBlock": Adapter(routers.softmax_top_k),
    "qwen2_moe.Qwen2MoeSparseMoeBlock": Adapter(
        routers.softmax_top_k_unnormalized, shared=gated_shared_expert
    ),
    "qwen3_moe.Qwen3MoeSparseMoeBlock": Adapter(routers.softmax_top_k),
    "qwen3_next.Qwen3NextSparseMoeBlock": Adapter(
        routers.softmax_top_k, shared=gated_shared_expert
    ),
    # ---- top-k, then softmax ----
    "gpt_oss.MLPBlock": Adapter(routers.router_top_k_softmax, switch="experts"),
    "jamba.JambaSparseMoeBlock": Adapter(routers.router_top_k_softmax),
    "mixtral.MixtralSparseMoeBlock": Adapter(routers.top_k_softmax),
    "phimoe.PhiMoESparseMoeBlock": Adapter(routers.phimoe),
    "phixtral.MOE": Adapter(routers.top_k_softmax),
    # ---- sigmoid, with a bias for the selection alone ----
    "Klear.KlearSparseMoeBlock": Adapter(
        routers.klear, switch="experts", shared=shared_experts, finish=outputs.klear_finish
    ),
    "afmoe.AfmoeMoE": Adapter(routers.afmoe, switch="experts", shared=shared_experts),
    "kimi_linear.KimiSparseMoE": Adapter(routers.kimi_linear, shared=shared_experts),
    "lfm2_moe.Lfm2MoeSparseMoeBlock": Adapter(routers.lfm2),
    "minimax.MiniMaxSparseMoeBlock": Adapter(routers.minimax),
    "minimax_m3_vl.SparseMoeBlock": Adapter(routers.minimax_m3, shared=shared_experts),
    # ---- experts see another input than the block ----
    "kimi_k3.KimiK3SparseMoE": Adapter(
        routers.kimi_k3, shared=shared_experts, finish=outputs.kimi_k3_finish
    ),
    "llama4.MoE": Adapter(routers.llama4, switch="experts", shared=shared_module("shared_expert")),
    "muse_spark.MoE": Adapter(
        routers.muse,
        switch="experts",
        finish=outputs.muse_finish,
        per_expert=outputs.muse_norm,
    ),
    "nemotron_h.NemotronHMoE": Adapter(
        routers.nemotron, shared=shared_experts, finish=outputs.nemotron_finish
    ),
}
