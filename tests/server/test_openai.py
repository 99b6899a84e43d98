"""OpenAI's endpoints, asked by OpenAI's own client, whose types check each answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, Field

from tests.server.serving import CHATML, Server, serving
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec

MODEL = "zmoe-tiny"
ASK: list[Any] = [{"role": "user", "content": "Speak of the king."}]
END = 0  # zmoe-tiny's end token


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Iterator[Cluster]:
    """The library, in this process."""
    with Cluster(MODEL, spec=ClusterSpec(nodes=1)) as cluster:
        cluster.tokenizer.chat_template = CHATML
        cluster.tokenizer.has_chat_template = True
        yield cluster


def text_of(cluster: Cluster, **sampling: Any) -> str:
    """What the library generates for the question."""
    generation = cluster.generate(ASK[0]["content"], **sampling)
    for _ in generation:
        pass
    return generation.text


def chat(client: OpenAI, **fields: Any) -> ChatCompletion:
    fields = {"max_tokens": 24, "temperature": 0, "messages": ASK, **fields}
    answer: ChatCompletion = client.chat.completions.create(model=MODEL, **fields)
    ChatCompletion.model_validate_json(answer.to_json())  # the client itself does not check
    return answer


def chunks_of(client: OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    fields = {"max_tokens": 24, "temperature": 0, "messages": ASK, **fields}
    stream = client.chat.completions.create(model=MODEL, stream=True, **fields)
    return [ChatCompletionChunk.model_validate_json(chunk.to_json()) for chunk in stream]


def complete(client: OpenAI, prompt: Any, **fields: Any) -> Completion:
    fields = {"max_tokens": 12, "temperature": 0, **fields}
    answer = client.completions.create(model=MODEL, prompt=prompt, **fields)
    return Completion.model_validate_json(answer.to_json())


def content(answer: ChatCompletion, place: int = 0) -> str:
    found = answer.choices[place].message.content
    assert found is not None
    return found


# ---- the text, and how it is sampled --------------------------------------------------------

FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 1, "seed": 3}, {"temp": 1.0, "seed": 3}),
    ({"temperature": 1, "seed": 3, "top_p": 0.5}, {"temp": 1.0, "seed": 3, "top_p": 0.5}),
    (
        {"temperature": 0.7, "seed": 2**64 - 1, "extra_body": {"top_k": 5}},
        {"temp": 0.7, "seed": 2**64 - 1, "top_k": 5},
    ),
    (
        {"temperature": 1, "seed": -1, "extra_body": {"min_p": 0.2, "top_k": -1}},
        {"temp": 1.0, "seed": 2**64 - 1, "min_p": 0.2},
    ),
    ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
    ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    (
        {"extra_body": {"repetition_penalty": 1.8, "repetition_context_size": 50}},
        {"repetition_penalty": 1.8, "repetition_context_size": 50},
    ),
    ({"logit_bias": {"300": 20, "17": -5}}, {"logit_bias": {300: 20.0, 17: -5.0}}),
]


@pytest.mark.parametrize(("fields", "sampling"), FIELDS)
def test_fields_mean_what_they_mean_to_the_library(
    client: OpenAI, reference: Cluster, fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    expected = text_of(reference, max_tokens=24, **sampling)
    assert content(chat(client, **fields)) == expected
    streamed = chunks_of(client, **fields)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == expected
    if fields:
        assert expected != text_of(reference, max_tokens=24)


def test_the_default_temperature_is_one(client: OpenAI, reference: Cluster) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, seed=9, max_tokens=24)
    assert content(answer) == text_of(reference, max_tokens=24, temp=1.0, seed=9)


def test_each_choice_has_a_seed_of_its_own(client: OpenAI) -> None:
    three = chat(client, n=3, seed=5, temperature=1)
    alone = [content(chat(client, seed=5 + at, temperature=1)) for at in range(3)]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert [content(three, at) for at in range(3)] == alone
    assert len(set(alone)) == 3
    streamed = ["", "", ""]
    for chunk in chunks_of(client, n=3, seed=5, temperature=1):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == alone


def test_more_choices_find_the_prompt_in_the_cache(client: OpenAI) -> None:
    """The prompt counts once, and the second choice computes none of its full blocks again."""
    question = [{"role": "user", "content": "Once more unto the breach. " * 12}]
    answer = chat(client, messages=question, n=2)
    one = chat(client, messages=question, n=1)
    assert answer.usage and one.usage
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens > 64
    assert answer.usage.completion_tokens == 2 * one.usage.completion_tokens
    assert one.usage.prompt_tokens_details is not None
    assert (one.usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_the_context_bounds_a_text_without_limit(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "x" * 960}]
    endless = {str(END): -100}
    answer = client.chat.completions.create(model=MODEL, messages=messages, logit_bias=endless)
    raw = client.completions.create(model=MODEL, prompt=[300] * 1000, logit_bias=endless)
    for found in (answer, raw):
        assert found.usage is not None
        assert found.usage.total_tokens == 1024 and found.usage.completion_tokens > 10
        assert found.choices[0].finish_reason == "length"


def test_limits_of_tokens(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model=MODEL, messages=ASK, **{name: 5})  # type: ignore[call-overload]
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_the_end_token(client: OpenAI) -> None:
    bias = {str(END): 100}
    answer = chat(client, logit_bias=bias)
    assert (content(answer), answer.choices[0].finish_reason) == ("", "stop")
    answer = chat(client, logit_bias=bias, extra_body={"ignore_eos": True}, max_tokens=7)
    assert answer.usage and answer.usage.completion_tokens == 7
    assert answer.choices[0].finish_reason == "length"


def test_stop_strings(client: OpenAI) -> None:
    """They may begin and end within tokens."""
    whole = content(chat(client))
    for at in range(3, len(whole) - 6, 4):
        stop = whole[at : at + 5]
        expected = whole[: whole.index(stop)]
        answer = chat(client, stop=stop)
        assert (content(answer), answer.choices[0].finish_reason) == (expected, "stop")
        streamed = chunks_of(client, stop=["never said", stop])
        assert "".join(c.choices[0].delta.content or "" for c in streamed) == expected
        assert streamed[-1].choices[0].finish_reason == "stop"


# ---- the form of streams and of what comes besides the text ---------------------------------


def test_the_form_of_a_stream(client: OpenAI) -> None:
    chunks = chunks_of(client, stream_options={"include_usage": True})
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.role for chunk in middle)
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
    assert end.choices[0].finish_reason == "length"
    assert usage.choices == [] and usage.usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    whole = chat(client)
    assert usage.usage.total_tokens == whole.usage.total_tokens  # type: ignore[union-attr]
    assert whole.id != first.id and whole.id.startswith("chatcmpl-")
    assert whole.system_fingerprint == first.system_fingerprint
    assert not any(chunk.usage for chunk in chunks_of(client))


def test_the_events_of_a_stream(server: Server) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": ASK}),
        ("completions", {"prompt": "The king"}),
    ]
    for path, body in asked:
        body |= {"max_tokens": 4, "stream": True}
        answer = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)


def test_log_probabilities_of_a_chat(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4)
    assert answer.choices[0].logprobs is not None
    found = answer.choices[0].logprobs.content or []
    assert len(found) == 24
    said = b"".join(bytes(each.bytes or []) for each in found).decode()
    assert said.strip() == content(answer).strip()
    for each in found:
        top = [one.logprob for one in each.top_logprobs]
        assert len(top) == 4 and top == sorted(top, reverse=True)
        assert each.logprob == top[0] <= 0  # greedy
    chunks = chunks_of(client, logprobs=True, top_logprobs=4)
    streamed = [
        each
        for chunk in chunks
        if chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == found
    plain = chat(client, logprobs=True).choices[0].logprobs
    assert plain is not None and [t.top_logprobs for t in plain.content or []] == [[]] * 24
    assert chat(client).choices[0].logprobs is None


def test_token_ids(client: OpenAI, server: Server) -> None:
    answer = chat(client, extra_body={"return_token_ids": True}).model_dump()
    asked = httpx.post(f"{server.url}/tokenize", json={"messages": ASK}).json()
    assert answer["prompt_token_ids"] == asked["tokens"]
    ids = answer["choices"][0]["token_ids"]
    said = httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json()
    assert said["prompt"].strip() == answer["choices"][0]["message"]["content"].strip()
    chunks = [c.model_dump() for c in chunks_of(client, extra_body={"return_token_ids": True})]
    assert chunks[0]["prompt_token_ids"] == asked["tokens"]
    assert [i for c in chunks for i in c["choices"][0].get("token_ids") or []] == ids


# ---- messages -----------------------------------------------------------------------------


def test_forms_of_messages(client: OpenAI) -> None:
    """Parts are joined, a developer is the system; what changes nothing is accepted."""
    plain = chat(client, messages=[{"role": "system", "content": "Be brief."}, *ASK])
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    other = chat(
        client,
        messages=[{"role": "developer", "content": parts}, {**ASK[0], "refusal": None}],
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        parallel_tool_calls=True,
        tool_choice="none",
        modalities=["text"],
        extra_body={"audio": None, "top_k": None},
    )
    assert content(plain) == content(other) != content(chat(client))


def test_going_on_with_a_message(client: OpenAI) -> None:
    start = content(chat(client, max_tokens=8))
    messages = [*ASK, {"role": "assistant", "content": start}]
    settings = {"continue_final_message": True, "add_generation_prompt": False}
    rest = chat(client, messages=messages, max_tokens=8, extra_body=settings)
    anew = chat(client, messages=messages, max_tokens=8)
    assert rest.usage and anew.usage
    assert rest.usage.prompt_tokens < anew.usage.prompt_tokens
    assert content(rest) != content(anew)


# ---- tools and grammars ---------------------------------------------------------------------


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: list[Any] = [
    tool("weather", city={"$ref": "#/$defs/city"}, days={"enum": [1, 2, 14]}),
    tool("clock", zone={"enum": ["UTC", "CET"]}),
]
TOOLS[0]["function"]["parameters"]["$defs"] = {"city": {"enum": ["Ulm", "Rom", 'A "b"']}}


def check_call(call: Any) -> str:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "clock":
        assert arguments in ({"zone": "UTC"}, {"zone": "CET"})
    else:
        assert call.function.name == "weather" and arguments.keys() == {"city", "days"}
        assert arguments["city"] in ("Ulm", "Rom", 'A "b"')
        assert arguments["days"] in (1, 2, 14)
    return str(call.function.name)


@pytest.mark.parametrize("seed", range(3))
def test_calls_that_must_be_made(client: OpenAI, seed: int) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "temperature": 1, "seed": seed, "max_tokens": 300}
    choice = chat(client, tool_choice="required", **fields).choices[0]
    calls = choice.message.tool_calls or []
    assert calls and choice.message.content is None
    assert {check_call(call) for call in calls} <= {"weather", "clock"}
    assert len({call.id for call in calls}) == len(calls)
    assert choice.finish_reason == "tool_calls" or len(calls) > 1

    one = chat(client, tool_choice="required", parallel_tool_calls=False, **fields).choices[0]
    assert len(one.message.tool_calls or []) == 1
    assert one.finish_reason == "tool_calls"

    for name in ("weather", "clock"):
        named = {"type": "function", "function": {"name": name}}
        choice = chat(client, tool_choice=named, **fields).choices[0]
        assert [check_call(call) for call in choice.message.tool_calls or []] == [name]
        assert choice.finish_reason == "tool_calls"


def test_a_stream_of_calls(client: OpenAI) -> None:
    """OpenAI's client puts its deltas together, and they make what comes in one piece."""
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    fields |= {"seed": 2, "max_tokens": 200}
    with client.chat.completions.stream(model=MODEL, messages=ASK, **fields) as stream:
        kinds = [event.type for event in stream]
        assert kinds.count("tool_calls.function.arguments.delta") > 2
        streamed = stream.get_final_completion().choices[0]
    whole = chat(client, temperature=1, **fields).choices[0]
    assert streamed.message.tool_calls and whole.message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in streamed.message.tool_calls] == [
        (c.function.name, c.function.arguments)  # type: ignore[union-attr]
        for c in whole.message.tool_calls
    ]
    assert streamed.finish_reason == whole.finish_reason


def test_a_round_with_tools(client: OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "clock"}}
    answer = chat(client, tools=TOOLS, tool_choice=named, max_tokens=100).choices[0].message
    assert answer.tool_calls
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "noon"}
    history = [*ASK, answer.model_dump(), result]
    said = chat(client, messages=history, tools=TOOLS, tool_choice="none")
    assert content(said) and not said.choices[0].message.tool_calls
    without = chat(client, messages=[*ASK, result])
    assert said.usage and without.usage
    assert said.usage.prompt_tokens > without.usage.prompt_tokens + 10


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Literal["crown", "sword", "été"]
    count: int = Field(ge=0, le=20)
    note: str = Field(max_length=8)


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    items: list[Item] = Field(min_length=1, max_length=2)
    paid: bool
    code: str = Field(pattern=r"^[A-Z]{2}-\d{3}$")


@pytest.mark.parametrize("seed", range(20))
def test_answers_by_a_schema(client: OpenAI, seed: int) -> None:
    """Pydantic, which knows nothing of grammars, checks what its schema has made."""
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Order, seed=seed, max_tokens=500
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.parsed == Order.model_validate_json(choice.message.content or "")


def test_a_schema_binds_without_strict_and_in_a_stream(client: OpenAI) -> None:
    schema = {"name": "n", "schema": Order.model_json_schema(), "strict": False}
    form: Any = {"type": "json_schema", "json_schema": schema}
    chunks = chunks_of(client, response_format=form, temperature=1, seed=1, max_tokens=500)
    Order.model_validate_json("".join(c.choices[0].delta.content or "" for c in chunks))


def test_answers_that_are_json(client: OpenAI) -> None:
    ended = 0
    for seed in range(5):
        answer = chat(
            client,
            response_format={"type": "json_object"},
            seed=seed,
            temperature=1,
            max_tokens=200,
        )
        assert content(answer).startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(content(answer)), dict)
            ended += 1
    assert ended


GRAMMAR = r'start: /[a-z]{3,9}/ ("," /[a-z]{3,9}/){2} "." "!"?'


def test_answers_by_a_grammar(client: OpenAI) -> None:
    for seed in range(6):
        answer = chat(client, temperature=1, seed=seed, extra_body={"grammar": GRAMMAR})
        assert re.fullmatch(r"[a-z]{3,9}(,[a-z]{3,9}){2}\.!?", content(answer))
        raw = complete(client, "King", temperature=1, seed=seed, extra_body={"grammar": GRAMMAR})
        assert raw.choices[0].text


@pytest.mark.slow
def test_drafts_change_no_answer(client: OpenAI, tmp_path: Any) -> None:
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    settings: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "o"}}},
        {"extra_body": {"grammar": GRAMMAR}},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200},
        {"temperature": 1, "seed": 4, "extra_body": {"grammar": 'start: (" to be,")+'}},
    ]
    settings[0]["response_format"]["json_schema"]["schema"] = Order.model_json_schema()

    def texts(speculate: str) -> list[Any]:
        flags = ("--chat-template", str(template), "--speculate", speculate)
        with serving(*flags) as other:
            asked = OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0)
            with asked:
                messages = [chat(asked, **each).choices[0].message for each in settings]
        return [
            [call.function.arguments for call in message.tool_calls]  # type: ignore[union-attr]
            if message.tool_calls
            else message.content
            for message in messages
        ]

    assert texts("4") == texts("off")


# ---- completions ------------------------------------------------------------------------------


def test_forms_of_a_prompt(client: OpenAI, reference: Cluster) -> None:
    """A text, its token ids, and lists of both; the text is what the library generates."""
    first, second = "The king is", "Once more"
    ids = [list(reference.tokenizer.encode(text)) for text in (first, second)]
    expected = []
    for each in ids:
        generation = reference.generate(each, max_tokens=12)
        for _ in generation:
            pass
        expected.append(generation.text)
    for prompt in (first, ids[0], [first], [ids[0]]):
        answer = complete(client, prompt)
        assert answer.choices[0].text.lstrip(" ") == expected[0].lstrip(" ")
        assert answer.choices[0].finish_reason == "length"
    for prompt in ([first, second], ids):
        both = complete(client, prompt, n=2, temperature=0)
        assert [c.index for c in both.choices] == [0, 1, 2, 3]
        texts = [c.text.lstrip(" ") for c in both.choices]
        assert texts == [text.lstrip(" ") for text in expected for _ in range(2)]
        assert both.usage is not None
        assert both.usage.prompt_tokens == len(ids[0]) + len(ids[1])
        assert both.usage.completion_tokens == 4 * 12


def test_echo_and_the_first_blank(client: OpenAI) -> None:
    plain = complete(client, "The king is").choices[0].text
    assert complete(client, "The king is", echo=True).choices[0].text == "The king is" + plain
    assert not plain[0].isalpha()  # or "is" would go on


def test_a_stream_of_completions(client: OpenAI) -> None:
    fields: Any = {"n": 2, "seed": 7, "temperature": 1, "echo": True, "max_tokens": 10}
    whole = complete(client, ["The king", "A"], **fields)
    stream = client.completions.create(
        model=MODEL,
        prompt=["The king", "A"],
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    texts, reasons, usages = [""] * 4, [""] * 4, []
    for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4
    assert whole.usage is not None and usages[-1] is not None
    assert usages[-1].total_tokens == whole.usage.total_tokens and not any(usages[:-1])


def test_log_probabilities_of_a_completion(client: OpenAI) -> None:
    answer = complete(client, "The king is", logprobs=3).choices[0]
    found = answer.logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs
    assert "".join(found.tokens) == answer.text
    assert (
        found.text_offset
        and [
            answer.text[at : at + len(token)] for at, token in zip(found.text_offset, found.tokens)
        ]
        == found.tokens
    )
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert len(top) == 3 and top[token] == logprob == max(top.values())
    assert complete(client, "The king is").choices[0].logprobs is None


# ---- the rest -----------------------------------------------------------------------------------


def test_tokens_and_texts(server: Server, reference: Cluster) -> None:
    text = "Wherefore art thou, 火?"
    asked = httpx.post(
        f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}
    ).json()
    assert asked["tokens"] == reference.tokenizer.encode(text)
    assert asked["count"] == len(asked["tokens"]) == len(asked["token_strs"])
    assert asked["max_model_len"] == 1024
    said = httpx.post(f"{server.url}/detokenize", json={"tokens": asked["tokens"]}).json()
    assert said == {"prompt": text}


def test_the_snippet_of_the_docs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(snippet.replace("http://127.0.0.1:8080", server.url), {})
    assert capsys.readouterr().out.strip()


def test_there_are_no_embeddings(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embedding"):
        client.embeddings.create(model=MODEL, input="text")
