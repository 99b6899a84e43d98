"""From messages or text to a prompt: chat templates, tokens, borders for the prefix cache."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.meta import find_undeclared_variables
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.engine.prompt import check_ids, render_chat
from zmoe.errors import InputError
from zmoe.server.errors import ApiError, invalid

# What a template is given in any case, and how mlx-lm and transformers are called.
_GIVEN = frozenset(
    {"messages", "conversation", "tools", "chat_template", "raise_exception", "strftime_now"}
    | {"add_generation_prompt", "continue_final_message", "tokenize", "return_dict"}
    | {"return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs", "padding"}
    | {"truncation", "max_length", "bos_token", "eos_token", "unk_token", "pad_token"}
    | DEFAULT_NAMESPACE.keys()
)
_OPENING = 16  # tokens at the end of a prompt within which a template opens thoughts, if it does

Message = Mapping[str, Any]  # as chat templates take it: role, content, tool_calls, ...


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids.

    `borders` are numbers of tokens after which other prompts may go on differently. `state` is
    where the text that follows begins: "normal", or "reasoning" where the template has opened
    the model's thoughts. `goes_on` says that it goes on with a text that has begun.
    """

    ids: list[int]
    borders: tuple[int, ...] = ()
    state: str = "normal"
    goes_on: bool = False


class Prompts:
    """Renders prompts for one model."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self.tokenizer = tokenizer
        self._beginning = lru_cache(maxsize=16)(self._render_beginning)

    def of_text(self, text: str, param: str = "prompt") -> Prompt:
        """The prompt of a completion. Raises ApiError."""
        if not text:
            raise invalid(param, "is empty")
        return Prompt(list(self.tokenizer.encode(text)))

    def of_ids(self, ids: Sequence[int], param: str = "prompt") -> Prompt:
        """The prompt of a completion that comes in tokens. Raises ApiError."""
        try:
            return Prompt(check_ids(ids, self.tokenizer))
        except InputError as error:
            problem = str(error).replace("the prompt", param, 1)
            raise ApiError(400, problem, param, "invalid_value") from None

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
        self._check_kwargs(kwargs or {})
        ids = self._render(messages, tools, kwargs, continue_last)
        system = list(takewhile(lambda m: m["role"] == "system", messages))
        borders: tuple[int, ...] = ()
        if system and len(system) < len(messages):
            known = self._beginning(json.dumps([system, tools, kwargs]))
            alike = takewhile(lambda tokens: tokens[0] == tokens[1], zip(ids, known))
            borders = (sum(1 for _ in alike),)
        state = self._state(ids, 0 if continue_last else len(ids) - _OPENING)
        return Prompt(ids, borders, state, continue_last)

    def kwargs_of_effort(self, effort: str) -> dict[str, Any]:
        """What tells the template how much the model is to think. Raises ApiError where that
        would change nothing.
        """
        known = self._variables
        if known is not None and "reasoning_effort" in known:
            return {"reasoning_effort": effort}
        can_switch = self.tokenizer.has_thinking if known is None else "enable_thinking" in known
        if not can_switch:
            raise invalid("reasoning_effort", "is not supported: it does not change this model")
        if effort != "none":
            raise invalid("reasoning_effort", f'is {effort!r}: this model knows "none" alone')
        return {"enable_thinking": False}

    def kwargs_of_thinking(self, thinks: bool | None, effort: str | None) -> dict[str, Any]:
        """What tells the template whether the model is to think, and how much, as far as it can
        be told; None leaves that to the template.
        """
        known = self._variables
        if known is None:
            known = {"enable_thinking"} if self.tokenizer.has_thinking else frozenset()
        wanted = {"enable_thinking": thinks, "reasoning_effort": effort}
        return {
            name: value for name, value in wanted.items() if value is not None and name in known
        }

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        if not kwargs:
            return
        if not self.tokenizer.has_chat_template:
            raise invalid("chat_template_kwargs", "are for a chat template: the model has none")
        known = self._variables
        for name in kwargs:
            if name in _GIVEN or (known is not None and name not in known):
                raise invalid(
                    "chat_template_kwargs", f"has {name!r}, which the model's template does not use"
                )

    @cached_property
    def _variables(self) -> Set[str] | None:
        """The names that the chat template may be given; None where only it knows."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            return None
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        try:  # transformers has one tag of its own
            tree = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
        except TemplateSyntaxError:
            return None
        return find_undeclared_variables(tree)

    def _render_beginning(self, settings: str) -> tuple[int, ...]:
        """The tokens with which all prompts begin that have the same system prompt, tools and
        kwargs, these in JSON.
        """
        system, tools, kwargs = json.loads(settings)
        first, second = (
            self._render([*system, {"role": "user", "content": text}], tools, kwargs, False)
            for text in ("A", "1")
        )
        alike = takewhile(lambda tokens: tokens[0] == tokens[1], zip(first, second))
        return tuple(token for token, _ in alike)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
        continue_last: bool,
    ) -> list[int]:
        if tools and not self.tokenizer.has_chat_template:
            raise invalid("tools", "cannot be told to a model without chat template")
        try:
            ids = render_chat(
                self.tokenizer,
                messages,
                kwargs or {},
                tools=tools or (),
                continue_last=continue_last,
            )
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:300]
            raise ApiError(
                400, f"messages do not go with the model's chat template: {reason}", "messages"
            ) from None
        if not ids:
            raise invalid("messages", "make an empty prompt")
        return ids

    def _state(self, ids: Sequence[int], start: int) -> str:
        """Whether the prompt ends within thoughts, which began at `start` or later."""
        tokenizer = self.tokenizer
        if tokenizer.response_initial_state:
            return str(tokenizer.response_initial_state)
        if not tokenizer.has_thinking:
            return "normal"
        opened = tokenizer.rfind_think_start(ids, start)
        closed = tokenizer.rfind_think_end(ids, start)
        return "reasoning" if opened > closed else "normal"
