"""What zmoe-chat remembers of a server's answers."""

from __future__ import annotations

import io
import json
import urllib.request
from typing import Any

import pytest

from zmoe.cli.chat import Messages, ServerPartner, _exchange
from zmoe.config import Sampling


def test_thoughts_are_shown_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deltas = ({"reasoning_content": "Let me see. "}, {"content": "A "}, {"content": "king."})
    lines = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]

    def answer(*_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO("".join([*lines, "data: [DONE]\n\n"]).encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    messages: Messages = []
    _exchange(ServerPartner("http://server", None, Sampling(), {}), messages, "Who?", False)
    assert capsys.readouterr().out == "Let me see. A king.\n"
    assert messages == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A king."},
    ]
