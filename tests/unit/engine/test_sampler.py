"""The sampler against float64 references, against mlx-lm's, and against itself in other batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm import sample_utils
from numpy.typing import NDArray

from zmoe.config import Sampling
from zmoe.engine import sampler
from zmoe.engine.sampler import Pick, Sampler, distribution, keep, uniform
from zmoe.errors import ZmoeError

Row = NDArray[np.float32]
LARGE = 20011  # not a multiple of any block


def peaked(vocabulary: int, seed: int = 0) -> Row:
    """Logits as a language model's: a few tokens far above a bell of all others."""
    random = np.random.default_rng(seed)
    row = random.normal(0, 2.5, vocabulary)
    row[random.choice(vocabulary, 12, replace=False)] = 18 - random.exponential(1.5, 12).cumsum()
    return row.astype(np.float32)


@pytest.fixture
def small_heads() -> Iterator[None]:
    """Lets rows of a few dozen tokens take the way of large vocabularies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_HEADS", (2, 5))
        patch.setattr(sampler, "_COLUMNS", 8)
        patch.setattr(sampler, "_FEW", 20)
        patch.setattr(sampler, "_PART", 7)
        patch.setattr(sampler, "_BLOCK", 4)
        yield


def probabilities(ids: Any, weights: NDArray[Any], vocabulary: int) -> NDArray[np.float64]:
    """(vocabulary,) what `distribution` returns as probabilities."""
    found = np.zeros(vocabulary)
    found[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return found


# ---- which tokens are left ----------------------------------------------------------------


def reference(row: Row, top_p: float, min_p: float, top_k: int) -> list[int]:
    """The ids that the filters leave, by sorting the whole vocabulary in float64.

    Rejects rows where rounding decides.
    """
    x = row.astype(np.float64)
    order = np.lexsort((np.arange(x.size), -x))
    mass = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    above = mass[order].cumsum() - mass[order]
    ties = x[order][:, None] == x[order]
    first = ties.argmax(axis=1) if x.size < 1000 else np.searchsorted(-x[order], -x[order])
    assume(top_p == 1 or np.abs(above - top_p).min() > 1e-5)
    assume(min_p == 0 or np.abs(x - x.max() - math.log(min_p)).min() > 1e-5)
    left = np.ones(x.size, bool)
    if top_p < 1:
        left &= above[first] < top_p  # of equals all, or none
    if min_p > 0:
        left &= mass[order] >= min_p * mass.max()
    kept = order[left]
    return sorted(kept[:top_k] if top_k else kept)


FILTERS = st.tuples(
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-9]),
    st.sampled_from([0.0, 1e-6, 0.05, 0.4, 1.0]),
    st.sampled_from([0, 1, 2, 7, 30]),
)
# Few values, so that many are equal; -inf is a token that the model rules out.
LOGIT = st.sampled_from([-math.inf, *np.arange(-3.0, 4.0, 0.5)])


@given(st.lists(LOGIT, min_size=1, max_size=90), FILTERS)
@settings(deadline=None, max_examples=400)
@pytest.mark.usefixtures("small_heads")
def test_the_filters_leave_what_a_full_sort_leaves(
    values: list[float], filters: tuple[float, float, int]
) -> None:
    row = np.array(values, np.float32)
    assume(row.max() > -math.inf)
    kept = keep(row, *filters)
    if kept is None:
        assert filters == (1.0, 0.0, 0)
    else:
        assert kept.tolist() == reference(row, *filters)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 2.5, 6.0]),
    st.sampled_from([1, 2, 20]),
    FILTERS,
)
@settings(deadline=None, max_examples=60)
def test_the_filters_on_large_vocabularies(
    seed: int, spread: float, steps: int, filters: tuple[float, float, int]
) -> None:
    random = np.random.default_rng(seed)
    row = (np.round(random.normal(0, spread, LARGE) * steps) / steps).astype(np.float32)
    kept = keep(row, *filters)
    assert kept is None or kept.tolist() == reference(row, *filters)


@pytest.fixture
def drawn_by_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float64]]:
    """What mlx-lm's sampler would have drawn from, as probabilities of the whole vocabulary."""
    seen: list[NDArray[np.float64]] = []

    def categorical(logits: mx.array, temp: float) -> mx.array:
        scaled = np.asarray(logits[0]).astype(np.float64) / temp
        weights = np.exp(scaled - scaled.max())
        seen.append(weights / weights.sum())
        return mx.argmax(logits, axis=-1)

    monkeypatch.setattr(sample_utils, "categorical_sampling", categorical)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 0.7},
        {"temp": 1.0, "top_p": 0.9},
        {"temp": 2.0, "top_p": 0.4},
        {"temp": 0.3, "min_p": 0.02},
        {"temp": 1.5, "top_k": 5},
        {"temp": 1.5, "top_k": 900},
        {"temp": 0.8, "top_p": 0.95, "min_p": 0.01, "top_k": 20},
        {"temp": 0.8, "top_p": 0.7, "min_p": 0.2, "top_k": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [1000, LARGE])
def test_the_distribution_is_mlx_lms(
    drawn_by_mlx_lm: list[NDArray[np.float64]], vocabulary: int, options: dict[str, Any]
) -> None:
    for seed in range(4):
        row = peaked(vocabulary, seed)
        logits = mx.array(row)[None]
        sample_utils.make_sampler(**options)(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        theirs = drawn_by_mlx_lm.pop()
        ours = probabilities(*distribution(row, Sampling(**options)), vocabulary)
        assert (ours > 0).tolist() == (theirs > 0).tolist()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-12)


# ---- bias and penalties ----------------------------------------------------------------------

PROMPT, TEXT = [7, 3, 3, 9, 11], [3, 5, 5, 5, 8]


def adjusted(row: Row, **options: Any) -> Row:
    return Sampler(Sampling(**options), PROMPT, TEXT)._adjusted(row)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "repetition_context_size": 3},
        {"repetition_penalty": 1.3, "repetition_context_size": 7},
        {"logit_bias": {3: 2.5, 19: -100}},
        {"logit_bias": {3: 2.5}, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_bias_and_repetition_are_mlx_lms(options: dict[str, Any]) -> None:
    row = peaked(20)
    theirs = mx.array(row)[None]
    for process in sample_utils.make_logits_processors(**options):
        theirs = process(mx.array(PROMPT + TEXT), theirs)
    np.testing.assert_allclose(adjusted(row, **options), np.asarray(theirs[0]), rtol=1e-6)


def test_presence_and_frequency_are_openais() -> None:
    """mlx-lm's look at the latest tokens, and at those of the prompt: here they have the text."""
    row = peaked(20)
    theirs = mx.array(row)[None]
    for process in sample_utils.make_logits_processors(presence_penalty=0.5, frequency_penalty=0.3):
        theirs = process(mx.array(TEXT), theirs)
    ours = adjusted(row, presence_penalty=0.5, frequency_penalty=0.3)
    np.testing.assert_allclose(ours, np.asarray(theirs[0]), rtol=1e-6)
    by_hand = row.astype(np.float64)
    for token, often in ((3, 1), (5, 3), (8, 1)):
        by_hand[token] -= 0.5 + 0.3 * often
    np.testing.assert_allclose(ours, by_hand, rtol=1e-6)


def test_all_of_them_come_in_mlx_lms_order() -> None:
    row = peaked(20)
    both = {"logit_bias": {3: 2.5, 5: -1.0}, "repetition_penalty": 1.3, "presence_penalty": 0.5}
    theirs = mx.array(row)[None]
    for process in sample_utils.make_logits_processors(**both):
        theirs = process(mx.array(TEXT), theirs)
    ours = Sampler(Sampling(**both), [], TEXT)._adjusted(row)
    np.testing.assert_allclose(ours, np.asarray(theirs[0]), rtol=1e-6)


def test_the_models_logits_stay_as_they_are() -> None:
    row = peaked(20)
    row.flags.writeable = False
    sampling = Sampling(temp=1.0, seed=1, presence_penalty=1.0, logit_bias={3: 1.0}, top_p=0.9)
    Sampler(sampling, PROMPT, TEXT).pick(row, 10, np.ones(20, bool))


def test_tokens_may_come_one_by_one() -> None:
    sampling = Sampling(repetition_penalty=1.3, repetition_context_size=4, frequency_penalty=0.3)
    growing = Sampler(sampling, PROMPT)
    for count, token in enumerate(TEXT):
        restarted = Sampler(sampling, PROMPT, TEXT[:count])
        row = peaked(20, count)
        for _ in range(2):  # picking leaves no trace
            assert growing.pick(row, count) == restarted.pick(row, count)
        assert growing._adjusted(row).tolist() == restarted._adjusted(row).tolist()
        growing.accept(token)


# ---- draws -----------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_random_numbers_are_philoxs(seed: int, position: int) -> None:
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    assert uniform(seed, position) == (bits >> 11) / 2**53


@pytest.mark.parametrize("top_k", [0, 11])
@pytest.mark.usefixtures("small_heads")
def test_a_draw_inverts_the_distribution(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    row = peaked(50)
    row[[0, 20, 49]] = -np.inf
    sampling = Sampling(temp=1.3, top_k=top_k, seed=0)
    weights = np.exp(row.astype(np.float64) / 1.3)
    if top_k:
        weights[np.argsort(row)[:-top_k]] = 0
    sums = weights.cumsum() / weights.sum()
    for share in (*np.linspace(0, 1, 2001)[:-1], 1 - 2.0**-53):
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, share=share: share)
        token = Sampler(sampling).pick(row, 0).token
        assert weights[token] > 0
        if np.abs(sums - share).min() > 1e-6:  # or else rounding decides
            assert token == (sums > share).argmax()


@pytest.mark.parametrize(
    "options", [{"temp": 1.0}, {"temp": 2.0, "top_p": 0.9}, {"temp": 0.7, "top_k": 6}], ids=str
)
def test_draws_have_their_frequencies(options: dict[str, Any]) -> None:
    """Pearson's chi-square over positions and over seeds, at a fixed seed: it cannot flicker."""
    row, draws = peaked(40, 5) / 4, 4000
    theory = probabilities(*distribution(row, Sampling(**options)), 40)
    one = Sampler(Sampling(**options, seed=12))
    by_position = [one.pick(row, at).token for at in range(draws)]
    by_seed = [Sampler(Sampling(**options, seed=at)).pick(row, 12).token for at in range(draws)]
    for tokens in (by_position, by_seed):
        counts = np.bincount(tokens, minlength=40)
        assert not counts[theory == 0].any()
        often = theory * draws >= 5
        chi = ((counts - theory * draws)[often] ** 2 / (theory * draws)[often]).sum()
        freedom = int(often.sum()) - 1
        assert chi < freedom + 4 * math.sqrt(2 * freedom)


def test_without_a_seed_each_sampler_has_its_own() -> None:
    np.random.seed(0)
    first, second = Sampler(Sampling(temp=1.0)), Sampler(Sampling(temp=1.0))
    assert first.seed != second.seed
    again = Sampler(Sampling(temp=1.0, seed=first.seed))
    rows = [peaked(40, at) / 4 for at in range(30)]
    tokens = [first.pick(row, at) for at, row in enumerate(rows)]
    assert tokens == [again.pick(row, at) for at, row in enumerate(rows)]
    assert tokens != [second.pick(row, at) for at, row in enumerate(rows)]


def test_of_equal_logits_the_lowest_id_is_greedy() -> None:
    row = np.zeros(LARGE, np.float32)
    row[[777, 9000, 20000]] = 3
    assert Sampler(Sampling()).pick(row, 0) == Pick(777)
    assert Sampler(Sampling(temp=1e-300)).pick(peaked(40), 0).token == peaked(40).argmax()
    assert Sampler(Sampling(temp=1.0, top_k=1)).pick(row, 0) == Pick(777)


# ---- masks -----------------------------------------------------------------------------------


def as_bits(allowed: Sequence[bool]) -> NDArray[np.int32]:
    """The words of llguidance's masks: bit i of word j is token 32 j + i."""
    words = [0] * -(-len(allowed) // 32)
    for token, is_allowed in enumerate(allowed):
        words[token // 32] |= int(is_allowed) << token % 32
    return np.array(words, np.uint32).view(np.int32)


@given(
    st.integers(0, 99),
    st.lists(st.booleans(), min_size=1, max_size=90),
    st.sampled_from([0.0, 1.0]),
    FILTERS,
)
@settings(deadline=None)
def test_a_mask_is_as_if_the_model_ruled_tokens_out(
    seed: int, allowed: list[bool], temp: float, filters: tuple[float, float, int]
) -> None:
    row = peaked(70, seed)
    masked = np.full(70, -np.inf, np.float32)
    for token in range(min(70, len(allowed))):
        masked[token] = row[token] if allowed[token] else -np.inf
    assume(masked.max() > -np.inf)
    top_p, min_p, top_k = filters
    one = Sampler(Sampling(temp=temp, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed))
    wanted = one.pick(masked, 3)
    assert one.pick(row, 3, np.array(allowed)) == wanted
    assert one.pick(row, 3, as_bits(allowed)) == wanted


# ---- log-probabilities -----------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, 40, LARGE])
@pytest.mark.parametrize("temp", [0.0, 0.5])
def test_log_probabilities_are_the_models_own(vocabulary: int, temp: float) -> None:
    row = (np.round(peaked(max(20, vocabulary)) * 2) / 2)[:vocabulary].astype(np.float32)
    x = row.astype(np.float64)
    logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
    order = np.lexsort((np.arange(vocabulary), -x))[:20]
    shaping = {"temp": temp, "top_p": 0.9, "frequency_penalty": 1.0, "logit_bias": {2: 5.0}}
    one = Sampler(Sampling(**shaping, seed=4, logprobs=20), [1], [0, 0])
    pick = one.pick(row, 3, np.arange(vocabulary) % 2 == 0)
    assert (
        pick.token
        == Sampler(Sampling(**shaping, seed=4), [1], [0, 0])
        .pick(row, 3, np.arange(vocabulary) % 2 == 0)
        .token
    )
    assert pick.logprob == pytest.approx(logprobs[pick.token], abs=1e-6)
    assert [token for token, _ in pick.top_logprobs] == order.tolist()
    assert [p for _, p in pick.top_logprobs] == pytest.approx(logprobs[order].tolist(), abs=1e-6)
    assert Sampler(Sampling(logprobs=0)).pick(row, 0).top_logprobs == ()


# ---- what cannot be picked from ------------------------------------------------------------


@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize(
    ("odd", "says"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")], ids=str
)
def test_odd_logits_are_no_silent_token(temp: float, odd: float, says: str) -> None:
    row = np.full(LARGE, -np.inf if odd == -np.inf else 0.0, np.float32)
    row[-1] = odd  # behind the last whole block
    with pytest.raises(ZmoeError, match=f"^this sequence, position 6: .* logits hold {says}$"):
        Sampler(Sampling(temp=temp, top_k=2)).pick(row, 6)
    row[:] = -np.inf
    row[4] = 1.0
    assert Sampler(Sampling(temp=temp)).pick(row, 6).token == 4
    with pytest.raises(ZmoeError, match="^this sequence, position 6: no token is allowed$"):
        Sampler(Sampling(temp=temp)).pick(row, 6, np.zeros(0, bool))
