"""Log-probabilities with the texts of their tokens, in the forms of chats and of completions."""

from __future__ import annotations

from typing import Any

from zmoe.server.generation import Delta
from zmoe.server.grammar import Grammars
from zmoe.server.messages import Logprobs

_LEAST = -9999.0  # stands for a probability of 0, as JSON has no infinity


def chat_logprobs(grammars: Grammars, delta: Delta) -> dict[str, Any]:
    """The log-probabilities of a delta of a chat."""
    content = []
    for token, logprobs in zip(delta.tokens, delta.logprobs, strict=True):
        top = [_chat_token(grammars, each.token, each.logprob) for each in logprobs.top]
        found = _chat_token(grammars, token, logprobs.logprob)
        content.append(found | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(grammars: Grammars, token: int, logprob: float) -> dict[str, Any]:
    raw = grammars.bytes_of(token)
    text = raw.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(raw)}


class TextLogprobs:
    """Those of a completion, delta by delta."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars, self._offset = grammars, 0  # characters

    def of(self, delta: Delta) -> dict[str, Any]:
        """The log-probabilities of the next delta."""
        tokens = [self._text(token) for token in delta.tokens]
        offsets = []
        for text in tokens:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [max(each.logprob, _LEAST) for each in delta.logprobs],
            "top_logprobs": [self._top(each) for each in delta.logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprobs: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for each in logprobs.top:  # the likeliest of those with the same text
            top.setdefault(self._text(each.token), max(each.logprob, _LEAST))
        return top

    def _text(self, token: int) -> str:
        return self._grammars.bytes_of(token).decode(errors="replace")
