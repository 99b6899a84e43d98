"""Which placement a run takes: the one that was asked for, or the fastest by the cost model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from zmoe.errors import PlacementError
from zmoe.perf.hardware import KERNELS, Device
from zmoe.perf.links import Link
from zmoe.perf.memory import PROGRAM_BYTES
from zmoe.perf.units import in_bytes
from zmoe.placement.build import resident, ways
from zmoe.placement.estimate import NETWORK, NodeResources, on_one_machine, setup_of, speeds_of
from zmoe.placement.placed import placed_of
from zmoe.placement.predict import MARGIN, Prediction, evaluate, preferred
from zmoe.placement.remedy import counted, remedy
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import Usage

# Slices are copies, which no system takes back when others need memory, unlike mapped experts.
MOST_COPIED = 0.5  # of a machine's memory, unless a limit says what the nodes may take
OVERRIDE = "(--memory-limit sets what a node may take)"
EVALUATED, IN_GRAPH, SHARDED = "evaluated", "in MLX's graph", " with sharded attention"


@dataclass(frozen=True)
class Alternative:
    """A placement that was considered. `remark`: why there is none, or no prediction;
    `missing`: the bytes that its most crowded node lacks. `form`: how MLX would compute it.
    """

    label: str
    placement: Placement | None = None
    prediction: Prediction | None = None
    remark: str = ""
    missing: int = 0
    form: str = ""

    @property
    def seconds(self) -> float | None:
        """Of one decoded token."""
        return self.prediction.decode.total if self.prediction else None

    @property
    def name(self) -> str:
        return f"{self.label}, {self.form}" if self.form else self.label


@dataclass(frozen=True)
class Choice:
    """What was chosen and why, and what predictions `assumed`. Bytes of experts by node:
    `capacity` for them, and how much is `resident`. `evaluated`: why MLX evaluates the layers
    one by one, "" if it computes them in its graph.
    """

    placement: Placement
    label: str
    why: str
    considered: tuple[Alternative, ...]
    assumed: str
    speeds: tuple[int, ...]
    capacity: tuple[int, ...]
    resident: tuple[int, ...]
    evaluated: str | None = None  # None: MLX does not compute


class Chooser:
    """Chooses for a model on the nodes that `offers` describe.

    `device` computes; KERNELS with what the nodes map of the checkpoint. `network` joins the
    machines. `schedule` and `policy`: those of the run. `usage`: how often experts are chosen,
    for replicas. `evaluated`: why MLX could not compute slices in its graph, "" if it can.
    `sharded`: attention is to be, in the graph.
    """

    def __init__(
        self,
        info: ModelInfo,
        offers: Sequence[NodeResources],
        *,
        device: Device = KERNELS,
        network: Link = NETWORK,
        schedule: str = "decentralized",
        policy: str = "selected",
        usage: Usage | None = None,
        evaluated: str = "",
        sharded: bool = False,
    ) -> None:
        self._info, self._offers, self._mapped = info, tuple(offers), device == KERNELS
        self._evaluated, self._sharded = evaluated, sharded
        self._counts = usage.counts if usage is not None else None
        self._speeds = speeds_of(offers)
        self._setup, self._capacity = setup_of(
            info, offers, device, network, schedule, policy, sharded
        )
        self._slots = [max(0, each // info.expert_bytes) for each in self._capacity]

    def choose(self, way: str, given: Placement | None = None) -> Choice:
        """The placement by `way`: auto, experts, replicas, slices; or the one that is `given`
        (in the file `way`).

        Raises PlacementError when it is impossible, or does not fit the nodes' memory.
        """
        if given is not None:
            self._check_capacity(way, given)
            return self._choice(self._predicted(way, given), "as the file says", ())
        whole = self._info.experts * len(self._info.moe_layers)
        lacking = whole * self._info.expert_bytes - sum(self._capacity)
        if way == "replicas":  # of whole experts
            lacking = max(lacking, (whole - sum(self._slots)) * self._info.expert_bytes)
        if (missing := max(ceil(lacking / len(self._capacity)), -min(self._capacity))) > 0:
            raise PlacementError(self._does_not_fit(missing))
        made = ways(self._info.shape, self._speeds, self._slots, self._setup.schedule, self._counts)
        if way != "auto":
            placement = made[way]()
            if (missing := self._missing(placement)) > 0:
                raise PlacementError(self._does_not_fit(missing))
            return self._choice(self._predicted(way, placement), "as was asked for", ())
        if len(self._offers) == 1:
            alone = self._predicted("experts", made["experts"]())
            return self._choice(alone, "there is one node", ())
        considered: list[Alternative] = []
        for label, make in made.items():
            considered.append(self._considered(label, make, considered))
        best, why = fastest(considered)
        if best.placement is None:
            short = [each.missing for each in considered if each.missing]
            raise PlacementError(self._does_not_fit(min(short)) if short else best.remark)
        return self._choice(best, why, tuple(considered))

    # ---- auto ----------------------------------------------------------------------

    def _considered(
        self, label: str, make: Callable[[], Placement], before: Sequence[Alternative]
    ) -> Alternative:
        remark = self._out_of_question(label)
        if remark:
            return Alternative(label, remark=remark)
        try:
            placement = make()
        except PlacementError as error:
            return Alternative(label, remark=str(error))
        missing = self._missing(placement)
        if missing > 0:
            remark = f"{in_bytes(missing)} are missing on a node"
            return Alternative(label, remark=remark, missing=missing)
        if label == "slices" and self._mapped and self._copies_too_much(placement):
            return Alternative(
                label, remark="copies of them would take more than half of a machine's memory"
            )
        for other in before:
            if other.placement == placement:
                return Alternative(label, remark=f"the same as {other.label}")
        return self._predicted(label, placement)

    def _out_of_question(self, label: str) -> str:
        """Why `auto` does not even look at a way, where it does not."""
        if label == "replicas" and on_one_machine(self._offers):
            return "the nodes share one machine's memory"
        if label == "slices" and not self._mapped and self._evaluated:
            return "no figures for MLX's matmuls on slices"
        return ""

    def _why_evaluated(self, placement: Placement) -> str | None:
        """See Choice.evaluated."""
        if self._mapped:
            return None
        return self._evaluated or ("" if placement.nodes == 1 else placement.unsliced)

    def _predicted(self, label: str, placement: Placement) -> Alternative:
        """In the form that a run takes."""
        in_graph = self._why_evaluated(placement) == ""
        return self._in_form(label, placement, in_graph, in_graph and self._sharded)

    def _in_form(
        self, label: str, placement: Placement, in_graph: bool, sharded: bool
    ) -> Alternative:
        form = "" if self._mapped else EVALUATED
        if in_graph:
            form = IN_GRAPH + (SHARDED if sharded else "")
        placed = placed_of(placement, self._info.moe_intermediate_size, label)
        remark, prediction = "slices with copies are not modelled", None
        if placed is not None:
            setup = replace(self._setup, in_graph=in_graph, sharded=sharded)
            try:
                remark, prediction = "", evaluate(setup, placed)
            except PlacementError as error:  # replicas on more nodes than can be counted
                remark = str(error)
        return Alternative(label, placement, prediction, remark, form=form)

    def _other_forms(self, chosen: Alternative) -> tuple[Alternative, ...]:
        """Of a placement that MLX computes in its graph."""
        placement = chosen.placement
        if placement is None or self._why_evaluated(placement) != "":
            return ()
        evaluated = self._in_form(chosen.label, placement, False, False)
        if placement.nodes == 1:
            return (evaluated,)
        return (self._in_form(chosen.label, placement, True, not self._sharded), evaluated)

    # ---- memory --------------------------------------------------------------------

    def _bytes(self, placement: Placement) -> tuple[int, ...]:
        shares = resident(placement, self._info.moe_intermediate_size)
        return tuple(ceil(share * self._info.expert_bytes) for share in shares)

    def _missing(self, placement: Placement) -> int:
        """Bytes that the node which lacks most lacks; none or less: it fits."""
        return max(need - most for need, most in zip(self._bytes(placement), self._capacity))

    def _copies_too_much(self, slices: Placement) -> bool:
        """Whether slices would take more than MOST_COPIED of a machine that sets no limit."""
        taken, memory = Counter[str](), dict[str, int]()
        for offer, copied in zip(self._offers, self._bytes(slices)):
            if offer.limit is None:
                taken[offer.machine] += copied
                memory[offer.machine] = max(offer.memory, memory.get(offer.machine, 0))
        return any(taken[name] > MOST_COPIED * memory[name] for name in taken)

    def _check_capacity(self, way: str, placement: Placement) -> None:
        """Name the first expert of a file's placement that its node has no room for."""
        parts = placement.slices or ((0, self._info.moe_intermediate_size),) * placement.nodes
        for node, (capacity, (start, end)) in enumerate(zip(self._capacity, parts)):
            each = self._info.expert_bytes * (end - start) / self._info.moe_intermediate_size
            taken = 0.0
            for layer, owned in enumerate(placement.owned):
                for expert in owned[node]:
                    taken += each
                    if taken > capacity:
                        need = self._bytes(placement)[node]
                        raise PlacementError(
                            f"placement {way}: node {node} has no room for expert {expert} of "
                            f"layer {layer}: {in_bytes(need)} of experts, "
                            f"and room for {in_bytes(capacity)} {OVERRIDE}"
                        )

    def _does_not_fit(self, missing: int) -> str:
        """What is missing on each node, and what would do."""
        name, nodes = Path(self._info.path).name, len(self._offers)
        lacking = f"{in_bytes(missing)} are missing per node"
        if not on_one_machine(self._offers) or any(o.limit is not None for o in self._offers):
            would = remedy(self._setup, nodes)
            return f"{name} does not fit {counted(nodes)}: {lacking}; {would} {OVERRIDE}"
        # More nodes would not add memory here, but more machines would.
        memory = max(offer.memory for offer in self._offers) - (nodes - 1) * PROGRAM_BYTES
        machine = replace(self._setup.machines[0], memory_bytes=memory)
        setup = replace(self._setup, machines=(machine,))
        would = remedy(setup, 1, "machine")
        return f"{name} does not fit this machine: {lacking}; {would} {OVERRIDE}"

    def _choice(self, chosen: Alternative, why: str, considered: tuple[Alternative, ...]) -> Choice:
        link, crossing_s = self._setup.link, self._setup.machines[0].crossing_s
        assert chosen.placement is not None and link is not None
        evaluated = self._why_evaluated(chosen.placement)
        assumed = f"{self._setup.schedule}, {1e6 * link.latency_s:.0f} us an exchange"
        if evaluated == "" and crossing_s is not None and chosen.placement.nodes > 1:
            assumed += f", {1e6 * crossing_s:.0f} us a crossing"
        return Choice(
            chosen.placement,
            chosen.label,
            why,
            (considered or (chosen,)) + self._other_forms(chosen),
            assumed,
            self._speeds,
            tuple(self._capacity),
            self._bytes(chosen.placement),
            evaluated,
        )


def fastest(considered: Sequence[Alternative]) -> tuple[Alternative, str]:
    """Of those that are possible the preferred one by prediction, and why.

    `considered` begins with whole experts spread evenly.
    """
    even = considered[0]
    predicted = [each.prediction for each in considered if each.prediction is not None]
    if not predicted:
        usable = [each for each in considered if each.placement is not None]
        return (usable or [even])[0], "the only one that is possible"
    taken = preferred(predicted)
    best = next(each for each in considered if each.prediction is taken)
    if even.seconds is None:
        return best, "the fastest by prediction that fits"
    if best is even:
        return even, f"no other is predicted to be {MARGIN:.0%} faster"
    gain = 1 - taken.decode.total / even.seconds
    why = f"predicted to be {gain:.0%} faster than whole experts spread evenly"
    if taken.setup.in_graph:
        why = "MLX computes them in one graph per step" + (f", {why}" if gain >= MARGIN else "")
    return best, why
