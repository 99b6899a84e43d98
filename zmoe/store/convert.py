"""The arrays that mlx-lm would make of a checkpoint, one expert at a time."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.utils import quantize_model

from zmoe.checkpoint.select import Reader, layer_of, of_experts, placeholder, select
from zmoe.errors import InputError, ModelError
from zmoe.families.sites import Site, expert_count
from zmoe.kernels.weights import PARTS, Quantization
from zmoe.loading.places import Sanitize, Weights
from zmoe.loading.skeleton import Skeleton
from zmoe.placement.types import ModelInfo


class Source:
    """A checkpoint as mlx-lm's model holds it, or as mlx_lm.convert would quantise it.

    The model is put together with one expert a layer and without weights, to
    learn names, shapes and which modules are quantised. `shapes` are its
    arrays, none of them evaluated: `experts[layer]` names those of each expert,
    in the order of a record, `dense` the others. `config` is the store's.
    """

    def __init__(
        self,
        info: ModelInfo,
        quantization: Quantization | None = None,
        skeleton: Skeleton | None = None,
    ) -> None:
        self.info = info
        skeleton = skeleton or Skeleton(Path(info.path))
        tensors, original = skeleton.tensors, skeleton.config
        first = dict.fromkeys(info.moe_layers, (0,))
        pieces = select(tensors, info.experts, first, 1)
        experts = {t.name for t in tensors.values() if of_experts(t, info.experts, first)}
        self._dense = [piece for piece in pieces if piece.source.name not in experts]
        self._tensors = {
            layer: {name: tensors[name] for name in experts if layer_of(name) == layer}
            for layer in info.moe_layers
        }
        names: set[str] = set()

        def feed(sanitize: Sanitize, _: Weights) -> Weights:
            weights = sanitize({piece.name: placeholder(piece) for piece in pieces})
            names.update(weights)
            return weights

        config = skeleton.load(feed, info.experts, 1)
        self._model, sites = skeleton.take()
        if names != dict(tree_flatten(self._model.parameters())).keys():
            raise ModelError(
                f"{info.path} cannot be prestacked: mlx-lm changes its {info.quantization} weights "
                "while loading; convert it with mlx_lm.convert first"
            )
        self._dtype: mx.Dtype | None = None
        self._quantized: dict[str, tuple[Any, Any]] = {}
        if quantization is not None:
            config = self._quantize_all(config, quantization)
        kept = ("quantization", "quantization_config")
        self.config = {**original, **{k: config[k] for k in kept if k in config}}
        self.shapes: Weights = dict(tree_flatten(self._model.parameters()))
        self.experts = _names_of_experts(sites, self.shapes)
        of_any = {name for names in self.experts.values() for name in names}
        self.dense = [name for name in self.shapes if name not in of_any]
        # For the renaming, which sees the whole checkpoint; only what is used of it is read.
        self._rest = {p.name: placeholder(p) for p in pieces if p.source.name in experts}
        self._rest |= self._lazy()
        # For good, as the model is ours alone: finding its settings takes a while.
        self._one_expert = ExitStack()
        self._one_expert.enter_context(expert_count(self._model, info.experts, 1))

    def dense_arrays(self) -> Weights:
        """What every node holds; lazy, to be evaluated and dropped one by one."""
        return self._made(self._rest | self._lazy(), self.dense)

    def expert_arrays(self, layer: int, expert: int) -> Weights:
        """The arrays of one expert, each with a first axis of 1; lazy, but read."""
        pieces = select(self._tensors[layer], self.info.experts, {layer: (expert,)}, 1)
        with Reader() as reader:
            own = {piece.name: reader.read(piece) for piece in pieces}
        return self._made(self._rest | own, self.experts[layer])

    def _lazy(self) -> Weights:
        """The dense tensors, which MLX reads when they are evaluated."""
        found: Weights = {}
        names = {piece.name for piece in self._dense}
        for file in sorted({piece.source.file for piece in self._dense}):
            loaded: Any = mx.load(str(file))
            found.update((name, array) for name, array in loaded.items() if name in names)
        return found

    def _made(self, weights: Weights, wanted: list[str]) -> Weights:
        """The arrays `wanted` of the model, from tensors as the checkpoint names them."""
        paths = {_module_of(name) for name in wanted}
        sanitize: Sanitize = getattr(self._model, "sanitize", dict)
        renamed = sanitize(weights)
        modules: defaultdict[str, Weights] = defaultdict(dict)
        for name, array in renamed.items():
            if (path := _module_of(name)) in paths:
                modules[path][name] = self._cast(name, array)
        made: Weights = {}
        for path, arrays in modules.items():
            made |= self._quantize_one(path, arrays) if path in self._quantized else arrays
        return {name: made[name] for name in wanted}

    # ---- as mlx_lm.convert does it -------------------------------------------------

    def _quantize_all(self, config: dict[str, Any], to: Quantization) -> dict[str, Any]:
        """Quantise the model without weights, to learn what is to be; the new config."""
        model: Any = self._model
        name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
        if name in MODEL_CONVERSION_DTYPES:
            self._dtype = getattr(mx, name)
            model.update(tree_map_with_path(self._cast, model.parameters()))
        before = dict(model.named_modules())
        with redirect_stdout(io.StringIO()):  # it tells of bits per weight
            model, config = quantize_model(model, config, to.group_size, to.bits, mode=to.mode)
        after = dict(model.named_modules())
        self._quantized = {
            path: (module, after[path])
            for path, module in before.items()
            if hasattr(module, "to_quantized") and after[path] is not module
        }
        if not self._quantized:
            raise InputError(
                f"{self.info.path} has nothing to quantise to {to}: it is {self.info.quantization}"
            )
        return config

    def _cast(self, name: str, array: mx.array) -> mx.array:
        may = getattr(self._model, "cast_predicate", lambda name: True)
        if self._dtype is None or not mx.issubdtype(array.dtype, mx.floating) or not may(name):
            return array
        return array.astype(self._dtype)

    def _quantize_one(self, path: str, arrays: Weights) -> Weights:
        """The parameters of one module, quantised by its own method."""
        module, like = self._quantized[path]
        nothing = module.parameters()
        module.update({name.rpartition(".")[2]: array for name, array in arrays.items()})
        made = module.to_quantized(group_size=like.group_size, bits=like.bits, mode=like.mode)
        module.update(nothing)  # or it would hold on to what it was quantised from
        leaves: Any = tree_flatten(made.parameters())
        return {f"{path}.{name}": array for name, array in leaves}


def _names_of_experts(sites: Sequence[Site], shapes: Weights) -> dict[int, list[str]]:
    """By layer, the names of its switch layer's arrays: weight, scales, biases, bias of each."""
    found = {}
    for site in sites:
        parts = (*PARTS, "global_scale")
        names = [f"{path}.{part}" for path in site.linears for part in parts]
        found[site.layer] = [name for name in names if name in shapes]
    return found


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
