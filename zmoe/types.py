"""The words that several rooms share: placement, model description, all-reduce."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

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
    granule: int  # slices of it begin and end at multiples; 0: it has none
    expert_parameters: int  # of one expert
    expert_bytes: int  # of one expert of one layer, in the mean
    dense_bytes: int  # of everything but the routed experts
    exchange_width: int  # most elements that one row takes on the wire in any layer
    context_length: int | None
    vocabulary: int  # token ids lie below it
    has_own_cache: bool = False  # not one of keys and values alone, so it can be no window


def nothing() -> None:
    """What there is to do beside an exchange when there is nothing."""


# Of all rows (None: it adds nothing); or what computes it for rows [start, stop),
# None again where it adds nothing.
T = TypeVar("T")
Partial: TypeAlias = T | Callable[[int, int], T | None] | None


class Reducer(Protocol):
    """The all-reduce as one MoE layer sees it."""

    rank: int
    nodes: int

    def dispatch(
        self,
        layer: int,
        x: Any,
        x_dtype: mx.Dtype,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        dtype: mx.Dtype,
        digest: int,
    ) -> None:
        """Tell ranks that do not route what of MoE layer `layer` is theirs to compute.

        Called before the own part is computed, in every exchange. `x` (rows,
        width): an MLX array, evaluated or not, or the memory of one of
        `x_dtype`; `ids` and `weights` (rows, k); `dtype` and `digest` are
        all_reduce's, and `rows` and `width` its shape.
        """
        ...

    def sum_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """What to make partials and sums of, in a model of `dtype`: no narrower than it."""
        ...

    def all_reduce(
        self,
        layer: int,
        partial: Partial[mx.array],
        shape: tuple[int, int],
        dtype: mx.Dtype,
        digest: int,
        overlap: Callable[[], None] = nothing,
    ) -> mx.array:
        """Sum the ranks' partial outputs of MoE layer `layer` (ordinal).

        `partial` (rows, width) float, evaluated or not; None adds nothing. As a
        function it may be called for some of the rows while the sum of those
        before is under way, and is called for each row once, in order.
        `digest` is that of the routing and must agree on all ranks. `overlap`
        is called while the exchange is in flight. Returns (rows, width) of
        `dtype`, valid until the second next call. Raises PeerError,
        DivergenceError.
        """
        ...

    def all_reduce_host(
        self,
        layer: int,
        partial: Partial[npt.NDArray[np.float32]],
        out: npt.NDArray[np.float32],
        dtype: mx.Dtype,
        digest: int,
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """The same from memory to memory: both (rows, width) float32, `dtype` on the wire."""
        ...
