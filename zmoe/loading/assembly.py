"""mlx-lm's own model of a checkpoint, but fed with the tensors that we choose."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.utils import load_model

from zmoe.errors import ModelError, ZmoeError
from zmoe.families.sites import expert_count, find_sites, model_classes, projections

Weights = dict[str, mx.array]
Sanitize = Callable[[Weights], Weights]
# Gets what renames and stacks the checkpoint's tensors, and all of these, unread;
# returns what that makes of the tensors it chooses.
Feed = Callable[[Sanitize, Weights], Weights]


def assemble(
    path: Path, feed: Feed, shrink: tuple[int, int] | None = None
) -> tuple[Module, dict[str, Any]]:
    """The model in the folder `path` with what `feed` returns for weights, and its config.

    Nothing is evaluated. With `shrink` (experts, count) the model is built as
    if it had `count` experts instead of `experts`, its routers excepted.
    Raises ModelError for a config, names or shapes that do not fit together.
    """
    feeds = [feed]  # emptied below: the class lives for as long as the garbage collector likes

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        base, args = model_classes(config)
        return _fed(path, base, feeds, shrink), args

    try:
        model, config = load_model(path, lazy=True, get_model_classes=classes)
    except ZmoeError:  # ours, or what a progress callback found
        raise
    except Exception as error:  # mlx-lm and MLX raise whatever a bad checkpoint makes them
        raise ModelError(f"{path} cannot be loaded: {_reason(error)}") from error
    finally:
        feeds.clear()
    return model, config


def _fed(
    path: Path, base: Any, feeds: Sequence[Feed], shrink: tuple[int, int] | None
) -> type[Module]:
    """The model class `base`, which ignores the weights it is offered for those of `feeds[0]`."""

    class Fed(base):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if not find_sites(self):
                raise ModelError(f"{path} holds no Mixture of Experts: type {args.model_type}")
            if shrink is not None:
                _keep(self, shrink[1])

        def sanitize(self, offered: Weights) -> Weights:
            rename = super().sanitize if hasattr(base, "sanitize") else dict
            try:
                with expert_count(self, *(shrink or (0, 0))):
                    weights = feeds[0](rename, offered)
            except KeyError as error:
                raise ModelError(
                    f"{path} cannot be loaded: tensor {error.args[0]} is missing"
                ) from error
            # Views would keep what they were cut from, and strides slow products.
            return {name: mx.contiguous(array) for name, array in weights.items()}

    Fed.__name__ = base.__name__
    return Fed


def _keep(model: Module, count: int) -> None:
    """Make every switch layer as large as one of `count` experts."""
    for site in find_sites(model):
        for layer in projections(site.switch):
            for name, array in layer.parameters().items():
                layer[name] = mx.zeros((count, *array.shape[1:]), array.dtype)


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
