"""A model's shape from its config.json, as Hugging Face and mlx-lm write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zmoe.errors import ModelError
from zmoe.json_files import read_json
from zmoe.perf.routing import MOST_EXPERTS
from zmoe.perf.shape import (
    BF16,
    F32,
    FP8_BLOCKS,
    MXFP4,
    Attention,
    Format,
    GroupedAttention,
    LatentAttention,
    ModelShape,
    affine,
    delta_state_bytes,
)

# One meaning, many spellings: the first that the config has counts.
_HIDDEN = ("hidden_size", "d_model")
_LAYERS = ("num_hidden_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "kv_n_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
_EXPERT_HIDDEN = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size")
_DENSE_HIDDEN = ("intermediate_size_mlp", "intermediate_size")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts")
_PARTS = ("text_config", "ffn_config", "attn_config")


def read_shape(path: Path, name: str, weights: Format | None = None) -> ModelShape:
    """The shape in the config.json at `path`, its weights stored as `weights` where given.

    Raises ModelError naming file and field.
    """
    config = read_json(path, str(path), ModelError, absent=f"{path.parent} holds no config.json")
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object")
    fields = _Config(str(path), config)
    formats = fields.formats() if weights is None else (weights, weights)
    return fields.shape(name, *formats)


class _Config:
    """The fields of a config.json, looked up in it and then in its parts."""

    def __init__(self, where: str, config: Mapping[str, Any]) -> None:
        self.where = where
        nested = [config.get(part) for part in _PARTS]
        self.parts = [config, *(part for part in nested if isinstance(part, dict))]

    def get(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Name and value of the first of `names` that is there and not null."""
        for name in names:
            for part in self.parts:
                if part.get(name) is not None:
                    return name, part[name]
        return names[0], None

    def integer(self, names: tuple[str, ...], default: int | None = None, least: int = 1) -> int:
        """A whole number; `default` None: it must be there."""
        name, value = self.get(names)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: field {' or '.join(names)} is missing")
            return default
        if type(value) is not int or value < least:
            raise ModelError(
                f"{self.where}: field {name} is {json.dumps(value)}: expected a whole number of "
                f"at least {least}"
            )
        return value

    def shape(self, name: str, dense_format: Format, expert_format: Format) -> ModelShape:
        experts = self.integer(_EXPERTS, default=0, least=0)
        if not experts:
            raise ModelError(f"{self.where} names no experts: not a Mixture-of-Experts model")
        if experts > MOST_EXPERTS:
            raise ModelError(f"{self.where}: {experts} experts: at most {MOST_EXPERTS} are planned")
        hidden, layers = self.integer(_HIDDEN), self.integer(_LAYERS)
        expert_hidden, top_k = self.integer(_EXPERT_HIDDEN), self.integer(_TOP_K)
        if top_k > experts:
            raise ModelError(
                f"{self.where}: field {self.get(_TOP_K)[0]} is {top_k}: more experts per token "
                f"than the {experts} that a layer has"
            )
        dense_layers = self._dense_layers(layers)
        return ModelShape(
            name=name,
            hidden=hidden,
            layers=layers,
            attention=self._attention(hidden, layers),
            experts=experts,
            top_k=top_k,
            expert_hidden=expert_hidden,
            vocabulary=self.integer(("vocab_size",)),
            dense_layers=dense_layers,
            dense_hidden=self.integer(_DENSE_HIDDEN) if dense_layers else 0,
            shared_hidden=self._shared_hidden(expert_hidden),
            tied=self.get(("tie_word_embeddings",))[1] is True,
            dense_format=dense_format,
            expert_format=expert_format,
            slice_alignment=expert_format.slice_alignment,
            state_bytes=self._state_bytes(layers),
        )

    def _attention(self, hidden: int, layers: int) -> Attention:
        heads = self.integer(_HEADS)
        if self.get(("kv_lora_rank",))[1] is not None:
            return LatentAttention(
                heads=heads,
                query_rank=self.integer(("q_lora_rank",), default=0),
                kv_rank=self.integer(("kv_lora_rank",)),
                nope_dim=self.integer(("qk_nope_head_dim",)),
                rope_dim=self.integer(("qk_rope_head_dim",)),
                value_dim=self.integer(("v_head_dim",)),
            )
        windowed = self._layers_of("sliding_attention")
        return GroupedAttention(
            heads=heads,
            kv_heads=self.integer(_KV_HEADS, default=heads),
            head_dim=self.integer(("head_dim",), default=max(1, hidden // heads)),
            window=self.integer(("sliding_window",)) if windowed else 0,
            windowed_layers=min(windowed, layers),
            recurrent_layers=self._recurrent_layers(layers),
        )

    def _layers_of(self, kind: str) -> int:
        kinds = self.get(("layer_types",))[1]
        return kinds.count(kind) if isinstance(kinds, list) else 0

    def _recurrent_layers(self, layers: int) -> int:
        """How many have gated delta nets in the place of attention, as most of Qwen3-Next's do."""
        if self.get(("linear_num_value_heads",))[1] is None:
            return 0
        attending = layers // self.integer(("full_attention_interval",), default=4)
        return min(self._layers_of("linear_attention") or layers - attending, layers)

    def _state_bytes(self, layers: int) -> int:
        """Of all recurrent layers."""
        recurrent = self._recurrent_layers(layers)
        return recurrent and recurrent * delta_state_bytes(
            key_heads=self.integer(("linear_num_key_heads",)),
            value_heads=self.integer(("linear_num_value_heads",)),
            key_dim=self.integer(("linear_key_head_dim",)),
            value_dim=self.integer(("linear_value_head_dim",)),
            taps=self.integer(("linear_conv_kernel_dim",), default=4),
        )

    def _dense_layers(self, layers: int) -> int:
        """How many layers have no experts; four families, four ways to say it."""
        first = self.integer(("first_k_dense_replace",), default=0, least=0)
        every = self.integer(
            ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq"), default=1
        )
        listed = self.get(("mlp_only_layers",))[1] or []
        if not isinstance(listed, list):
            raise ModelError(f"{self.where}: field mlp_only_layers: expected a list")
        counted_from = 0 if self.get(("moe_layer_freq",))[1] is not None else 1
        moe = [
            layer
            for layer in range(first, layers)
            if (layer + counted_from) % every == 0 and layer not in listed
        ]
        if not moe:
            raise ModelError(f"{self.where}: no layer has experts")
        return layers - len(moe)

    def _shared_hidden(self, expert_hidden: int) -> int:
        width = self.integer(("shared_expert_intermediate_size",), default=0, least=0)
        return width or self.integer(_SHARED_EXPERTS, default=0, least=0) * expert_hidden

    def formats(self) -> tuple[Format, Format]:
        """Of everything but the routed experts, and of those."""
        mlx = self.get(("quantization",))[1]
        if isinstance(mlx, dict):
            stored = MXFP4 if mlx.get("mode", "affine") != "affine" else self._affine(mlx)
            return stored, stored
        dtype = self.get(("torch_dtype", "dtype"))[1]
        plain = F32 if dtype in ("float32", "float") else BF16
        settings = self.get(("quantization_config",))[1]
        if not isinstance(settings, dict):
            return plain, plain
        method = settings.get("quant_method")
        if method == "mxfp4":
            return plain, MXFP4
        if method == "fp8":
            return FP8_BLOCKS, FP8_BLOCKS
        if "bits" in settings:
            stored = self._affine(settings)
            return stored, stored
        raise ModelError(
            f"{self.where}: field quantization_config.quant_method is {json.dumps(method)}: "
            "expected mxfp4, fp8, or one with bits; --bits says what it shall be"
        )

    def _affine(self, settings: Mapping[str, Any]) -> Format:
        bits, group = settings.get("bits"), settings.get("group_size", 64)
        if type(bits) is int and type(group) is int and bits >= 1 and group >= 1:
            return affine(bits, group)
        raise ModelError(
            f"{self.where}: fields bits {json.dumps(bits)} and group_size {json.dumps(group)} of "
            "the quantisation: expected whole numbers of at least 1"
        )
