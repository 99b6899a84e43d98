"""What is placed, a model's experts, and where: on the nodes' ranks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from zmoe.perf.shape import Format, ModelShape


@dataclass(frozen=True)
class Placement:
    """Which rank owns which shards, for every MoE layer; identical on all nodes.

    `owned[m][rank]` are the ascending expert ids of `rank` in the m-th MoE
    layer (m is the ordinal that frames carry as `layer`); an expert on several
    ranks is a replica. `slices[rank]` is the half-open range of the experts'
    hidden dimension that `rank` holds of each expert it owns; empty: all hold
    whole experts. The distinct ranges of an expert's owners tile [0, hidden),
    owners of equal ranges are replicas of one another. `speeds[rank]`:
    relative speed, a positive integer, for the assignment; empty: all equal.
    """

    nodes: int
    experts: int
    owned: tuple[tuple[tuple[int, ...], ...], ...]
    slices: tuple[tuple[int, int], ...] = ()
    speeds: tuple[int, ...] = ()

    @property
    def unsliced(self) -> str:
        """Why not every rank has a slice of every expert, unlike the others'; "" if it has."""
        if not self.slices:
            return "the nodes hold whole experts"
        everything = tuple(range(self.experts))
        if any(ids != everything for layer in self.owned for ids in layer):
            return "the nodes hold slices of some experts only"
        return "" if len(set(self.slices)) == self.nodes else "slices have copies"

    @property
    def digest(self) -> str:
        """Hex digest that the hello compares."""
        parts = [self.nodes, self.experts, self.owned, self.slices, self.speeds]
        text = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model from its config and tensor headers alone."""

    path: str
    model_type: str
    fingerprint: str  # hex; equal on two nodes iff they hold the same checkpoint
    dtype: str  # of activations and routing: "float32", "float16" or "bfloat16"
    quantization: str  # "none", or such as "affine-4bit-g64"
    layers: int
    moe_layers: tuple[int, ...]  # layer index of each MoE layer, in order of execution
    experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int  # the inner width of an expert
    slice_alignment: int  # slices of it begin and end at multiples; 0: it has none
    expert_parameters: int  # of one expert
    expert_bytes: int  # of one expert of one layer, in the mean
    dense_bytes: int  # of everything but the routed experts
    exchange_width: int  # most elements that one row takes on the wire in any layer
    context_length: int | None
    vocabulary: int  # token ids lie below it
    has_own_cache: bool = False  # not one of keys and values alone, so it can be no window
    head_bytes: int = 0  # of dense_bytes, what sharded attention divides; 0: unknown, or none

    @cached_property
    def shape(self) -> ModelShape:
        """A shape of as many bytes, for any family: all weights count as stored like the
        experts, and the dense ones as read once a step.
        """
        weights = Format(8 * self.expert_bytes / self.expert_parameters)
        router = len(self.moe_layers) * self.hidden_size * self.experts
        dense = 8 * self.dense_bytes / weights.bits_per_weight
        matrix = self.hidden_size * self.moe_intermediate_size
        return ModelShape(
            name=self.path,
            hidden=self.hidden_size,
            layers=self.layers,
            attention=_DenseWeights(
                max(0, int((dense - router) / self.layers)),
                int(self.head_bytes / self.dense_bytes * dense / self.layers),
            ),
            experts=self.experts,
            top_k=self.top_k,
            expert_hidden=self.moe_intermediate_size,
            vocabulary=0,
            dense_layers=self.layers - len(self.moe_layers),
            dense_format=weights,
            expert_format=weights,
            expert_matrices=self.expert_parameters / matrix,
            slice_alignment=self.slice_alignment,
        )


@dataclass(frozen=True)
class _DenseWeights:
    """All dense weights of a layer in the place of its attention; `of_heads` are cut with these,
    for a number of nodes that is known to divide them.
    """

    weights: int
    of_heads: int = 0
    cache_elements: int = 0

    def parameters(self, hidden: int) -> int:
        return self.weights

    def attended(self, context: float, layers: int) -> float:
        return 0.0

    def score_operations(self, attended: float) -> float:
        return 0.0

    def sharded(self, nodes: int) -> _DenseWeights | None:
        """None where no weights are known to be cut."""
        if not self.of_heads:
            return None
        return _DenseWeights(self.weights - self.of_heads + self.of_heads // nodes)
