"""The experts of a node that holds nothing else, on the kernels or on MLX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from zmoe.compute.arrays import as_array
from zmoe.compute.experts import NativeExperts
from zmoe.moe.central import Received
from zmoe.moe.experts import Experts, MlxExperts, combine
from zmoe.moe.receive import DTYPES
from zmoe.moe.router import Floats, Ints, LocalPairs, Ownership
from zmoe.native import ffi

_MLX = {dtype: mlx for mlx, dtype in DTYPES.items()}


class HeldExperts:
    """One layer's own experts: from received rows and pairs to partial sums.

    `local` maps expert ids to this node's numbering; `dtype` is that of the sums.
    """

    def __init__(
        self,
        experts: int,
        owned: Sequence[int],
        switch: Any,
        native: NativeExperts | None,
        hook: Callable[[mx.array], mx.array] | None,
        dtype: mx.Dtype,
    ) -> None:
        """`native` are those of `switch` on the kernels; None: MLX computes."""
        self.local: Ints = Ownership(experts, owned).local
        self.dtype = dtype
        self._native = native if native is not None and native.is_fused and hook is None else None
        self._experts: Experts = native or MlxExperts(switch)
        self._hook = hook
        self._sums: Floats = np.empty(0, np.float32)
        self._pairs = ffi.new("zmoe_pairs *")

    def partial(self, received: Received) -> Any:
        """The weighted sum of each row's pairs: (rows, width), float32 or `dtype`."""
        if self._native is None:
            return self._by_arrays(received)
        rows, width, raw = received.rows, received.width, received.raw
        if self._sums.size < rows * width:
            self._sums = np.empty(rows * width, np.float32)
        out = self._sums[: rows * width]
        pairs = self._pairs
        pairs.rows, pairs.experts, pairs.weights = raw.pair_rows, raw.pair_experts, raw.pair_weights
        pairs.count = raw.pairs
        self._native.sum_pairs(raw.x, _MLX[received.dtype], rows, pairs, out)
        return out

    def _by_arrays(self, received: Received) -> mx.array:
        x = as_array(received.x, _MLX[received.dtype], (received.rows, received.width))
        pairs, weights = received.pairs()
        if self._hook is None:
            part = self._experts.partial(x, pairs, weights, self.dtype)
        else:
            y = self._hook(self._experts.outputs(x, pairs))
            part = combine(y, pairs, weights, received.rows).astype(self.dtype)
        mx.eval(part)
        return part
