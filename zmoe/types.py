"""The words that several rooms share: placement, model description, all-reduce."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt


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
    expert_hidden: int  # the inner width of an expert
    granule: int  # slices of it begin and end at multiples; 0: the layers' widths differ
    expert_parameters: int  # of one expert
    expert_bytes: int  # of one expert of one layer, in the mean
    dense_bytes: int  # of everything but the routed experts
    exchange_width: int  # most elements that one row takes on the wire in any layer
    context_length: int | None


def nothing() -> None:
    """What there is to do beside an exchange when there is nothing."""


class Reducer(Protocol):
    """The all-reduce as one MoE layer sees it."""

    rank: int
    nodes: int

    def all_reduce(
        self,
        layer: int,
        partial: mx.array | None,
        shape: tuple[int, int],
        dtype: mx.Dtype,
        digest: int,
        overlap: Callable[[], None] = nothing,
    ) -> mx.array:
        """Sum the ranks' partial outputs of MoE layer `layer` (ordinal).

        `partial` (rows, width) float, evaluated or not; None adds nothing.
        `digest` is that of the routing and must agree on all ranks. `overlap`
        is called while the exchange is in flight. Returns (rows, width) of
        `dtype`, valid until the second next call. Raises PeerError,
        DivergenceError.
        """
        ...

    def all_reduce_host(
        self,
        layer: int,
        partial: npt.NDArray[np.float32] | None,
        out: npt.NDArray[np.float32],
        dtype: mx.Dtype,
        digest: int,
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """The same from memory to memory: both (rows, width) float32, `dtype` on the wire."""
        ...
