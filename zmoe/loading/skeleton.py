"""A checkpoint's model without its weights, built once per node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from zmoe.checkpoint.folder import read_config, read_tensors
from zmoe.checkpoint.safetensors import Tensor
from zmoe.checkpoint.select import placeholder, whole
from zmoe.errors import ModelError, ZmoeError
from zmoe.families.sites import Site, expert_count, find_sites, model_classes
from zmoe.loading.places import Place, Sanitize, Weights, trace

# Gets `sanitize` and all of the checkpoint's tensors, lazy; returns `sanitize` of those it chooses.
Feed = Callable[[Sanitize, Weights], Weights]


class Skeleton:
    """The checkpoint in the folder `path` as mlx-lm's own model, with nothing read but headers.

    Inspecting, planning and loading share one of these. Each property is built
    when it is first used; all of them raise ModelError, in one line, for a
    checkpoint that is damaged or does not make up the model. `take` hands the
    model over: the properties would then be built again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, by name."""
        return read_tensors(self.path)

    @property
    def module(self) -> Module:
        """The model, quantised as its checkpoint is; its parameters are lazy zeros."""
        return self._built[0]

    @property
    def places(self) -> dict[str, Place]:
        """Where those parameters lie that the model takes from the checkpoint as they are."""
        return self._built[1]

    @cached_property
    def sites(self) -> list[Site]:
        """The MoE blocks in order of their layers; at least one."""
        return find_sites(self.module)

    @cached_property
    def parameters(self) -> Weights:
        """The model's parameters by name, for their shapes and dtypes: never evaluated."""
        return dict(tree_flatten(self.module.parameters()))

    def load(self, feed: Feed, experts: int, count: int) -> dict[str, Any]:
        """Give the model what `feed` returns for weights; the config as mlx-lm completes it.

        Every MoE layer has `count` experts from then on, instead of `experts`.
        Nothing is evaluated, and another call may follow. Raises ModelError for
        names or shapes that do not fit together.
        """
        module: Any = self.module
        for layer in (layer for site in self.sites for layer in site.linears.values()):
            for name, array in layer.parameters().items():
                layer[name] = mx.zeros((count, *array.shape[1:]), array.dtype)

        def sanitize(offered: Weights) -> Weights:
            with expert_count(module, experts, count), _missing(self.path):
                weights = feed(_sanitize_of(module), offered)
            # Views would keep what they were cut from, and strides slow matmuls down.
            return {name: mx.contiguous(array) for name, array in weights.items()}

        return self._load(lambda *_: _StandIn(sanitize, module.load_weights))[1]

    def take(self) -> tuple[Module, list[Site]]:
        """The model and its MoE blocks; the skeleton keeps nothing of them."""
        taken = self.module, self.sites
        for name in ("tensors", "sites", "parameters", "_built"):
            vars(self).pop(name, None)
        return taken

    @cached_property
    def _built(self) -> tuple[Module, dict[str, Place]]:
        pieces = [whole(tensor) for tensor in self.tensors.values()]
        places: dict[str, Place] = {}

        def make(base: Any, args: Any) -> Module:
            model = base(args)
            if not find_sites(model):
                raise ModelError(f"{self.path} holds no Mixture of Experts: type {args.model_type}")
            own = _sanitize_of(model)

            def sanitize(_: Weights) -> Weights:
                with _missing(self.path):
                    weights, found = trace(own, {p.name: placeholder(p) for p in pieces}, pieces)
                places.update(found)
                return weights

            model.sanitize = sanitize  # hides the class's until the model is complete
            return cast("Module", model)

        model: Any = self._load(make)[0]
        del model.sanitize
        # What is still lazy is bound to this thread, and another one may load the model.
        private = [v for m in model.modules() for k, v in m.items() if k.startswith("_")]
        leaves: Any = tree_flatten(private)
        mx.eval([array for _, array in leaves if isinstance(array, mx.array)])
        return model, places

    def _load(self, make: Callable[[Any, Any], Module]) -> tuple[Module, dict[str, Any]]:
        """mlx-lm's load_model, for which `make` constructs the model of its class and args."""

        def classes(config: dict[str, Any]) -> tuple[Any, Any]:
            model, args = model_classes(config)
            return partial(make, model), args

        with _one_line(self.path):
            return load_model(self.path, lazy=True, get_model_classes=classes)


class _StandIn(Module):
    """Stands in load_model for a model that is built and quantised already."""

    def __init__(self, sanitize: Sanitize, load_weights: Callable[..., Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sanitize, self._load_weights = sanitize, load_weights

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Module:
        return self._load_weights(file_or_weights, strict)


def _sanitize_of(model: Any) -> Sanitize:
    sanitize: Sanitize = getattr(model, "sanitize", dict)
    return sanitize


@contextmanager
def _missing(path: Path) -> Iterator[None]:
    """Around a model's `sanitize`, which looks tensors up by name."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{path} cannot be loaded: tensor {error.args[0]} is missing") from error


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Make a ModelError of whatever a bad checkpoint makes mlx-lm and MLX raise."""
    try:
        yield
    except ZmoeError:  # ours, or what a progress callback found
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line of what mlx-lm says; of a list of names, the first."""
    text = str(error)
    if match := re.match(
        r"(Missing|Received) (\d+) parameters[^:]*:\s*(\S+?)[,.]?\s*$", text, re.M
    ):
        what = "is missing" if match[1] == "Missing" else "is unknown to the model"
        more = f" (and {int(match[2]) - 1} more)" if int(match[2]) > 1 else ""
        return f"tensor {match[3]} {what}{more}"
    return f"{type(error).__name__}: {' '.join(text.split())}"
