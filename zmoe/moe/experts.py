"""The matmuls of this node's own experts, and their weighted sum per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from zmoe.placement.pairs import Floats, Ints, LocalPairs

Switch = Any  # SwitchGLU, SwitchMLP, or a subclass


class Experts(Protocol):
    """A node's own experts of one layer, whatever computes them.

    They run the padding of the pairs too, in the same call, and drop what it gives.
    """

    def outputs(self, x: mx.array, pairs: LocalPairs) -> mx.array:
        """The output of each pair: (pairs, hidden_size) from x (tokens, hidden_size)."""
        ...

    def partial(self, x: mx.array, pairs: LocalPairs, weights: Floats, dtype: mx.Dtype) -> mx.array:
        """The local part of the block's routed output: (tokens, hidden_size) of `dtype`.

        `weights` (tokens, k) float32; there is at least one pair.
        """
        ...


def weighted_sum(
    experts: Experts,
    hook: Callable[[mx.array], mx.array] | None,
    x: mx.array,
    pairs: LocalPairs,
    weights: Floats,
    dtype: mx.Dtype,
) -> mx.array:
    """`experts.partial`, evaluated, with `hook` applied to each pair's output if there is one."""
    if hook is None:
        part = experts.partial(x, pairs, weights, dtype)
    else:
        part = combine(hook(experts.outputs(x, pairs)), pairs, weights, x.shape[0]).astype(dtype)
    mx.eval(part)
    return part


def with_padding(x: mx.array, pairs: LocalPairs) -> tuple[mx.array, LocalPairs]:
    """Append a row of zeros to x, and the padding's pairs to `pairs`."""
    if not len(pairs.padding):
        return x, pairs
    more = len(pairs.padding)
    rows = np.concatenate([pairs.rows, np.full(more, x.shape[0], np.int32)])
    slots = np.concatenate([pairs.slots, np.zeros(more, np.int32)])
    experts = np.concatenate([pairs.experts, pairs.padding])
    zeros = mx.zeros((1, x.shape[1]), x.dtype)
    return mx.concatenate([x, zeros]), LocalPairs(rows, slots, experts)


class MlxExperts:
    """The experts of a switch layer on MLX."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def outputs(self, x: mx.array, pairs: LocalPairs) -> mx.array:
        y = expert_outputs(self._switch, *with_padding(x, pairs))
        return y[: len(pairs.rows)] if len(pairs.padding) else y

    def partial(self, x: mx.array, pairs: LocalPairs, weights: Floats, dtype: mx.Dtype) -> mx.array:
        return combine(self.outputs(x, pairs), pairs, weights, x.shape[0]).astype(dtype)


def expert_outputs(switch: Switch, x: mx.array, pairs: LocalPairs) -> mx.array:
    """The output of each pair: (pairs, hidden_size) from x (tokens, hidden_size)."""
    return (gathered if gathers(switch, x.dtype) else grouped)(switch, x, pairs)


def linears(switch: Switch) -> tuple[Any, ...]:
    """The linear layers of a switch layer; the last comes last."""
    if isinstance(switch, SwitchGLU):
        return switch.gate_proj, switch.up_proj, switch.down_proj
    return switch.fc1, switch.fc2


def gathers(switch: Switch, dtype: mx.Dtype) -> bool:
    """Whether MLX's gathering matmuls take inputs of `dtype` on this device.

    On the CPU gather_mm knows float32 alone; gather_qmm all three types.
    """
    return mx.default_device() != mx.cpu or all(
        isinstance(layer, QuantizedSwitchLinear) or dtype == layer.weight.dtype == mx.float32
        for layer in linears(switch)
    )


def gathered(switch: Switch, x: mx.array, pairs: LocalPairs) -> mx.array:
    """One gathering matmul over all pairs, as mlx-lm's own layer does it."""
    y: mx.array = switch(x[mx.array(pairs.rows)], mx.array(pairs.experts)[:, None])
    return y.squeeze(1)


def grouped(switch: Switch, x: mx.array, pairs: LocalPairs) -> mx.array:
    """One plain matmul per expert that has tokens."""
    order = np.argsort(pairs.experts, kind="stable")
    experts, starts = np.unique(pairs.experts[order], return_index=True)
    rows = x[mx.array(pairs.rows[order])]
    parts = mx.split(rows, starts[1:].tolist()) if len(experts) > 1 else [rows]
    y = [_one_expert(switch, part, int(e)) for part, e in zip(parts, experts, strict=True)]
    back = np.empty(len(order), np.int32)
    back[order] = np.arange(len(order), dtype=np.int32)
    return mx.concatenate(y)[mx.array(back)]


def _one_expert(switch: Switch, x: mx.array, expert: int) -> mx.array:
    if isinstance(switch, SwitchGLU):
        up, gate = _linear(switch.up_proj, x, expert), _linear(switch.gate_proj, x, expert)
        return _linear(switch.down_proj, switch.activation(up, gate), expert)
    return _linear(switch.fc2, switch.activation(_linear(switch.fc1, x, expert)), expert)


def _linear(layer: Any, x: mx.array, expert: int) -> mx.array:
    if isinstance(layer, QuantizedSwitchLinear):
        quantized: mx.array = layer(x[:, None], mx.full((x.shape[0],), expert, mx.uint32))
        return quantized.squeeze(1)
    y: mx.array = x @ layer.weight[expert].T
    return y + layer.bias[expert] if "bias" in layer else y


def combine(y: mx.array, pairs: LocalPairs, weights: Floats, tokens: int) -> mx.array:
    """Sum the pairs of each token by weight, in float32: (tokens, hidden_size).

    `weights` (tokens, k) float32. Gathers instead of scattering, so that the
    order of the sum never depends on the device's scheduling.
    """
    y = y.astype(mx.float32)
    index, scale = _per_token(pairs, weights, tokens)
    if index.size == len(pairs.rows):  # as many for each token, so already in place
        placed = y.reshape(*index.shape, -1)
    else:
        placed = mx.concatenate([y, mx.zeros((1, y.shape[-1]))])[mx.array(index)]
    return (placed * mx.array(scale)[..., None]).sum(axis=1)


def _per_token(pairs: LocalPairs, weights: Floats, tokens: int) -> tuple[Ints, Floats]:
    """For each token the places of its pairs and their weights, padded to one width.

    The padding points behind the last pair, with weight 0.
    """
    counts = np.bincount(pairs.rows, minlength=tokens)
    total = len(pairs.rows)
    nth = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((tokens, int(counts.max())), total, np.int32)
    index[pairs.rows, nth] = np.arange(total)
    scale = np.zeros(index.shape, np.float32)
    scale[pairs.rows, nth] = weights[pairs.rows, pairs.slots]
    return index, scale
