"""The all-reduce as one MoE layer sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt


def nothing() -> None:
    """What there is to do beside an exchange when there is nothing."""


T = TypeVar("T")

# A partial sum of all rows (None: it adds nothing), or a function that computes it for
# rows [start, stop) (None: these add nothing).
Partial: TypeAlias = T | Callable[[int, int], T | None] | None


class Call(NamedTuple):
    """One layer's exchange; equal on every rank.

    `layer` is the ordinal of the MoE layer. The partial sums and their sum are
    (`rows`, `width`). `dtype` is that of the partial sums on the wire, unless
    the exchange has a wire dtype of its own. `digest` is that of the routing.
    """

    layer: int
    rows: int
    width: int
    dtype: mx.Dtype
    digest: int


class Reducer(Protocol):
    """The all-reduce as one MoE layer sees it."""

    rank: int
    nodes: int

    def dispatch(
        self,
        call: Call,
        x: Any,
        x_dtype: mx.Dtype,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> None:
        """Tell the ranks that do not route which part of a layer is theirs to compute.

        It is called in every exchange, before this rank computes its own part.
        `x` (rows, width) is an MLX array, evaluated or not, or the memory of an
        array of `x_dtype`; `ids` and `weights` are (rows, k).
        """
        ...

    def sum_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """What to make partials and sums of, in a model of `dtype`: no narrower than it."""
        ...

    def takes_whole(self, call: Call) -> bool:
        """Whether nobody waits for `dispatch`, and a partial's function is called once, for all
        rows: it may have computed them before.
        """
        ...

    def all_reduce(
        self, call: Call, partial: Partial[mx.array], overlap: Callable[[], None] = nothing
    ) -> mx.array:
        """Sum the ranks' partial outputs of a layer.

        `partial` is (rows, width) of floats, evaluated or not; None adds
        nothing. A function may be called for some of the rows while the sum of
        earlier rows is under way, and is called once for each row, in order.
        `overlap` is called while the exchange is in flight. Returns (rows,
        width) of `call.dtype`, valid until the second next call. Raises
        PeerError and DivergenceError.
        """
        ...

    def all_reduce_host(
        self,
        call: Call,
        partial: Partial[npt.NDArray[np.float32]],
        out: npt.NDArray[np.float32],
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """Like all_reduce, but from memory to memory: `partial` and `out` are (rows, width)
        float32.
        """
        ...
