"""From messages to tokens: what the template is told, and where the text behind it begins."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.server.texts import tokenizer
from zmoe.server.errors import ApiError
from zmoe.server.prompts import Prompts

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKS = PLAIN + "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
EFFORT = PLAIN + "{% generation %}{{ reasoning_effort }}{% endgeneration %}"
ASK = [{"role": "user", "content": "Why?"}]


def prompts(template: str | None = PLAIN, *, thinks: bool = False) -> Prompts:
    found = tokenizer(thinks=thinks)
    found.chat_template, found.has_chat_template = template, template is not None
    return Prompts(found)


def refused(run: Any, param: str) -> str:
    with pytest.raises(ApiError) as caught:
        run()
    assert (caught.value.status, caught.value.param) == (400, param)
    return caught.value.message


def test_a_template_makes_the_prompt() -> None:
    found = prompts()
    prompt = found.of_chat([{"role": "system", "content": "Be brief."}, *ASK])
    text = "[system]Be brief.[user]Why?[assistant]"
    assert prompt.ids == found.tokenizer.encode(text)
    (border,) = prompt.borders
    assert found.tokenizer.decode(prompt.ids[:border]) == "[system]Be brief.[user]"
    assert found.of_chat(ASK).borders == ()


def test_a_model_without_template_is_given_the_contents() -> None:
    found = prompts(None)
    assert found.of_chat([*ASK, *ASK]).ids == found.tokenizer.encode("Why?\nWhy?")
    tools = [{"type": "function", "function": {"name": "f"}}]
    refused(lambda: found.of_chat(ASK, tools=tools), "tools")
    refused(lambda: found.of_chat(ASK, kwargs={"a": 1}), "chat_template_kwargs")
    refused(lambda: found.of_chat([{"role": "user", "content": ""}]), "messages")


def test_thoughts_that_the_template_opens() -> None:
    found = prompts(THINKS, thinks=True)
    assert found.of_chat(ASK).state == "reasoning"
    assert found.of_chat(ASK, kwargs={"enable_thinking": False}).state == "normal"
    told = [{"role": "user", "content": "What does <think> mean? " + "I wonder. " * 9}]
    assert found.of_chat(told, kwargs={"enable_thinking": False}).state == "normal"
    begun = [*ASK, {"role": "assistant", "content": "<think>" + "I wonder. " * 9}]
    assert found.of_chat(begun, continue_last=True).state == "reasoning"


def test_only_what_the_template_uses() -> None:
    found = prompts(THINKS, thinks=True)
    for name in ("reasoning_effort", "messages", "tools", "tokenize", "add_generation_prompt"):
        message = refused(
            lambda name=name: found.of_chat(ASK, kwargs={name: "x"}), "chat_template_kwargs"
        )
        assert repr(name) in message
    assert prompts(EFFORT).of_chat(ASK, kwargs={"reasoning_effort": "low"}).ids


def test_effort_is_refused_where_it_changes_nothing() -> None:
    assert prompts(EFFORT).kwargs_of_effort("low") == {"reasoning_effort": "low"}
    assert prompts(THINKS).kwargs_of_effort("none") == {"enable_thinking": False}
    refused(lambda: prompts(THINKS).kwargs_of_effort("low"), "reasoning_effort")
    refused(lambda: prompts(PLAIN).kwargs_of_effort("none"), "reasoning_effort")


def test_a_template_that_raises() -> None:
    found = prompts("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in refused(lambda: found.of_chat(ASK), "messages")
