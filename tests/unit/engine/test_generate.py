"""The token loop over a scripted model: what is stepped, picked, streamed and counted."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.checkpoint.hub import resolve_model
from zmoe.config import Sampling
from zmoe.engine.generate import Generation
from zmoe.engine.prompt import check_length, encode_prompt, open_tokenizer
from zmoe.errors import InputError, ModelError
from zmoe.obs import Spans


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return open_tokenizer(resolve_model("zmoe-tiny"))


class Script:
    """A model that says `tokens` one after the other, whatever it is given."""

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self.tokens, self.vocabulary = list(tokens), vocabulary
        self.steps: list[tuple[list[int], bool]] = []
        self.wanted: list[bool] = []
        self.prompt_tokens = 0

    def __call__(self, tokens: Sequence[int], reset: bool, logits: bool) -> mx.array:
        self.steps.append((list(tokens), reset))
        self.wanted.append(logits)
        seen = sum(len(t) for t, _ in self.steps)
        at = max(0, seen - self.prompt_tokens)
        row = mx.zeros(self.vocabulary)
        row[self.tokens[min(at, len(self.tokens) - 1)]] = 20.0
        return row


def generation(
    tokenizer: TokenizerWrapper,
    script: Script,
    prompt: Sequence[int],
    sampling: Sampling,
    context: int | None = None,
    chunk: int = 4,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generation:
    script.prompt_tokens = len(prompt)
    return Generation(
        script,
        tokenizer,
        prompt,
        sampling,
        prefill_chunk=chunk,
        context=context,
        spans=Spans(),
        on_prefill=on_prefill,
    )


# mlx-lm's detokenizer shows the byte 0 as another character; text has no use for it.
@given(
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40
    )
)
@settings(deadline=None)
def test_streamed_text_is_the_decoded_text(tokenizer: TokenizerWrapper, text: str) -> None:
    ids = tokenizer.encode(text)
    if not ids:
        return
    script = Script([*ids, ids[0]], len(tokenizer.get_vocab()))
    run = generation(tokenizer, script, [1], Sampling(max_tokens=len(ids), ignore_eos=True))
    pieces = [token.text for token in run]
    whole = tokenizer.decode(ids)
    # The detokenizer of byte-level BPE drops one leading space, as mlx-lm's users are used to.
    assert "".join(pieces) == run.text
    assert run.text in (whole, whole[1:] if whole.startswith(" ") else whole)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_whole(tokenizer: TokenizerWrapper) -> None:
    ids = tokenizer.encode("naïve 🎭 漢字")
    script = Script([*ids, 0], len(tokenizer.get_vocab()))
    run = generation(tokenizer, script, [1], Sampling(max_tokens=len(ids), ignore_eos=True))
    pieces = [token.text for token in run]
    assert "".join(pieces) == "naïve 🎭 漢字"
    assert "🎭" in "|".join(pieces)
    assert any(piece == "" for piece in pieces), "bytes of a character were shown too early"


def test_the_prompt_goes_in_chunks_then_alone(tokenizer: TokenizerWrapper) -> None:
    script = Script([5, 6, 7], len(tokenizer.get_vocab()))
    prompt = list(range(10, 20))
    told: list[tuple[int, int, int]] = []
    run = generation(
        tokenizer,
        script,
        prompt,
        Sampling(max_tokens=3, ignore_eos=True),
        on_prefill=lambda done, total: told.append((done, total, len(script.steps))),
    )
    assert [token.id for token in run] == [5, 6, 7]
    assert told == [(4, 10, 1), (8, 10, 2), (9, 10, 3)]
    assert script.steps == [
        ([10, 11, 12, 13], True),
        ([14, 15, 16, 17], False),
        ([18], False),
        ([19], False),
        ([5], False),
        ([6], False),
    ]
    assert script.wanted == [False, False, False, True, True, True]
    assert run.finish_reason == "length"
    assert run.timings.prompt_tokens == 10
    assert run.timings.decode_steps == 2


def test_a_prompt_of_one_token_starts_a_new_sequence(tokenizer: TokenizerWrapper) -> None:
    script = Script([5], len(tokenizer.get_vocab()))
    list(generation(tokenizer, script, [9], Sampling(max_tokens=1)))
    assert script.steps == [([9], True)]


def test_an_end_token_stops_and_is_not_text(tokenizer: TokenizerWrapper) -> None:
    (eos,) = list(tokenizer.eos_token_ids)[:1]
    script = Script([5, 6, eos, 8], len(tokenizer.get_vocab()))
    run = generation(tokenizer, script, [9], Sampling(max_tokens=50))
    tokens = list(run)
    assert run.tokens == [5, 6]
    assert tokens[-1].finish_reason == run.finish_reason == "stop"
    assert run.text == tokenizer.decode([5, 6])


def test_the_context_bounds_the_text(tokenizer: TokenizerWrapper) -> None:
    script = Script([5], len(tokenizer.get_vocab()))
    run = generation(
        tokenizer, script, [9] * 6, Sampling(max_tokens=50, ignore_eos=True), context=8
    )
    assert len(list(run)) == 2
    assert run.finish_reason == "length"
    assert run.context_full
    script = Script([5], len(tokenizer.get_vocab()))
    run = generation(tokenizer, script, [9] * 6, Sampling(max_tokens=2, ignore_eos=True), context=8)
    assert len(list(run)) == 2
    assert not run.context_full


def test_seeds_make_samples_repeat(tokenizer: TokenizerWrapper) -> None:
    vocabulary = len(tokenizer.get_vocab())

    def flat(tokens: Sequence[int], reset: bool, logits: bool) -> mx.array:
        return mx.zeros(vocabulary)

    seeds: list[int] = []

    def sample(seed: int | None) -> list[int]:
        sampling = Sampling(max_tokens=20, temp=1.0, seed=seed, ignore_eos=True)
        run = Generation(
            flat, tokenizer, [1], sampling, prefill_chunk=4, context=None, spans=Spans()
        )
        assert run.seed is not None
        seeds.append(run.seed)
        return [token.id for token in run]

    assert sample(1) == sample(1) != sample(2)
    unseeded = sample(None)
    assert sample(seeds[-1]) == unseeded != sample(None)


def test_tokens_carry_log_probabilities(tokenizer: TokenizerWrapper) -> None:
    vocabulary = len(tokenizer.get_vocab())
    script = Script([5, 6], vocabulary)
    sampling = Sampling(max_tokens=2, ignore_eos=True, logprobs=1, presence_penalty=2.0)
    norm = math.log(math.exp(20) + vocabulary - 1)
    tokens = list(generation(tokenizer, script, [9], sampling))
    assert [token.logprob for token in tokens] == pytest.approx([20 - norm] * 2, abs=1e-12)
    assert [token.top_logprobs[0][0] for token in tokens] == [5, 6]
    (plain,) = generation(tokenizer, Script([5], vocabulary), [9], Sampling(max_tokens=1))
    assert plain.logprob is None and plain.top_logprobs == ()


def test_penalties_know_the_text(tokenizer: TokenizerWrapper) -> None:
    vocabulary = len(tokenizer.get_vocab())

    def close(tokens: Sequence[int], reset: bool, logits: bool) -> mx.array:
        return mx.arange(vocabulary) * -0.6

    def greedy(**options: Any) -> list[int]:
        sampling = Sampling(max_tokens=5, ignore_eos=True, **options)
        run = Generation(
            close, tokenizer, [0], sampling, prefill_chunk=4, context=None, spans=Spans()
        )
        return [token.id for token in run]

    assert greedy() == [0, 0, 0, 0, 0]
    assert greedy(presence_penalty=1.0) == [0, 1, 0, 0, 0]
    assert greedy(frequency_penalty=1.0) == [0, 1, 0, 2, 1]


def test_prompts_that_cannot_be(tokenizer: TokenizerWrapper) -> None:
    with pytest.raises(InputError, match="empty"):
        encode_prompt(tokenizer, "")
    with pytest.raises(InputError, match="^system_prompt needs a chat template"):
        encode_prompt(tokenizer, "hi", system_prompt="be brief")
    with pytest.raises(InputError, match="the prompt is not UTF-8 at character 3"):
        encode_prompt(tokenizer, "hi\udcff", ignore_chat_template=True)
    with pytest.raises(InputError, match="8 tokens.*context 8.*at most 7"):
        check_length(8, 8)
    check_length(7, 8)
    check_length(10**9, None)


def test_chat_templates_are_used_unless_ignored(tokenizer: TokenizerWrapper) -> None:
    chatty = open_tokenizer(resolve_model("zmoe-tiny"))
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}{{ mood }}"
    )
    chatty._tokenizer.chat_template = template
    chatty = TokenizerWrapper(chatty._tokenizer)
    ids = encode_prompt(
        chatty, "Speak.", system_prompt="A king.", chat_template_config={"mood": "!"}
    )
    assert chatty.decode(ids) == "system:A king.\nuser:Speak.\nassistant:!"
    raw = encode_prompt(chatty, "Speak.", ignore_chat_template=True)
    assert chatty.decode(raw) == "Speak."


def test_prefill_is_told_apart_from_sampling(
    tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    script = Script([5], len(tokenizer.get_vocab()))
    run = generation(tokenizer, script, [9, 9, 9], Sampling(max_tokens=1, ignore_eos=True))
    list(run)
    assert (run.timings.prefill, run.timings.first_token, run.timings.prompt_tps) == (1, 2, 3)


def test_a_folder_without_tokenizer_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bare")
    with pytest.raises(ModelError, match=str(folder)):
        open_tokenizer(folder)
    shutil.copy(resolve_model("zmoe-tiny") / "config.json", folder)
    with pytest.raises(ModelError, match=f"{folder} holds no tokenizer: expected tokenizer.json"):
        open_tokenizer(folder)
