"""Draws tokens from logits on MLX's device, so that the next step need not wait for the host.

It gives what zmoe.engine.sampler gives for the settings that need nothing of the host, but in
float32: a random number on the very border between two tokens may give the other one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_BLOCK = 512  # weights that are summed before they are searched
_LEAST_TEMPERATURE = 1e-30


class Draw(NamedTuple):
    """How one token is drawn: Sampling's settings, and the random number in [0, 1)."""

    temp: float
    top_p: float
    min_p: float
    top_k: int
    share: float


class Drawn(NamedTuple):
    """`tokens` (rows,), and the largest logit of each row: a number unless they hold NaN or
    infinity.
    """

    tokens: npt.NDArray[np.uint32]
    largest: npt.NDArray[np.float32]


def draw(logits: mx.array, draws: Sequence[Draw]) -> tuple[mx.array, mx.array]:
    """What Drawn has, lazy, of `logits` (rows, vocabulary), float32; one Draw a row."""
    most, greedy = logits.max(axis=-1, keepdims=True), logits.argmax(axis=-1)
    if all(each.temp == 0 for each in draws):
        return greedy, most[:, 0]
    kept = logits if all(each[1:4] == (1, 0, 0) for each in draws) else _filtered(logits, draws)
    temps = _column([max(each.temp, _LEAST_TEMPERATURE) for each in draws])
    drawn = _invert(mx.exp((kept - most) / temps), _column([each.share for each in draws]))
    is_greedy = mx.array([each.temp == 0 for each in draws])
    return mx.where(is_greedy, greedy, drawn), most[:, 0]


def _column(values: list[float]) -> mx.array:
    return mx.array(values, mx.float32)[:, None]


def _filtered(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """`logits` with -inf in the place of what top-p, min-p and top-k of each row drop."""
    vocabulary = logits.shape[-1]
    ordered = -mx.sort(-logits, axis=-1)
    sums = mx.softmax(ordered, axis=-1, precise=True).cumsum(axis=-1)
    # Past the end where it is off.
    wanted = _column([each.top_p if each.top_p < 1 else 2 for each in draws])
    last = mx.minimum((sums < wanted).sum(axis=-1, keepdims=True), vocabulary - 1)
    least_share = [math.log(each.min_p) if each.min_p else -math.inf for each in draws]
    least = ordered[:, :1] + _column(least_share)
    least = mx.maximum(least, mx.take_along_axis(ordered, last, axis=-1))
    counts = mx.array([each.top_k or vocabulary for each in draws])[:, None]
    border = mx.take_along_axis(ordered, counts - 1, axis=-1)
    above, equal = logits > border, logits == border
    first = equal.cumsum(axis=-1) <= counts - above.sum(axis=-1, keepdims=True)
    keeps = (logits >= least) & (above | (equal & first))
    return mx.where(keeps, logits, -math.inf)


def _invert(weights: mx.array, share: mx.array) -> mx.array:
    """The index (rows,) at which each row's running sum exceeds `share` of the whole sum; by
    blocks, then within one.
    """
    rows, count = weights.shape
    blocks = mx.pad(weights, [(0, 0), (0, -count % _BLOCK)]).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1).cumsum(axis=-1)
    wanted = share * sums[:, -1:]
    block = _exceeds(sums, wanted)
    before = mx.where(block > 0, mx.take_along_axis(sums, mx.maximum(block, 1) - 1, axis=-1), 0)
    within = mx.take_along_axis(blocks, block[..., None], axis=1)[:, 0].cumsum(axis=-1)
    return (block * _BLOCK + _exceeds(within, wanted - before))[:, 0].astype(mx.uint32)


def _exceeds(sums: mx.array, wanted: mx.array) -> mx.array:
    """The first index (rows, 1) where `sums` exceeds `wanted`; at most, despite rounding, that of
    the last weight above zero.
    """
    last = (sums < sums[:, -1:]).sum(axis=-1, keepdims=True)
    return mx.minimum((sums <= wanted).sum(axis=-1, keepdims=True), last)
