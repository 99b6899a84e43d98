"""Attention cut by heads, as mlx-lm's shard() cuts it; the rest of a model stays whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx.utils import tree_flatten

from zmoe.checkpoint.select import layer_of
from zmoe.errors import SettingError
from zmoe.families.sites import Site, replace_module
from zmoe.loading.skeleton import Skeleton
from zmoe.moe.graph import Graph
from zmoe.moe.heads import HeadsToAll

_MOST_NODES = 64
_SUMMED = (ShardedToAllLinear, QuantizedShardedToAllLinear)
_CUT = (*_SUMMED, AllToShardedLinear, QuantizedAllToShardedLinear)


class _Place:
    """What shard() asks of a group. Once that has been done, nobody is left to exchange with:
    gradients, which the layers would add up, are not computed here.
    """

    def __init__(self, rank: int, nodes: int) -> None:
        self._rank, self._nodes, self.is_used = rank, nodes, False

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 1 if self.is_used else self._nodes


def cut_attention(
    model: Module, sites: Sequence[Site], model_type: str, rank: int, nodes: int
) -> list[str]:
    """Keep `rank`'s share of the attention heads of a model, which nothing is evaluated of.

    Returns the paths of the layers that then put out sums among the ranks. Raises
    SettingError where mlx-lm cannot cut this model's attention so, or not for that many nodes.
    """
    counts = _head_counts(model)
    place = _Place(rank, nodes)
    shard: Any = getattr(model, "shard", None)
    if shard is None:
        raise _cannot(f"mlx-lm cannot cut the attention of {model_type}")
    failure = ""
    with _without_experts(model, sites):
        try:
            shard(place)
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            failure = " ".join(str(error).split())
    cut = {name: count for name, count in counts.items() if _head_counts(model).get(name) != count}
    _check_divides(cut or counts, model_type, nodes)
    if failure or not cut:
        raise _cannot(f"mlx-lm cannot cut the attention of {model_type}: {failure or 'no heads'}")
    place.is_used = True
    modules: dict[str, Any] = dict(model.named_modules())
    for name in cut:  # a slice that is a view would keep what it was cut from
        modules[name.rpartition(".")[0]].apply(mx.contiguous)
    summed = [path for path, module in modules.items() if isinstance(module, _SUMMED)]
    for path, module in modules.items():
        holds_place = any(each is place for each in (*module.values(), *vars(module).values()))
        if holds_place and not isinstance(module, _CUT):
            why = "exchanges more than sums of heads"
            raise _cannot(f"{path or 'the model'} of {model_type} {why}")
    return sorted(summed, key=lambda path: layer_of(path) or 0)


def check_attention(folder: Path, nodes: int) -> int:
    """Bytes of the weights that cut_attention() divides among `nodes` nodes.

    Raises SettingError where it would, for the model in `folder`.
    """
    skeleton = Skeleton(folder)
    model: Any = skeleton.module
    whole = _bytes_of(model)
    cut_attention(model, skeleton.sites, skeleton.config["model_type"], 0, nodes)
    return (whole - _bytes_of(model)) * nodes // (nodes - 1)


def divides_heads(folder: Path, nodes: int) -> bool:
    """Whether `nodes` nodes can divide the heads of the model in `folder`."""
    if nodes == 1:
        return False
    try:
        check_attention(folder, nodes)
    except SettingError:
        return False
    return True


def _bytes_of(model: Any) -> int:
    leaves: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in leaves)


def sum_heads(model: Module, sites: Sequence[Site], summed: Sequence[str], graph: Graph) -> None:
    """Have the layers at the paths `summed` add up in `graph`."""
    modules: Any = dict(model.named_modules())
    for path in summed:
        layer = layer_of(path) or 0
        ordinal = sum(site.layer < layer for site in sites[:-1])
        replace_module(model, path, HeadsToAll(modules[path], ordinal, graph))


def _cannot(why: str) -> SettingError:
    return SettingError("attention", f"is sharded: expected replicated, as {why}")


def _head_counts(model: Module) -> dict[str, int]:
    """How many heads each module says that it has, by the path of that number."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and name.endswith("heads")
    }


def _check_divides(counts: dict[str, int], model_type: str, nodes: int) -> None:
    common = math.gcd(*counts.values())
    if common % nodes == 0:
        return
    fit = [str(n) for n in range(2, _MOST_NODES + 1) if common % n == 0]
    heads = " or ".join(map(str, sorted(set(counts.values()))))
    expected = f"{', '.join(fit)} nodes" if fit else "replicated"
    raise SettingError(
        "attention",
        f"is sharded: {nodes} nodes cannot share {heads} heads of {model_type} evenly: expected "
        f"{expected}",
    )


@contextmanager
def _without_experts(model: Module, sites: Sequence[Site]) -> Iterator[None]:
    """Meanwhile what shard() does to MoE blocks is lost, and to what other layers have there."""
    kinds = {site.path.rpartition(".")[2]: type(site.block) for site in sites}
    modules = dict(model.named_modules())
    places = {path: kinds[name] for path in modules if (name := path.rpartition(".")[2]) in kinds}
    # Of one in another only the outer one: the stand-in has whatever is asked of it.
    outer = [p for p in places if layer_of(p) is not None and not _has_outer(p, places)]
    for path in outer:
        replace_module(model, path, _stand_in(places[path]))
    try:
        yield
    finally:
        for path in outer:
            replace_module(model, path, modules[path])


def _has_outer(path: str, places: dict[str, Any]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:depth]) in places for depth in range(1, len(parts)))


def _stand_in(kind: type[Module]) -> Module:
    """A module that is a `kind` and holds nothing, whatever is put into it or asked of it."""

    class StandIn(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            Module.__init__(self)

        def __getattr__(self, name: str) -> Any:
            return self

        def __setattr__(self, name: str, value: Any) -> None:
            pass

        def __truediv__(self, other: Any) -> Any:
            return self

        def parameters(self) -> Any:
            return {}

        def update(self, *parameters: Any, **how: Any) -> Any:
            return self

    stand_in: Module = StandIn()
    return stand_in
