"""The last matmul of attention whose heads are spread over the nodes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from zmoe.moe.graph import Graph


class HeadsToAll(Module):
    """Stands in for mlx's (Quantized)ShardedToAllLinear `linear`, and sums in `graph`."""

    def __init__(self, linear: Any, layer: int, graph: Graph) -> None:
        """`layer`: the MoE layer that comes next."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        self._layer, self._graph = layer, graph

    def __call__(self, x: mx.array) -> mx.array:
        """The output (..., width) of all heads; `x` (..., inputs) is that of this node's."""
        y = self._of_own(x)
        total = self._graph.sum(self._layer, y.astype(self._graph.dtype)).astype(y.dtype)
        return total + self.linear["bias"] if "bias" in self.linear else total

    def _of_own(self, x: mx.array) -> mx.array:
        linear = self.linear
        if "scales" not in linear:
            return mx.matmul(x, linear["weight"].T)
        return mx.quantized_matmul(
            x,
            linear["weight"],
            scales=linear["scales"],
            biases=linear.get("biases"),
            transpose=True,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
