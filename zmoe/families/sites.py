"""Model classes by config, and the MoE blocks in a model."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from mlx.nn.layers.base import Module
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes

from zmoe.checkpoint.select import layer_of
from zmoe.errors import ModelError
from zmoe.families import dbrx
from zmoe.families.table import ADAPTERS
from zmoe.kernels.experts import switch_layers
from zmoe.moe.adapter import Adapter

# How mlx-lm's families name the number of routed experts in their args.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Site:
    """One MoE block of a model, in the decoder layer with index `layer`.

    `path` leads from the model to `block`, `switch_path` from the block to its
    switch layer (SwitchGLU or SwitchMLP). Without an adapter the block is
    whatever holds the switch layer.
    """

    path: str
    layer: int
    block: Module
    switch_path: str
    adapter: Adapter | None

    @property
    def switch(self) -> Any:
        return operator.attrgetter(self.switch_path)(self.block)

    @property
    def switch_name(self) -> str:
        """The path from the model to the switch layer."""
        return f"{self.path}.{self.switch_path}"

    @property
    def linears(self) -> dict[str, Any]:
        """The switch layer's linear layers by their paths in the model; the last comes last."""
        switch = self.switch
        return {f"{self.switch_name}.{name}": switch[name] for name in switch_layers(switch)}

    @property
    def experts(self) -> int:
        return int(projections(self.switch)[0].weight.shape[0])

    @property
    def width(self) -> int:
        """The size of the vectors that the experts read and write; known while it has weights."""
        return int(projections(self.switch)[0].input_dims)


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """The classes of the model and its args; ModelError for an unknown type."""
    if config["model_type"] == "dbrx":
        return dbrx.Model, dbrx.ModelArgs
    try:
        model, args = _get_classes(config)
    except (ValueError, AttributeError):
        kind = config["model_type"]
        raise ModelError(f"model type {kind} is not known to the installed mlx-lm") from None
    return model, args


def projections(switch: Any) -> list[Any]:
    """The linear layers of a SwitchGLU or SwitchMLP; the last comes last."""
    return [switch[name] for name in switch_layers(switch)]


def find_sites(model: Module) -> list[Site]:
    """The MoE blocks in order of their layers; [] for a model without experts."""
    modules = dict(model.named_modules())
    sites: dict[str, Site] = {}
    for path, module in modules.items():
        if isinstance(module, (SwitchGLU, SwitchMLP)):
            site = _site(path, modules)
            sites[site.path] = site
    ordered = sorted(sites.values(), key=lambda site: site.layer)
    if len({site.layer for site in ordered}) < len(ordered):
        raise ModelError("a layer with several MoE blocks is not supported")
    return ordered


def _site(path: str, modules: dict[str, Module]) -> Site:
    """The nearest enclosing module with an adapter for the switch at `path`."""
    layer = layer_of(path)
    if layer is None:
        raise ModelError(f"the MoE block at {path} is in no layer")
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        block_path, switch_path = ".".join(parts[:depth]), ".".join(parts[depth:])
        block = modules.get(block_path)
        adapter = None if block is None else ADAPTERS.get(key_of(block))
        if block is not None and adapter and adapter.switch == switch_path:
            return Site(block_path, layer, block, switch_path, adapter)
    block_path = ".".join(parts[:-1])
    return Site(block_path, layer, modules[block_path], parts[-1], None)


def key_of(block: Module) -> str:
    return f"{type(block).__module__.rpartition('.')[2]}.{type(block).__name__}"


def replace_module(model: Module, path: str, new: Module) -> None:
    """Put `new` where `path` leads; numbers in it index lists."""
    *way, last = path.split(".")
    holder: Any = model
    for part in way:
        holder = holder[int(part)] if isinstance(holder, list) else getattr(holder, part)
    if isinstance(holder, list):
        holder[int(last)] = new
    else:
        setattr(holder, last, new)


@contextmanager
def expert_count(model: Module, old: int, new: int) -> Iterator[None]:
    """For a while, let every args object in `model` say `new` experts for `old`."""
    changed: list[tuple[Any, str]] = []
    for holder in _args_of(model):
        values = holder if isinstance(holder, dict) else vars(holder)
        for name in _EXPERT_COUNTS:
            if values.get(name) == old:
                values[name] = new
                changed.append((values, name))
    try:
        yield
    finally:
        for values, name in changed:
            values[name] = old


def _args_of(model: Module) -> list[Any]:
    """Each distinct args object that a module holds, and those nested within."""
    found: dict[int, Any] = {}
    queue: list[Any] = []
    for module in model.modules():
        queue += [getattr(module, name, None) for name in ("args", "config")]
    while queue:
        item = queue.pop()
        if id(item) in found:
            continue
        if isinstance(item, dict):
            found[id(item)] = item
            queue += item.values()
        elif is_dataclass(item) and not isinstance(item, type):
            found[id(item)] = item
            queue += [getattr(item, field.name) for field in fields(item)]
            queue += vars(item).values()
    return list(found.values())
