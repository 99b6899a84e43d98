"""Picks tokens from logits, on numpy: exact, repeatable, and the same in any batch.

Everything here depends on one row of logits alone, and the random number on (seed, position)
alone. The order is mlx-lm's: logit bias, penalties, then top-p, min-p and top-k on the
probabilities at temperature 1, then the temperature.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zmoe.config import Sampling
from zmoe.errors import ZmoeError

Logits = NDArray[np.float32]  # (vocabulary,)
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_] | NDArray[np.int32]

_HEADS = (512, 4096)  # tokens that are looked at first, and if they do not suffice
_BLOCK = 512  # weights that are summed before they are searched
_LEAST_TEMPERATURE = 1e-30  # float32 has it, and below it nothing but the likeliest is left


@dataclass(frozen=True)
class Pick:
    """A picked token.

    `logprob` is the natural logarithm of its probability in the model's own distribution,
    before mask, bias, penalties, filters and temperature, as OpenAI's is; `top_logprobs` has
    the likeliest tokens of that distribution as (id, logprob), likeliest first. None and empty
    unless the settings ask for them.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The sampler of one sequence, which knows the sequence's tokens for the penalties.

    `prompt` and `generated` are its tokens so far; accept() adds those that follow. `seed` is
    the settings' seed, or a fresh one where they have none: with it a run can be repeated.
    `name` stands for the sequence in errors.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        generated: Sequence[int] = (),
        name: str = "this sequence",
    ) -> None:
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._sampling, self._name = sampling, name
        self._recent = deque(prompt, sampling.repetition_context_size)
        self._counts: Counter[int] = Counter()
        for token in generated:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Append `token` to the sequence."""
        self._recent.append(token)
        self._counts[token] += 1

    def pick(self, logits: Logits, position: int, mask: Mask | None = None) -> Pick:
        """Pick the sequence's token at `position` from `logits` (vocabulary,), in float32.

        Changes nothing here: drafts are checked by pick() and accept() in turn. `mask` says
        which tokens are allowed: a bool for each, or a bit for each, the lowest first, in words
        of int32. A token beyond its end is not allowed. Of equal logits the lower id comes
        first.

        Raises ZmoeError where `logits` hold NaN or infinity, -inf excepted, which is a
        probability of zero, and where nothing is left to pick from.
        """
        most = float(logits.max())
        if not math.isfinite(most):
            raise ZmoeError(f"{self._name}, position {position}: the model's logits hold {most}")
        row = self._adjusted(logits)
        if mask is None:
            token = self._choose(row, position)
        else:
            ids = _allowed(mask, row.size)
            if not ids.size or row[ids].max() == -math.inf:
                raise ZmoeError(f"{self._name}, position {position}: no token is allowed")
            token = int(ids[self._choose(row[ids], position)])
        top = self._sampling.logprobs
        return Pick(token) if top is None else _with_logprobs(token, logits, most, top)

    def _adjusted(self, logits: Logits) -> Logits:
        """`logits` with bias and penalties."""
        sampling = self._sampling
        bias, penalty = sampling.logit_bias, sampling.repetition_penalty
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        if not (bias or penalty or presence or frequency):
            return logits
        row = logits.copy()
        if bias:
            row[list(bias)] += np.array(list(bias.values()), np.float32)
        if penalty and self._recent:
            recent = list(self._recent)
            row[recent] = np.where(row[recent] < 0, row[recent] * penalty, row[recent] / penalty)
        if self._counts:
            often = np.array(list(self._counts.values()), np.float32)
            row[list(self._counts)] -= presence + frequency * often
        return row

    def _choose(self, row: Logits, position: int) -> int:
        """The index of the greedy or drawn logit of `row`."""
        if self._sampling.temp == 0:
            return int(row.argmax())
        ids, weights = distribution(row, self._sampling)
        at = _invert(weights, uniform(self.seed, position))
        return at if ids is None else int(ids[at])


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, position)."""
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def distribution(row: Logits, sampling: Sampling) -> tuple[Ids | None, NDArray[np.floating[Any]]]:
    """The ids, ascending, that filters leave of `row` (None for all), and the weight of each.

    A weight is the probability divided by that of the likeliest.
    """
    kept = keep(row, sampling.top_p, sampling.min_p, sampling.top_k)
    likely = row if kept is None else row[kept].astype(np.float64)
    with np.errstate(over="ignore"):  # to -inf
        return kept, np.exp((likely - likely.max()) / max(sampling.temp, _LEAST_TEMPERATURE))


def keep(row: Logits, top_p: float, min_p: float, top_k: int) -> Ids | None:
    """The ids, ascending, that the filters leave of `row`; None for all of them.

    top-p leaves the fewest of the likeliest whose probabilities add up to `top_p`, and all
    that are as likely as the last of them; min-p those of at least `min_p` times the largest
    probability; top-k the `top_k` likeliest, of equals those with the lower ids.
    """
    if top_p == 1 and min_p == 0 and top_k == 0:
        return None
    for size in (*_HEADS, row.size):
        ids, cut = _head(row, max(size, top_k))
        values = np.sort(row[ids])[::-1].astype(np.float64)
        least = _least(row, values, top_p, min_p, top_k)
        if least >= cut:
            break
    kept = ids[row[ids] >= least]
    if 0 < top_k < kept.size:
        kept = np.sort(kept[np.argsort(-row[kept], kind="stable")[:top_k]])
    return kept


def _head(row: Logits, least: int) -> tuple[Ids, float]:
    """The ids, ascending, of `least` or more of the largest logits, and the logit that all of
    them reach and no other.

    One pass over the row finds the largest of each of 4 x `least` columns; the row has no fewer
    logits that reach the cut than those have. This takes a tenth of argpartition's time.
    """
    columns = 4 * least
    depth = row.size // columns
    if depth < 2:
        return np.arange(row.size), -math.inf
    tops = row[: depth * columns].reshape(depth, columns).max(axis=0)
    cut = np.partition(tops, -least)[-least]
    return np.flatnonzero(row >= cut), float(cut)


def _least(
    row: Logits, values: NDArray[np.float64], top_p: float, min_p: float, top_k: int
) -> float:
    """The least logit that the filters leave, if it is among `values`, the largest of `row`,
    descending; else something below them.
    """
    least = values[0] + math.log(min_p) if min_p else -math.inf
    if top_k:
        least = max(least, values[min(top_k, row.size) - 1])
    return float(max(least, _nucleus(row, values, top_p)) if top_p < 1 else least)


def _nucleus(row: Logits, values: NDArray[np.float64], top_p: float) -> float:
    """The least logit that top-p leaves, or -inf if it is below `values`."""
    masses = np.exp(values - values[0])
    sums = np.cumsum(masses)
    # The mass of the others is not worth computing where it cannot move the border.
    others = (row.size - values.size) * masses[-1]
    at, other = np.searchsorted(sums, (top_p * sums[-1], top_p * (sums[-1] + others)))
    if at != other:
        total = np.exp(row - np.float32(values[0])).sum(dtype=np.float64)
        at = np.searchsorted(sums, top_p * total)
    return float(values[at]) if at < values.size else -math.inf


def _invert(weights: NDArray[np.floating[Any]], share: float) -> int:
    """The index at which the running sum of `weights` exceeds `share` of their sum.

    It is summed in float64 by blocks, then within one block, always in the same order.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    blocks = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    wanted = share * blocks[-1]
    block = _exceeds(blocks, wanted)
    start = block * _BLOCK
    within = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    before = blocks[block - 1] if block else 0.0
    return start + _exceeds(within, wanted - before)


def _exceeds(sums: NDArray[np.float64], wanted: float) -> int:
    """The first index where `sums` exceeds `wanted`; at most, despite rounding, that of the last
    weight above zero.
    """
    return int(min(np.searchsorted(sums, wanted, "right"), np.searchsorted(sums, sums[-1])))


def _allowed(mask: Mask, vocabulary: int) -> Ids:
    """The ids, ascending, that `mask` allows."""
    if mask.dtype == np.int32:
        octets = mask.astype("<i4").view(np.uint8)
        mask = np.unpackbits(octets, count=vocabulary, bitorder="little").view(np.bool_)
    return np.flatnonzero(mask[:vocabulary])


def _with_logprobs(token: int, logits: Logits, most: float, top: int) -> Pick:
    total = np.exp(logits - np.float32(most)).sum(dtype=np.float64)
    norm = most + math.log(total)
    ids, _ = _head(logits, max(top, 64))
    first = ids[np.argsort(-logits[ids], kind="stable")[:top]]
    likeliest = tuple((int(i), float(logits[i]) - norm) for i in first)
    return Pick(token, float(logits[token]) - norm, likeliest)
