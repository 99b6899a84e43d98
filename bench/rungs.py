"""The ladder's rungs: what each is, what it sends, what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zmoe.checkpoint.folder import read_tensors
from zmoe.checkpoint.select import of_experts
from zmoe.loading import Skeleton, describe
from zmoe.perf.routing import distinct_experts, expected_largest
from zmoe.placement.spread import proportional
from zmoe.placement.types import ModelInfo

EMBEDDINGS = ("embed_tokens", "wte")


@dataclass(frozen=True)
class Rung:
    """One design: zmoe with `settings` (its flags), or, without any, bench/peers/naive.py.

    `before` is the rung that it is compared with.
    """

    name: str
    before: str | None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        return "zmoe_cluster.py" if self.settings else "naive.py"

    def flags(self) -> list[str]:
        """As words of a command line."""
        return [f"--{name}={value}" for name, value in self.settings.items()]

    @property
    def is_decentralized(self) -> bool:
        return self.settings.get("schedule") == "decentralized"

    def messages(self, top_k: int, nodes: int) -> float:
        """Sent by all nodes in a layer, for one row; the mean."""
        if not self.settings:  # one out and one back for each expert that is elsewhere
            return 2 * top_k * (nodes - 1) / nodes
        return (nodes if self.is_decentralized else 2) * (nodes - 1)

    def executed(self, info: ModelInfo, nodes: int) -> float | None:
        """Experts that the busiest node computes in a layer, for one row; None: who knows.

        The mean over choices that are uniform, as the performance model has it.
        """
        placement = self.settings.get("placement", "experts")
        if placement == "slices":
            return info.top_k / nodes
        if placement != "experts":
            return None
        local = proportional(info.experts, [1] * nodes)
        if self.settings.get("policy") == "busy-full":
            return max(local)
        return expected_largest(local, distinct_experts(info.experts, info.top_k, 1))

    def executed_by_all(self, info: ModelInfo, nodes: int) -> float | None:
        """The same of all nodes together."""
        policy = self.settings.get("policy", "selected")
        if policy == "selected":
            return info.top_k
        if policy == "busy-full":
            return info.experts
        busiest = self.executed(info, nodes)
        return None if busiest is None else nodes * busiest


CENTRALIZED = {"schedule": "centralized", "placement": "experts"}
DECENTRALIZED = {"schedule": "decentralized", "placement": "experts"}
OURS = {**DECENTRALIZED, "policy": "selected"}

RUNGS = {
    rung.name: rung
    for rung in (
        Rung("naive", None),
        Rung("P", "naive", {**CENTRALIZED, "policy": "selected"}),
        Rung("P+L_B", "P", {**CENTRALIZED, "policy": "busy-full"}),
        Rung("P+L_R", "P", {**CENTRALIZED, "policy": "router-aided"}),
        Rung("P+L_R+D", "P+L_R", {**DECENTRALIZED, "policy": "router-aided"}),
        Rung("D", "P+L_R+D", OURS),
        Rung("replicas", "D", {**OURS, "placement": "replicas"}),
        Rung("slices", "D", {**OURS, "placement": "slices"}),
        Rung("int8", "D", {**OURS, "activations": "int8"}),
    )
}


@dataclass(frozen=True)
class Bytes:
    """Of a model's weights: all that a token reads but experts, and one expert of one layer."""

    dense: int
    head: int
    expert: float

    def of_busiest(self, rung: Rung, info: ModelInfo, nodes: int) -> float | None:
        """Read for one token by the node that reads most."""
        executed = rung.executed(info, nodes)
        if executed is None:
            return None
        return self.dense + self.head + len(info.moe_layers) * executed * self.expert

    def of_all(self, rung: Rung, info: ModelInfo, nodes: int) -> float | None:
        """Read for one token by all nodes together."""
        executed = rung.executed_by_all(info, nodes)
        if executed is None:
            return None
        dense = self.dense * (nodes if rung.is_decentralized else 1) + self.head
        return dense + len(info.moe_layers) * executed * self.expert


def model_bytes(folder: Path) -> tuple[ModelInfo, Bytes]:
    """What a model is, and its sizes, from the headers of its files."""
    info, dense, head, experts = describe(Skeleton(folder)), 0, 0, 0
    for name, tensor in read_tensors(folder).items():
        words = name.split(".")
        if of_experts(tensor, info.experts, info.moe_layers):
            experts += tensor.nbytes
        elif "lm_head" in words:
            head += tensor.nbytes
        elif not set(words) & set(EMBEDDINGS):  # of which a token reads one row
            dense += tensor.nbytes
    return info, Bytes(dense, head, experts / (len(info.moe_layers) * info.experts))
