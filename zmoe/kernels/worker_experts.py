"""The experts of a node that holds nothing else, on the kernels or on MLX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from zmoe.exchange.buffers import DTYPES
from zmoe.exchange.dispatched import DispatchBatch
from zmoe.kernels.arrays import as_array
from zmoe.kernels.experts import NativeExperts
from zmoe.moe.experts import Experts, MlxExperts, weighted_sum
from zmoe.native import ffi
from zmoe.placement.assignment import Idle
from zmoe.placement.pairs import Ints, LocalPairs, no_experts

_MLX = {dtype: mlx for mlx, dtype in DTYPES.items()}


class WorkerExperts:
    """One layer's own experts: from received rows and pairs to partial sums.

    `local` maps expert ids to this node's numbering; `width` is that of the rows, `dtype`
    that of the sums.
    """

    def __init__(
        self,
        experts: int,
        owned: Sequence[int],
        width: int,
        switch: Any,
        native: NativeExperts | None,
        hook: Callable[[mx.array], mx.array] | None,
        dtype: mx.Dtype,
        policy: str = "selected",
    ) -> None:
        """`native` are those of `switch` on the kernels; None: MLX computes."""
        self.local: Ints = np.full(experts, -1, np.int32)
        self.local[list(owned)] = np.arange(len(owned))
        self.width, self.dtype = width, dtype
        self._native = native if native is not None and native.is_fused and hook is None else None
        self._experts: Experts = native or MlxExperts(switch)
        self._hook = hook
        self._pairs = ffi.new("zmoe_pairs *")
        self._idle = Idle(policy, len(owned))

    def partial(self, received: DispatchBatch) -> Any:
        """The weighted sum of each row's pairs: (rows, width), float32 or `dtype`.

        Valid until the next layer's.
        """
        if self._native is None:
            return self._by_arrays(received)
        raw, pairs, out = received.raw, self._pairs, received.sums()
        pairs.rows, pairs.experts, pairs.weights = raw.pair_rows, raw.pair_experts, raw.pair_weights
        pairs.count = raw.pairs
        self._native.sum_pairs(raw.x, _MLX[received.dtype], received.rows, pairs, out)
        return out

    def run_idle(self, received: DispatchBatch) -> None:
        """Run the experts that the policy adds, of no row."""
        if self._idle.most == 0:
            return
        mine = np.unique(received.pairs()[0].experts)
        idle = self._idle.beside(mine, received.busiest)
        if len(idle):
            none = no_experts()
            row = mx.zeros((1, received.width), _MLX[received.dtype])
            mx.eval(self._experts.outputs(row, LocalPairs(none, none, none, idle)))

    def _by_arrays(self, received: DispatchBatch) -> mx.array:
        x = as_array(received.x, _MLX[received.dtype], (received.rows, received.width))
        pairs, weights = received.pairs()
        return weighted_sum(self._experts, self._hook, x, pairs, weights, self.dtype)
