"""Generations over a scripted model: what is stepped, picked, streamed and counted."""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.batch.plan import PREVIOUS, Plan
from zmoe.checkpoint.hub import resolve_model
from zmoe.config import Batching, EngineConfig, Sampling
from zmoe.engine.batcher import Batcher
from zmoe.engine.draw import Draw, Drawn
from zmoe.engine.generate import Generation
from zmoe.engine.prompt import border_of_system_prompt, check_length, encode_prompt, open_tokenizer
from zmoe.engine.stream import Stream
from zmoe.errors import InputError, ModelError, ZmoeError
from zmoe.obs import Spans


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return open_tokenizer(resolve_model("zmoe-tiny"))


class Script:
    """A model that says `tokens` one after the other in every sequence, whatever it is given."""

    paged, can_batch, can_trim, plans_ahead = True, True, True, False
    block_bytes, state_bytes = 1, 0

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self.tokens, self.vocabulary = list(tokens), vocabulary
        self.plans: list[Plan] = []
        self.prompt_tokens = 0

    def run(self, plan: Plan, logits: bool = True) -> np.ndarray | None:
        self.plans.append(plan)
        said = [
            span.end - span.logits + 1 + i - self.prompt_tokens
            for span in plan.spans
            for i in range(span.logits)
        ]
        if not said:
            return None
        rows = np.zeros((len(said), self.vocabulary), np.float32)
        for row, at in zip(rows, said):
            row[self.tokens[min(max(at, 0), len(self.tokens) - 1)]] = 20.0
        return rows

    def make_cache(self, blocks: int) -> None: ...


def batcher(script: Script, chunk: int = 4, blocks: int = 100, speculate: str = "off") -> Batcher:
    config, batching = EngineConfig(prefill_chunk=chunk, parallel=4), Batching(speculate=speculate)
    return Batcher(script.run, script, blocks, config, batching, Spans())


def generation(
    tokenizer: TokenizerWrapper,
    script: Script,
    prompt: Sequence[int],
    sampling: Sampling,
    context: int | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on: Batcher | None = None,
) -> Generation:
    script.prompt_tokens = len(prompt)
    on = on or batcher(script)
    eos = tokenizer.eos_token_ids
    stream = Stream(prompt, sampling, eos=eos, context=context, on_prefill=on_prefill)
    number = on.submit(stream)

    async def advance_async() -> None:
        on.step()

    return Generation(
        stream,
        tokenizer,
        advance=on.step,
        advance_async=advance_async,
        cancel=lambda: on.end(number),
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


def test_counts_add_up_over_steps(tokenizer: TokenizerWrapper) -> None:
    script, spans = Script([5, 6, 7], len(tokenizer.get_vocab())), Spans()

    def run(plan: Plan) -> np.ndarray | None:
        spans.seconds["experts"] += 0.5
        return script.run(plan)

    on = Batcher(run, script, 100, EngineConfig(), Batching(speculate="off"), spans)
    list(generation(tokenizer, script, [9], Sampling(max_tokens=3, ignore_eos=True), on=on))
    counts = on.counts({})
    assert (counts.steps, counts.prompt_tokens, counts.generated_tokens) == (3, 1, 3)
    assert counts.spans == {"experts": 1.5}


def test_the_prompt_goes_in_chunks(tokenizer: TokenizerWrapper) -> None:
    script = Script([5, 6, 7], len(tokenizer.get_vocab()))
    told: list[tuple[int, int, int]] = []
    run = generation(
        tokenizer,
        script,
        list(range(10, 20)),
        Sampling(max_tokens=3, ignore_eos=True),
        on_prefill=lambda done, total: told.append((done, total, len(script.plans))),
    )
    assert [token.id for token in run] == [5, 6, 7]
    assert told == [(4, 10, 1), (8, 10, 2), (10, 10, 3)]
    assert [plan.tokens for plan in script.plans] == [
        (10, 11, 12, 13),
        (14, 15, 16, 17),
        (18, 19),
        (5,),
        (6,),
    ]
    assert [plan.spans[0].position for plan in script.plans] == [0, 4, 8, 10, 11]
    assert [plan.spans[0].logits for plan in script.plans] == [0, 0, 1, 1, 1]
    assert [plan.step for plan in script.plans] == [1, 2, 3, 4, 5]
    assert run.finish_reason == "length"
    assert run.timings.prompt_tokens == 10
    assert run.timings.decode_steps == 2


def test_tokens_wait_for_their_consumer(tokenizer: TokenizerWrapper) -> None:
    script = Script([5, 6, 7, 8], len(tokenizer.get_vocab()))
    on, sampling = batcher(script), Sampling(max_tokens=4, ignore_eos=True)
    one, other = (generation(tokenizer, script, [9], sampling, on=on) for _ in range(2))
    assert [token.id for token in one] == [5, 6, 7, 8]
    steps = len(script.plans)
    assert all(len(plan.spans) == 2 for plan in script.plans)
    assert [token.id for token in other] == [5, 6, 7, 8]
    assert len(script.plans) == steps
    assert other.text == one.text == tokenizer.decode([5, 6, 7, 8])


def test_who_has_gone_away_is_in_no_further_step(tokenizer: TokenizerWrapper) -> None:
    script = Script([5, 6, 7, 8], len(tokenizer.get_vocab()))
    on, sampling = batcher(script), Sampling(max_tokens=4, ignore_eos=True)
    one, *others = (generation(tokenizer, script, [9], sampling, on=on) for _ in range(3))
    next(one)
    others.pop().close()
    others.clear()  # dropped without a word
    next(one)
    assert [len(plan.spans) for plan in script.plans] == [3, 1]
    one.close()
    assert list(one) == []
    assert on.scheduler.running == on.scheduler.waiting == 0


def test_drafts_that_are_right_come_at_once(tokenizer: TokenizerWrapper) -> None:
    vocabulary, said = len(tokenizer.get_vocab()), [5, 6, 7] * 8
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    plain, drafted = Script(said, vocabulary), Script(said, vocabulary)
    on = batcher(drafted, chunk=8, speculate="3")
    want = list(generation(tokenizer, plain, [9], sampling))
    run = generation(tokenizer, drafted, [9], sampling, on=on)
    assert list(run) == want
    assert len(drafted.plans) < len(plain.plans) - 5
    assert run.timings.decode_tokens == 19
    assert run.timings.accepted > 8


def test_an_end_token_among_drafts_ends_the_text(tokenizer: TokenizerWrapper) -> None:
    (eos,) = list(tokenizer.eos_token_ids)[:1]
    script = Script([5, 6, 7, 5, 6, 7, 5, eos], len(tokenizer.get_vocab()))
    on = batcher(script, chunk=8, speculate="3")
    run = generation(tokenizer, script, [9], Sampling(max_tokens=50), on=on)
    assert [token.id for token in run] == [5, 6, 7, 5, 6, 7, 5, eos]
    assert run.finish_reason == "stop"
    assert on.scheduler.running == 0


def test_a_sampler_that_fails_ends_its_own_sequence(tokenizer: TokenizerWrapper) -> None:
    script = Script([5, 6, 7, 8], len(tokenizer.get_vocab()))
    on, sampling = batcher(script), Sampling(max_tokens=4, ignore_eos=True)
    run = script.run

    def broken(plan: Plan) -> np.ndarray | None:
        rows = run(plan)
        if rows is not None and len(script.plans) == 2:
            rows[0] = np.nan
        return rows

    on._run = broken
    one, other = (generation(tokenizer, script, [9], sampling, on=on) for _ in range(2))
    assert next(one).id == 5
    with pytest.raises(ZmoeError, match="logits hold nan"):
        next(one)
    assert [token.id for token in other] == [5, 6, 7, 8]


def test_the_cache_bounds_the_text(tokenizer: TokenizerWrapper) -> None:
    script = Script([5], len(tokenizer.get_vocab()))
    sampling = Sampling(max_tokens=500, ignore_eos=True)
    run = generation(tokenizer, script, [9] * 6, sampling, on=batcher(script, blocks=1))
    assert len(list(run)) == 64 + 1 - 6  # the last one needs no place
    assert (run.finish_reason, run.context_full) == ("length", True)
    with pytest.raises(InputError, match="the prompt has 64 tokens, and the cache .* holds 64"):
        generation(tokenizer, script, [9] * 64, sampling, on=batcher(script, blocks=1))


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

    seeds: list[int] = []

    def sample(seed: int | None) -> list[int]:
        script = Script([5], vocabulary)
        on = batcher(script)
        on._run = lambda plan: np.zeros((1, vocabulary), np.float32)
        sampling = Sampling(max_tokens=20, temp=1.0, seed=seed, ignore_eos=True)
        run = generation(tokenizer, script, [1], sampling, on=on)
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

    def greedy(**options: Any) -> list[int]:
        script = Script([5], vocabulary)
        on = batcher(script)
        on._run = lambda plan: np.arange(vocabulary, dtype=np.float32)[None] * -0.6
        sampling = Sampling(max_tokens=5, ignore_eos=True, **options)
        return [token.id for token in generation(tokenizer, script, [0], sampling, on=on)]

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
    border = border_of_system_prompt(
        chatty, ids, system_prompt="A king.", chat_template_config={"mood": "!"}
    )
    assert chatty.decode(ids[:border]) == "system:A king.\nuser:"
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


class Device:
    """Draws the tokens of a script, in steps that begin before the last one has ended."""

    def __init__(self, script: Script) -> None:
        self.script, self.under_way, self.most, self.largest = script, deque[Plan](), 0, 20.0

    def begin(self, plan: Plan, draws: Sequence[Draw]) -> Callable[[], Drawn]:
        self.under_way.append(plan)
        self.most = max(self.most, len(self.under_way))

        def end() -> Drawn:
            assert self.under_way.popleft() is plan
            rows = self.script.run(plan)
            assert rows is not None and len(rows) == len(draws)
            largest = np.full(len(rows), self.largest, np.float32)
            return Drawn(rows.argmax(axis=-1).astype(np.uint32), largest)

        return end

    def batcher(self, speculate: str = "off") -> Batcher:
        config, batching = EngineConfig(parallel=4), Batching(speculate=speculate)
        return Batcher(self.script.run, self.script, 100, config, batching, Spans(), self.begin)


def test_steps_are_planned_before_tokens_are_known(tokenizer: TokenizerWrapper) -> None:
    device = Device(Script([5, 6, 7, 8], len(tokenizer.get_vocab())))
    on = device.batcher()

    def tokens(**settings: Any) -> list[int]:
        sampling = Sampling(max_tokens=4, **settings)
        return [t.id for t in generation(tokenizer, device.script, [9], sampling, on=on)]

    assert tokens(ignore_eos=True) == [5, 6, 7, 8]
    assert device.most == 2 and not device.under_way
    assert PREVIOUS in device.script.plans[-1].tokens
    device.most = 0
    assert tokens(ignore_eos=True, logprobs=0) == [5, 6, 7, 8] and device.most == 0
    device.script.tokens[1] = tokenizer.eos_token_id
    assert tokens() == [5, tokenizer.eos_token_id]
    assert len(device.under_way) == 1  # a step too many, which the next one drops
    on.force([1, 2], True)
    assert not device.under_way
    device.largest = math.nan
    with pytest.raises(ZmoeError, match="position 1: the model's logits hold nan"):
        tokens()


def test_drafts_are_waited_for(tokenizer: TokenizerWrapper) -> None:
    """Where the text repeats itself, the next token may be the first of some to propose."""
    device = Device(Script([5, 6, 7, 8, 5, 6, 7, 8, 5], len(tokenizer.get_vocab())))
    run = generation(
        tokenizer,
        device.script,
        [9],
        Sampling(max_tokens=9, ignore_eos=True),
        on=device.batcher("auto"),
    )
    assert [token.id for token in run] == device.script.tokens
    ahead = [PREVIOUS in plan.tokens for plan in device.script.plans]
    assert ahead[1:6] == [True] * 5 and not any(ahead[7:])
    assert run.timings.accepted
