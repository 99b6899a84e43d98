"""From a user's prompt to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from zmoe.config import is_int
from zmoe.errors import InputError, ModelError, SettingError


def open_tokenizer(folder: Path, chat_template: str | None = None) -> TokenizerWrapper:
    """The tokenizer of a checkpoint, with another chat template if one is given; ModelError names
    the folder, and what it lacks.
    """
    settings = {} if chat_template is None else {"chat_template": chat_template}
    try:
        tokenizer: TokenizerWrapper = load_tokenizer(folder, settings)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder}: cannot load its tokenizer: {reason[0]}") from error
    # By the model's type alone transformers makes one that knows nothing else.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ModelError(f"{folder} holds no tokenizer: expected tokenizer.json in it")
    return tokenizer


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: str,
    *,
    system_prompt: str | None = None,
    ignore_chat_template: bool = False,
    chat_template_config: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of `prompt`, through the chat template if the model has one.

    Raises InputError for an empty prompt, and for chat settings that a model
    without template would ignore.
    """
    if not prompt:
        raise InputError("the prompt is empty")
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    config = chat_template_config or {}
    return encode_chat(tokenizer, messages, config, ignore_chat_template=ignore_chat_template)


def encode_chat(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    chat_template_config: Mapping[str, Any],
    *,
    ignore_chat_template: bool = False,
) -> list[int]:
    """Token ids of a conversation, whose `messages` have a "role" and a text as "content"; of a
    model without chat template, of the texts one after the other. Raises InputError.
    """
    for message in messages:
        what = "the system prompt" if message["role"] == "system" else "the prompt"
        _check_text(what, message["content"])
    if ignore_chat_template or not tokenizer.has_chat_template:
        system = any(message["role"] == "system" for message in messages)
        if system or chat_template_config:
            setting = "system_prompt" if system else "chat_template_config"
            raise SettingError(setting, "needs a chat template, and none is in use")
    ids = render_chat(
        tokenizer, messages, chat_template_config, ignore_chat_template=ignore_chat_template
    )
    if not ids:
        raise InputError("the prompt holds no token")
    return ids


def render_chat(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    chat_template_config: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    continue_last: bool = False,
    ignore_chat_template: bool = False,
) -> list[int]:
    """Token ids of a conversation by the chat template, which knows `tools` in OpenAI's form and
    with `continue_last` leaves the last message open; without a template, of the contents one
    after the other. Raises what the template does.
    """
    if ignore_chat_template or not tokenizer.has_chat_template:
        text = "\n".join(message.get("content") or "" for message in messages)
        bos = tokenizer.bos_token
        has_begun = bos is not None and text.startswith(bos)
        return list(tokenizer.encode(text, add_special_tokens=not has_begun)) if text else []
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(tools) or None,
        add_generation_prompt=not continue_last,
        continue_final_message=continue_last,
        **chat_template_config,
    )
    return list(ids)


def border_of_system_prompt(
    tokenizer: TokenizerWrapper, ids: Sequence[int], **settings: Any
) -> int:
    """How many tokens at the beginning of `ids` any other prompt has under the same `settings`
    of encode_prompt().
    """
    others = [encode_prompt(tokenizer, other, **settings) for other in ("A", "1")]
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(ids, *others))
    return sum(1 for _ in alike)


def _check_text(what: str, text: str) -> None:
    """Raise InputError for text that came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not UTF-8 at character {error.start + 1}") from None


def check_ids(ids: Iterable[int], tokenizer: TokenizerWrapper) -> list[int]:
    """`ids` (a list, or an array of numpy or MLX) as a list of ints.

    Raises InputError for anything else, for an empty list, and for an id outside of the
    tokenizer's vocabulary.
    """
    found: Any = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(found, (bytes, bytearray)) or not isinstance(found, Iterable):
        raise InputError(f"the prompt is {type(ids).__name__}: expected text, or token ids")
    checked = list(found)
    if not checked:
        raise InputError("the prompt is empty")
    size = len(tokenizer)  # the highest id is no lower than that says, but takes long to find
    if not all(is_int(token, 0, size - 1) for token in checked):
        highest = max(tokenizer.get_vocab().values())
        for token in checked:
            if not is_int(token, 0, highest):
                raise InputError(
                    f"the prompt holds {token!r}: expected token ids from 0 to {highest}"
                )
    return checked


def check_length(prompt_tokens: int, context: int | None) -> None:
    """Raise InputError when the prompt leaves no room for one more token."""
    if context is not None and prompt_tokens >= context:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, and the model's context {context}: "
            f"shorten it to at most {context - 1}"
        )
