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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zmoe.config import Sampling
from zmoe.engine.draw import Draw
from zmoe.errors import ZmoeError

Logits = NDArray[np.float32]  # (vocabulary,)
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_] | NDArray[np.int32]

_HEADS = (32, 512, 4096)  # tokens that are looked at first, and if they do not suffice
_COLUMNS = 2048  # of a row whose largest logits are looked for
_FEW = 4096  # logits that are sooner taken from their columns than found by a pass over the row
_BLOCK = 512  # weights that are summed before they are searched
_PART = 16384  # logits whose exponentials are in a core's cache until they are summed
_LEAST_TEMPERATURE = 1e-30  # float32 has it, and below it nothing but the likeliest is left


class Pick(NamedTuple):
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
        greedy = self._sampling.temp == 0
        tops = logits if greedy else _tops(logits, _COLUMNS)
        likeliest = int(tops.argmax())
        most = float(tops[likeliest])  # NaN where there is one
        if not math.isfinite(most):
            raise self._unsound(position, most)
        row = self._adjusted(logits)
        if mask is None and row is logits:
            token = likeliest if greedy else self._choose(row, position, tops)
        elif mask is None:
            token = self._choose(row, position)
        else:
            ids = _allowed(mask, row.size)
            if not ids.size or row[ids].max() == -math.inf:
                raise ZmoeError(f"{self._name}, position {position}: no token is allowed")
            token = int(ids[self._choose(row[ids], position)])
        top = self._sampling.logprobs
        return Pick(token) if top is None else _with_logprobs(token, logits, most, top)

    def drawn(self, token: int, position: int, largest: float) -> Pick:
        """The token at `position` that was drawn on the device, as pick() would give it."""
        if not math.isfinite(largest):
            raise self._unsound(position, largest)
        return Pick(token)

    def _unsound(self, position: int, largest: float) -> ZmoeError:
        return ZmoeError(f"{self._name}, position {position}: the model's logits hold {largest}")

    def draw(self, position: int) -> Draw | None:
        """What draws the sequence's token at `position` on the device; None where that is not
        enough: with bias, penalties or log-probabilities.
        """
        sampling = self._sampling
        needs_host = sampling.logit_bias or sampling.repetition_penalty or sampling.presence_penalty
        if needs_host or sampling.frequency_penalty or sampling.logprobs is not None:
            return None
        temp, share = sampling.temp, 0.0 if sampling.temp == 0 else uniform(self.seed, position)
        return Draw(temp, sampling.top_p, sampling.min_p, sampling.top_k, share)

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

    def _choose(self, row: Logits, position: int, tops: Logits | None = None) -> int:
        """The index of the greedy or drawn logit of `row`, whose columns' largest are `tops`."""
        if self._sampling.temp == 0:
            return int(row.argmax())
        ids, weights = distribution(row, self._sampling, tops)
        at = _invert(weights, uniform(self.seed, position))
        return at if ids is None else int(ids[at])


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, position).

    It is the first that numpy's Philox(key=seed, counter=position) gives, without the time that
    making such a generator takes (Philox4x64-10, Salmon et al. 2011).
    """
    word = 2**64 - 1
    x0, x1, x2, x3 = position + 1, 0, 0, 0
    key0, key1 = seed, 0
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = b >> 64 ^ x1 ^ key0, b & word, a >> 64 ^ x3 ^ key1, a & word
        key0, key1 = key0 + 0x9E3779B97F4A7C15 & word, key1 + 0xBB67AE8584CAA73B & word
    return (x0 >> 11) * 2.0**-53


def distribution(
    row: Logits, sampling: Sampling, tops: Logits | None = None
) -> tuple[Ids | None, NDArray[np.floating[Any]]]:
    """The ids, ascending, that filters leave of `row` (None for all), and the weight of each.

    A weight is the probability divided by that of the likeliest. `tops`: see keep().
    """
    kept = keep(row, sampling.top_p, sampling.min_p, sampling.top_k, tops)
    likely = row if kept is None else row[kept].astype(np.float64)
    weights: NDArray[np.floating[Any]] = likely - likely.max()
    with np.errstate(over="ignore"):  # to -inf
        weights /= max(sampling.temp, _LEAST_TEMPERATURE)
    return kept, np.exp(weights, out=weights)


def keep(
    row: Logits, top_p: float, min_p: float, top_k: int, tops: Logits | None = None
) -> Ids | None:
    """The ids, ascending, that the filters leave of `row`; None for all of them.

    top-p leaves the fewest of the likeliest whose probabilities add up to `top_p`, and all
    that are as likely as the last of them; min-p those of at least `min_p` times the largest
    probability; top-k the `top_k` likeliest, of equals those with the lower ids. `tops` are
    _tops() of the row, where the caller has them.
    """
    if top_p == 1 and min_p == 0 and top_k == 0:
        return None
    tops = _tops(row, _COLUMNS) if tops is None else tops
    for size in (*_HEADS, row.size):
        size = max(size, top_k)
        if 4 * size > tops.size:
            tops = _tops(row, 4 * size)
        cut = _cut(tops, size)
        ids, logits = _reaching(row, tops, cut)
        values = np.sort(logits)[::-1].astype(np.float64)
        least = _least(row, tops, values, cut, top_p, min_p, top_k)
        if least >= cut:
            break
    kept = ids[logits >= least]
    if 0 < top_k < kept.size:
        kept = np.sort(kept[np.argsort(-row[kept], kind="stable")[:top_k]])
    return kept


def _tops(row: Logits, columns: int) -> Logits:
    """The largest logit of each of so many columns, or NaN; the row itself if it is short.

    This is the only pass over the row that most picks need.
    """
    depth = row.size // columns
    if depth < 2:
        return row
    tops: Logits = np.maximum.reduce(row[: depth * columns].reshape(depth, columns))
    rest = row[depth * columns :]
    np.maximum(tops[: rest.size], rest, out=tops[: rest.size])
    return tops


def _cut(tops: Logits, least: int) -> float:
    """A logit that `least` or more of the row reach; -inf where it has fewer.

    It is that in this place among the largest of 4 x `least` groups of columns.
    """
    groups = min(4 * least, tops.size)
    if least >= groups:
        return -math.inf
    tops = np.maximum.reduce(tops[: tops.size // groups * groups].reshape(-1, groups))
    return float(np.partition(tops, -least)[-least])


def _reaching(row: Logits, tops: Logits, cut: float) -> tuple[Ids, Logits]:
    """The ids, ascending, of the logits that reach `cut`, and these logits."""
    columns = np.flatnonzero(tops >= cut)
    depth = -(-row.size // tops.size)
    if depth == 1:
        return columns, row[columns]
    if columns.size * depth > _FEW:
        ids = np.flatnonzero(row >= cut)
        return ids, row[ids]
    ids = (np.arange(0, row.size, tops.size)[:, None] + columns).ravel()
    ids = ids[: ids.searchsorted(row.size)]
    logits = row[ids]
    reaching = logits >= cut
    return ids[reaching], logits[reaching]


def _least(
    row: Logits,
    tops: Logits,
    values: NDArray[np.float64],
    cut: float,
    top_p: float,
    min_p: float,
    top_k: int,
) -> float:
    """The least logit that the filters leave, if it is among `values`, those of the row that
    reach `cut`, descending; else something below them.
    """
    least = values[0] + math.log(min_p) if min_p else -math.inf
    if top_k:
        least = max(least, values[min(top_k, row.size) - 1])
    return float(max(least, _nucleus(row, tops, values, cut, top_p)) if top_p < 1 else least)


def _nucleus(
    row: Logits, tops: Logits, values: NDArray[np.float64], cut: float, top_p: float
) -> float:
    """The least logit that top-p leaves, or -inf if it is below `values`."""
    sums = np.exp(values - values[0]).cumsum()
    # The mass of the others is not worth computing where it cannot move the border. None of a
    # column is more than its top, or the cut.
    bounds = np.minimum(tops, np.float32(cut)) - np.float32(values[0])
    others = np.add.reduce(np.exp(bounds, out=bounds)) * -(-row.size // tops.size)
    at = sums.searchsorted(top_p * sums[-1])
    if at != sums.searchsorted(top_p * (sums[-1] + float(others))):
        at = sums.searchsorted(top_p * _total(row, values[0]))
    return float(values[at]) if at < values.size else -math.inf


def _total(row: Logits, most: float) -> float:
    """The sum of exp(logit - `most`), by parts whose exponentials need little memory."""
    parts = np.empty(min(_PART, row.size), np.float32)
    total = 0.0
    for start in range(0, row.size, _PART):
        logits = row[start : start + _PART]
        part = np.subtract(logits, np.float32(most), out=parts[: logits.size])
        total += float(np.exp(part, out=part).sum(dtype=np.float64))
    return total


def _invert(weights: NDArray[np.floating[Any]], share: float) -> int:
    """The index at which the running sum of `weights` exceeds `share` of their sum.

    It is summed in float64 by blocks, then within one block, always in the same order.
    """
    if weights.size <= _BLOCK:
        sums = weights.cumsum(dtype=np.float64)
        return _exceeds(sums, share * sums[-1])
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
    return int(min(sums.searchsorted(wanted, "right"), sums.searchsorted(sums[-1])))


def _allowed(mask: Mask, vocabulary: int) -> Ids:
    """The ids, ascending, that `mask` allows."""
    if mask.dtype == np.int32:
        octets = mask.astype("<i4").view(np.uint8)
        mask = np.unpackbits(octets, count=vocabulary, bitorder="little").view(np.bool_)
    return np.flatnonzero(mask[:vocabulary])


def _with_logprobs(token: int, logits: Logits, most: float, top: int) -> Pick:
    norm = most + math.log(_total(logits, most))
    tops = _tops(logits, _COLUMNS)
    ids, _ = _reaching(logits, tops, _cut(tops, max(top, 1)))
    first = ids[np.argsort(-logits[ids], kind="stable")[:top]]
    likeliest = tuple((int(i), float(logits[i]) - norm) for i in first)
    return Pick(token, float(logits[token]) - norm, likeliest)
