"""The all-reduce as one MoE layer sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt


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
