"""Fields that the chat and the text completions share, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from zmoe.config import Sampling
from zmoe.errors import InputError, SettingError
from zmoe.server.errors import ApiError, invalid
from zmoe.server.front import Front
from zmoe.server.grammar import json_grammar
from zmoe.server.http import Body
from zmoe.server.prompts import Prompt

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1024
MOST_BIASED = 1024
_MOST = 2**31 - 1


def refused(problem: str) -> PydanticCustomError:
    """What a validator raises: `problem` follows the name of the field."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem})


def _stops(given: Any) -> Any:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise refused("is neither a text nor a list of texts")
    if len(stops) > MOST_STOPS:
        raise refused(f"has {len(stops)} texts: at most {MOST_STOPS} are supported")
    if not all(1 <= len(each) <= MOST_STOP_CHARACTERS for each in stops):
        raise refused(f"holds a text that has not 1 to {MOST_STOP_CHARACTERS} characters")
    return stops


def _bias(given: Any) -> Any:
    """Token ids as JSON has them, which are texts, as numbers."""
    if not isinstance(given, dict):
        raise refused("is no object of token ids with a number from -100 to 100 each")
    if len(given) > MOST_BIASED:
        raise refused(f"has {len(given)} tokens: at most {MOST_BIASED} are supported")
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise refused(f"has {token!r}, which is no token id")
    return {int(token): bias for token, bias in given.items()}


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Body):
    """The schema of an answer; `strict` or not, the answer keeps to it."""

    name: str
    description: str = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CompletionFields(Body):
    """The fields that the two share. Those at the end change no answer."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=_MOST)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = 1.0
    top_k: int = Field(0, ge=-1, le=_MOST)
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    grammar: str = ""
    return_token_ids: bool = False
    user: Any = None
    metadata: Any = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    def check(self) -> None:
        """Raise ApiError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is for a stream, which was not asked for")

    def samplings(
        self, front: Front, prompt: Prompt, param: str, *, max_tokens: int | None, top: int | None
    ) -> list[Sampling]:
        """How each of the `n` choices is sampled: up to `max_tokens` tokens, None for as many as
        fit behind `prompt`, which is the field `param`, with `top` log-probabilities. Raises
        ApiError.
        """
        room = front.room(len(prompt.ids), param)
        vocabulary = front.link.ready.vocabulary if front.link.ready is not None else _MOST
        try:
            return [
                Sampling(
                    max_tokens=min(max_tokens or room, room),
                    temp=self.temperature,
                    top_p=self.top_p,
                    top_k=self.top_k if 0 < self.top_k < vocabulary else 0,
                    min_p=self.min_p,
                    repetition_penalty=self.repetition_penalty,
                    repetition_context_size=self.repetition_context_size,
                    presence_penalty=self.presence_penalty,
                    frequency_penalty=self.frequency_penalty,
                    logit_bias=self._known_bias(vocabulary),
                    logprobs=top,
                    seed=None if self.seed is None else (self.seed + at) % 2**64,
                    ignore_eos=self.ignore_eos,
                )
                for at in range(self.n)
            ]
        except SettingError as error:
            raise invalid(error.setting, error.problem) from None

    def _known_bias(self, vocabulary: int) -> dict[int, float] | None:
        for token, bias in self.logit_bias.items():
            if token >= vocabulary:
                raise invalid("logit_bias", f"has token {token}: the model has {vocabulary}")
            if not -100 <= bias <= 100:
                raise invalid("logit_bias", f"has {bias} for token {token}: expected -100 to 100")
        return self.logit_bias or None

    def answer_schema(self) -> tuple[str, dict[str, Any]] | None:
        """The schema of an answer in JSON, and the field that it comes from. Raises ApiError."""
        found = self.response_format
        if found is None or found.type == "text":
            return None
        if self.grammar:
            raise invalid("grammar", "cannot be combined with response_format")
        if found.type == "json_object":
            return "response_format", {"type": "object"}
        param = "response_format.json_schema"
        if found.json_schema is None:
            raise ApiError(400, f"{param} is missing", param, "missing_required_parameter")
        schema = found.json_schema.schema_
        return f"{param}.schema", {"type": "object"} if schema is None else schema

    async def answer_grammar(self, front: Front) -> str:
        """The grammar of the answer, empty where there is none. Raises ApiError."""
        param, grammar = "grammar", self.grammar
        if (known := self.answer_schema()) is not None:
            param, schema = known
            grammar = json_grammar(schema)
        if grammar:
            await self.check_grammar(front, grammar, param)
        return grammar

    async def check_grammar(self, front: Front, grammar: str, param: str) -> None:
        """Raise ApiError for a grammar, that of the field `param`, which cannot be used."""
        if self.ignore_eos:
            raise invalid("ignore_eos", "cannot be combined with a grammar, which ends the text")
        try:
            await asyncio.to_thread(front.grammars.check, grammar)
        except InputError as error:
            raise invalid(param, f"cannot be compiled: {error}") from None


def usage(groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The usage of choices, those of a group with one prompt, which counts once."""
    choices = [choice for group in groups for choice in group]
    prompts = sum(group[0].prompt_tokens for group in groups)
    completions = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "total_tokens": prompts + completions,
        "prompt_tokens_details": {"cached_tokens": sum(g[0].cached_tokens for g in groups)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)
        },
    }
