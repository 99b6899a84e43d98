"""Decoder layers on mlx-lm's caches whose residual stream is the kernels', as that of
zmoe.kernels.paged_model is; MLX runs what of them is not in C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from zmoe.kernels.delta_net import NativeDeltaNet
from zmoe.kernels.residual import ResidualBuffer
from zmoe.placement.pairs import Floats


class Mixer(Protocol):
    """A layer's first part, in mlx-lm's modules: mixer(input_norm(x))."""

    @property
    def input_norm(self) -> Module: ...

    @property
    def mixer(self) -> Module: ...


class HybridLayer(Module):
    """Stands in for a decoder layer h = x + mixer(norm(x)); h + feed_forward(norm(h)).

    `net` computes the mixer if it is a gated delta net without padded rows; else MLX does.
    """

    def __init__(
        self,
        layer: Any,
        parts: Mixer,
        net: NativeDeltaNet | None,
        feed_forward: Callable[[Any, Any], None],
        residual: ResidualBuffer,
        dtype: mx.Dtype,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.is_linear = layer, layer.is_linear
        self._norm, self._mixer, self._net = parts.input_norm, parts.mixer, net
        self._feed_forward, self._residual, self._dtype = feed_forward, residual, dtype

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """From x (sequences, rows, hidden_size), or the residual buffer, to the latter."""
        array, h, memory = self._residual.take(x)
        sequences = self._residual.sequences
        if self._net is None or mask is not None or cache.lengths is not None:
            self._mix(memory, sequences, mask, cache)
        else:
            self._net(h, memory, sequences, cache)
        self._feed_forward(h, memory)
        return array

    def _mix(self, memory: Floats, sequences: int, mask: Any, cache: Any) -> None:
        x = mx.array(memory).reshape(sequences, -1, memory.shape[1])
        y = self._mixer(self._norm(x).astype(self._dtype), mask, cache)
        memory += np.asarray(y.astype(mx.float32)).reshape(memory.shape)
