"""DBRX with its experts in one switch layer.

mlx-lm keeps a list of one module per expert and loops over tokens in Python;
here the same weights are stacked, as in every other family.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import mlx.core as mx
from mlx_lm.models.dbrx import Model as MlxModel
from mlx_lm.models.dbrx import ModelArgs
from mlx_lm.models.dbrx import SparseMoeBlock as MlxBlock
from mlx_lm.models.switch_layers import SwitchGLU

from zmoe.families.routers import dbrx as route

__all__ = ["Model", "ModelArgs"]

_PROJECTIONS = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
# As published: the rows of all experts in one matrix, w2 transposed.
_FUSED = re.compile(r"(.*\.experts)\.mlp\.(w1|v1|w2)$")
# As mlx-lm saves it: each expert apart, maybe quantised.
_SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(w1|v1|w2)\.(weight|scales|biases)$")


class SparseMoeBlock(MlxBlock):
    """mlx-lm's block; `experts` is a SwitchGLU, and nothing is evaluated within."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        ffn = args.ffn_config
        self.experts: Any = SwitchGLU(args.d_model, ffn["ffn_hidden_size"], ffn["moe_num_experts"])

    def __call__(self, x: mx.array) -> mx.array:
        """`x` (..., hidden_size) to the block's output, alike."""
        routing = route(self, x)
        y: mx.array = self.experts(x, routing.ids) * routing.weights[..., None]
        return y.sum(axis=-2).astype(x.dtype)


class Model(MlxModel):
    """mlx-lm's DBRX with these blocks."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.ffn = SparseMoeBlock(args)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Stack the experts of either layout; what is stacked already stays."""
        ffn = self.args.ffn_config["ffn_hidden_size"]
        stacked: dict[str, mx.array] = {}
        single: defaultdict[str, dict[int, mx.array]] = defaultdict(dict)
        for name, value in weights.items():
            if match := _FUSED.match(name):
                prefix, projection = match.groups()
                value = value.reshape(-1, ffn, value.shape[-1])
                value = value.swapaxes(1, 2) if projection == "w2" else value
                stacked[f"{prefix}.{_PROJECTIONS[projection]}.weight"] = value
            elif match := _SINGLE.match(name):
                prefix, expert, projection, kind = match.groups()
                single[f"{prefix}.{_PROJECTIONS[projection]}.{kind}"][int(expert)] = value
            else:
                stacked[name] = value
        for name, values in single.items():
            stacked[name] = mx.stack([values[expert] for expert in sorted(values)])
        return stacked
