"""From what the user asks of the placement to the one that a run takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from zmoe.cluster.spec import PlacementRequest
from zmoe.config import EngineConfig
from zmoe.errors import PlacementError, SettingError
from zmoe.kernels.threads import is_native
from zmoe.placement.build import place_evenly, place_slices
from zmoe.placement.check import check_placement
from zmoe.placement.choose import Choice, Chooser
from zmoe.placement.estimate import Offer
from zmoe.placement.file import read_placement
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import read_usage

WAYS = ("auto", "experts", "replicas", "slices")
OnChoice = Callable[[Choice], None]


class Placing:
    """A request for one model and run, its files read and checked."""

    def __init__(
        self,
        request: PlacementRequest,
        info: ModelInfo,
        nodes: int,
        config: EngineConfig,
        on_choice: OnChoice | None = None,
    ) -> None:
        """Raises InputError and its kin for what is wrong whatever the nodes have."""
        self._way, self._info, self._config, self._on_choice = request.way, info, config, on_choice
        self._given: Placement | None = None
        self._usage = read_usage(request.usage, info) if request.usage is not None else None
        if request.way not in WAYS:
            self._given = _from_file(Path(request.way), info, nodes)
        elif request.way == "slices":
            place_slices(info, [1] * nodes, [info.experts * len(info.moe_layers)] * nodes)
        elif request.way != "replicas":
            place_evenly(info, nodes)

    def choose(self, offers: Sequence[Offer]) -> Placement:
        """The placement on nodes that bring `offers`. Raises PlacementError."""
        chooser = Chooser(
            self._info,
            offers,
            mapped=is_native(self._config),
            schedule=self._config.schedule,
            policy=self._config.policy,
            usage=self._usage,
        )
        choice = chooser.choose(self._way, self._given)
        if self._on_choice is not None:
            self._on_choice(choice)
        return choice.placement


def check(placement: Placement, info: ModelInfo) -> None:
    """Raise PlacementError, which names expert, layer and node, for what does not fit `info`."""
    layers = len(info.moe_layers)
    check_placement(placement, info.experts, layers, info.expert_hidden, info.granule)


def _from_file(path: Path, info: ModelInfo, nodes: int) -> Placement:
    if not path.exists():
        expected = f"{', '.join(WAYS)}, or a file that is there"
        raise SettingError("placement", f"is {path}: expected {expected}")
    placement = read_placement(path, len(info.moe_layers))
    if placement.nodes != nodes:
        raise PlacementError(
            f"placement {path} is for {placement.nodes} nodes, the run has {nodes}"
        )
    try:
        check(placement, info)
    except PlacementError as error:
        raise PlacementError(f"placement {path}: {error}") from None
    return placement
