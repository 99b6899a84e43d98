"""From messages or text to a prompt: chat templates, tokens, borders for the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.engine.prompt import check_ids
from zmoe.errors import InputError
from zmoe.server.errors import ApiError, invalid

Message = Mapping[str, Any]  # as chat templates take it: role, content, tool_calls, ...


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids.

    `borders` are numbers of tokens after which other prompts may go on differently. `state` is
    where the text that follows begins: "normal", or "reasoning" where the template has opened
    the model's thoughts.
    """

    ids: list[int]
    borders: tuple[int, ...] = ()
    state: str = "normal"


class Prompts:
    """Renders prompts for one model."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self.tokenizer = tokenizer

    def of_text(self, text: str, param: str = "prompt") -> Prompt:
        """The prompt of a completion. Raises ApiError."""
        if not text:
            raise invalid(param, "is empty")
        _check_unicode(text, param)
        return Prompt(list(self.tokenizer.encode(text)))

    def of_ids(self, ids: Sequence[int], param: str = "prompt") -> Prompt:
        """The prompt of a completion that comes in tokens. Raises ApiError."""
        try:
            return Prompt(check_ids(ids, self.tokenizer))
        except InputError as error:
            raise ApiError(400, str(error), param) from None

    def of_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> Prompt:
        """The prompt of a chat: `messages` with text for contents, `tools` as OpenAI's, `kwargs`
        for the template. With `continue_last` the last message is one to go on with.

        A model without template is given the contents, one after the other. Raises ApiError.
        """
        ids = self._render(messages, tools, kwargs, continue_last)
        system = list(takewhile(lambda m: m["role"] == "system", messages))
        borders: tuple[int, ...] = ()
        if system and len(system) < len(messages):
            others = (
                self._render([*system, {"role": "user", "content": text}], tools, kwargs, False)
                for text in ("A", "1")
            )
            alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(ids, *others))
            borders = (sum(1 for _ in alike),)
        return Prompt(ids, borders, self._state(ids))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
        continue_last: bool,
    ) -> list[int]:
        for at, message in enumerate(messages):
            _check_unicode(message.get("content") or "", f"messages[{at}].content")
        if not self.tokenizer.has_chat_template:
            if tools:
                raise invalid("tools", "cannot be told to a model without chat template")
            if kwargs:
                raise invalid("chat_template_kwargs", "are for a chat template: the model has none")
            text = "\n".join(message.get("content") or "" for message in messages)
            if not text:
                raise invalid("messages", "hold no text")
            return list(self.tokenizer.encode(text))
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools or None,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                **(kwargs or {}),
            )
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:300]
            raise ApiError(
                400, f"messages do not go with the model's chat template: {reason}", "messages"
            ) from None
        if not ids:
            raise invalid("messages", "make an empty prompt")
        return list(ids)

    def _state(self, ids: Sequence[int]) -> str:
        """Whether the prompt ends within thoughts."""
        tokenizer = self.tokenizer
        if tokenizer.response_initial_state:
            return str(tokenizer.response_initial_state)
        if not tokenizer.has_thinking:
            return "normal"
        opened, closed = tokenizer.rfind_think_start(ids), tokenizer.rfind_think_end(ids)
        return "reasoning" if opened > closed else "normal"


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(param, f"is no Unicode text at character {error.start + 1}") from None
