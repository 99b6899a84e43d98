"""From a user's request for a placement to the placement that a run takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from zmoe.cluster.spec import PlacementRequest
from zmoe.config import EngineConfig
from zmoe.errors import PlacementError, SettingError
from zmoe.kernels.threads import is_native
from zmoe.loading import divides_heads
from zmoe.perf.hardware import CPU, CUDA, FAST_CROSSING_S, KERNELS, METAL, Device
from zmoe.perf.links import RDMA
from zmoe.placement.build import WAYS, check_way
from zmoe.placement.check import check_placement
from zmoe.placement.choose import Choice, Chooser
from zmoe.placement.estimate import NETWORK, NodeResources
from zmoe.placement.file import read_placement
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import read_usage

OnChoice = Callable[[Choice], None]


class PlacementResolver:
    """A user's request for the placement of one model in one run, its files read and checked."""

    def __init__(
        self,
        request: PlacementRequest,
        info: ModelInfo,
        nodes: int,
        config: EngineConfig,
        on_choice: OnChoice | None = None,
        evaluated: str = "",
    ) -> None:
        """Raises InputError and its kin for what is wrong whatever resources the nodes have.

        `on_choice` is called with every choice that is made. `evaluated`: why MLX cannot compute
        the layers in its graph.
        """
        self._evaluated = evaluated
        self._way, self._info, self._config, self._on_choice = request.way, info, config, on_choice
        self._from_file: Placement | None = None
        self._usage = read_usage(request.usage, info) if request.usage is not None else None
        if request.way not in WAYS:
            self._from_file = _read_file(Path(request.way), info, nodes)
        else:
            check_way(request.way, info.shape, nodes)

    def resolve(self, resources: Sequence[NodeResources]) -> Placement:
        """The placement on nodes with these `resources`, by rank.

        Raises PlacementError where the model does not fit.
        """
        chooser = self._chooser(resources, self._config.attention == "sharded")
        choice = chooser.choose(self._way, self._from_file)
        if self._on_choice is not None:
            self._on_choice(choice)
        return choice.placement

    def divide(self, resources: Sequence[NodeResources]) -> Placement:
        """Slices for those that are left of a run in MLX's graph; all of it for one.

        Raises PlacementError, naming the missing bytes, where the model does not fit.
        """
        nodes, heads = len(resources), self._config.attention == "sharded"
        heads = heads and divides_heads(Path(self._info.path), nodes)
        way = "slices" if nodes > 1 else "experts"
        return self._chooser(resources, heads).choose(way).placement

    def _chooser(self, resources: Sequence[NodeResources], sharded: bool) -> Chooser:
        config = self._config
        return Chooser(
            self._info,
            resources,
            device=_device(config),
            network=RDMA if config.backend == "jaccl" else NETWORK,
            schedule=config.schedule,
            policy=config.policy,
            usage=self._usage,
            evaluated=self._evaluated,
            sharded=sharded,
        )


def _device(config: EngineConfig) -> Device:
    """What computes on this node, and so, as far as is known, on the others."""
    if is_native(config):
        return KERNELS
    if mx.default_device() == mx.Device(mx.cpu):
        return CPU
    if mx.metal.is_available():
        is_fast = os.environ.get("MLX_METAL_FAST_SYNCH") == "1"
        return replace(METAL, crossing_s=FAST_CROSSING_S) if is_fast else METAL
    return replace(CUDA, crossing_s=0.0) if config.backend == "nccl" else CUDA  # on the GPU itself


def _read_file(path: Path, info: ModelInfo, nodes: int) -> Placement:
    if not path.exists():
        expected = f"{', '.join(WAYS)}, or a file that is there"
        raise SettingError("placement", f"is {path}: expected {expected}")
    placement = read_placement(path, len(info.moe_layers))
    if placement.nodes != nodes:
        raise PlacementError(
            f"placement {path} is for {placement.nodes} nodes, the run has {nodes}"
        )
    try:
        check_placement(placement, info.shape)
    except PlacementError as error:
        raise PlacementError(f"placement {path}: {error}") from None
    return placement
