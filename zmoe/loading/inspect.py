"""What a model is, from its config and tensor headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zmoe.checkpoint.fingerprint import fingerprint
from zmoe.checkpoint.manifest import read_manifest
from zmoe.checkpoint.safetensors import Tensor
from zmoe.config import QUANTIZATIONS
from zmoe.errors import ModelError
from zmoe.families.sites import projections
from zmoe.loading.skeleton import Skeleton
from zmoe.loading.slices import can_be_sliced
from zmoe.perf.shape import PLAIN_ALIGNMENT
from zmoe.placement.types import ModelInfo

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EMBEDDINGS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "embeddings", "embed")
)
_OTHER_SENSES = re.compile("visi|visual|audio")
_NORM = re.compile(r"norm[^.]*\.weight$")
_GATED_NORM = re.compile(r"linear_attn\.|mamba\.|mixer\.")  # these put out their input's dtype
_WIDTHS = ("hidden_size", "d_model", "n_embd", "model_dim")
_TOP_KS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_CONTEXTS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_sequence_length",
    "n_positions",
    "model_max_length",
    "seq_length",
)


def describe(skeleton: Skeleton, on_mlx: bool = False) -> ModelInfo:
    """Describe a checkpoint, reading no weights. `on_mlx`: MLX will compute the experts.

    Raises ModelError, in one line, for a folder that is damaged, whose tensors
    do not make up the model, of a type unknown to mlx-lm, or without experts.
    """
    path, config = skeleton.path, skeleton.config
    _check_quantization(path / "config.json", config.get("quantization"))
    tensors, store = skeleton.tensors, read_manifest(path)
    model: Any = skeleton.module
    sites = skeleton.sites
    counts = {site.experts for site in sites}
    if len(counts) > 1:
        raise ModelError(f"{path} has layers with different numbers of experts")
    hidden = _integer(config, _WIDTHS)
    if hidden is None:
        raise ModelError(f"{path / 'config.json'} names no hidden size")
    found = _field(config, _TOP_KS)
    if found is None:
        raise ModelError(f"{path / 'config.json'} names no number of experts per token")
    (name, top_k), experts = found, counts.pop()
    if not 1 <= top_k <= experts:
        raise ModelError(
            f"{path / 'config.json'}: {name} is {top_k}: expected 1 to {experts}, "
            "the number of experts"
        )
    return ModelInfo(
        path=str(path),
        model_type=config["model_type"],
        fingerprint=fingerprint(config, tensors) if store is None else store.digest,
        dtype=_dtype(path, tensors),
        quantization=_quantization(config),
        layers=len(model.layers),
        moe_layers=tuple(site.layer for site in sites),
        experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        **_sizes(skeleton, on_mlx or can_be_sliced(sites)),
        exchange_width=max(site.width * (1 if site.adapter else top_k) for site in sites),
        context_length=_integer(config, _CONTEXTS),
        vocabulary=max(tensors[name].shape[0] for name in _embeddings(path, tensors)),
        has_own_cache=hasattr(model, "make_cache"),
    )


def _sizes(skeleton: Skeleton, sliceable: bool) -> dict[str, int]:
    """The experts' moe_intermediate_size, the alignment of its slices, and bytes as MLX holds
    them.
    """
    sites = skeleton.sites
    layers = [projections(site.switch) for site in sites]
    widths = {int(down.input_dims) for *_, down in layers}
    groups = {layer.group_size for of_site in layers for layer in of_site if "scales" in layer}
    inside = tuple(f"{site.switch_name}." for site in sites)
    sizes = {name: array.nbytes for name, array in skeleton.parameters.items()}
    experts = sum(size for name, size in sizes.items() if name.startswith(inside))
    return {
        "moe_intermediate_size": max(widths),
        "slice_alignment": max(groups, default=PLAIN_ALIGNMENT)
        if sliceable and len(widths) == 1
        else 0,
        "expert_parameters": max(
            sum(int(layer.input_dims * layer.output_dims) for layer in of_site)
            for of_site in layers
        ),
        "expert_bytes": math.ceil(experts / sum(site.experts for site in sites)),
        "dense_bytes": sum(sizes.values()) - experts,
    }


def _integer(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of `names` that the config, or a part of it, gives a number for."""
    found = _field(config, names)
    return None if found is None else found[1]


def _field(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, int] | None:
    """The name and the number that _integer finds."""
    nested = [config.get(part) for part in ("text_config", "ffn_config")]
    for part in (config, *(part for part in nested if isinstance(part, Mapping))):
        for name in names:
            value = part.get(name)
            if isinstance(value, list) and value:
                value = max(value)  # hunyuan: one number per layer
            if type(value) is int:
                return name, value
    return None


def _embeddings(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of what may be the token embedding, the likeliest first."""
    names = [n for n in tensors if n.endswith(_EMBEDDINGS) and not _OTHER_SENSES.search(n)]
    if not names:
        raise ModelError(f"{path} holds no token embedding")
    return names


def _dtype(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """What the activations are: as wide as the embedding's output and the norms.

    MLX's norms promote to the wider of their input and their weights.
    """
    language = {n: t for n, t in tensors.items() if not _OTHER_SENSES.search(n)}
    embedding = _embeddings(path, tensors)[0]
    found = {language[embedding].dtype}
    if not found & _DTYPES.keys():
        scales = language.get(f"{embedding.removesuffix('weight')}scales")
        # Modes whose scales are bytes (mxfp4 and kin) dequantise to bfloat16.
        found = {scales.dtype if scales and scales.dtype in _DTYPES else "BF16"}
    for name, tensor in language.items():
        if len(tensor.shape) == 1 and _NORM.search(name) and not _GATED_NORM.search(name):
            found.add(tensor.dtype)
    found &= _DTYPES.keys()
    return _DTYPES[found.pop()] if len(found) == 1 else "float32"


def _check_quantization(file: Path, settings: Any) -> None:
    """Raise ModelError, which names the tensor, for a mode, bits or group that MLX has not."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ModelError(f"{file}: quantization is not an object")
    own = {name: entry for name, entry in settings.items() if isinstance(entry, Mapping)}
    for name, entry in (("every tensor", settings), *own.items()):
        mode = entry.get("mode", "affine")
        bits, group = entry.get("bits"), entry.get("group_size")
        if not isinstance(mode, str) or mode not in QUANTIZATIONS:
            raise ModelError(
                f"{file}: {name} has the unknown quantisation mode {mode!r}: "
                f"expected {', '.join(QUANTIZATIONS)}"
            )
        known_bits, known_groups = QUANTIZATIONS[mode]
        for what, value, known in (("bits", bits, known_bits), ("groups of", group, known_groups)):
            if value is not None and value not in known:
                raise ModelError(
                    f"{file}: {name} has {what} {value} in mode {mode}: "
                    f"expected {' or '.join(map(str, known))}"
                )


def _quantization(config: Mapping[str, Any]) -> str:
    settings = config.get("quantization")
    if isinstance(settings, Mapping) and "bits" in settings:
        mode = settings.get("mode", "affine")
        return f"{mode}-{settings['bits']}bit-g{settings.get('group_size')}"
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    legacy = config.get("quantization_config") or nested
    if isinstance(legacy, Mapping):
        return str(legacy.get("quant_method", "unknown"))
    return "none"
