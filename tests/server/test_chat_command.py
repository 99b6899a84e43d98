"""zmoe-chat, over a cluster of its own and over a running server."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.server.serving import END_S, Server

CHAT = (sys.executable, "-m", "zmoe.cli.chat")


def chat(said: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAT, *flags], input=said, capture_output=True, text=True, timeout=2 * END_S
    )


def partner(server: Server, where: str) -> Sequence[str]:
    return ("--server", server.url) if where == "server" else ("--nodes", "2")


@pytest.mark.parametrize("where", ["server", "cluster"])
def test_a_conversation(server: Server, where: str) -> None:
    flags = (*partner(server, where), "-m", "6")
    one = chat("KING\nQUEEN\n", *flags)
    assert (one.returncode, one.stderr) == (0, "")
    lines = "QUEEN\n/reset\nKING\nQUEEN\n/reset\nKING\nQUEEN\n/quit\nKING\n"
    again = chat(lines, *flags)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.endswith(2 * one.stdout)
    alone = again.stdout.removesuffix(2 * one.stdout)
    assert alone and not one.stdout.endswith(alone)  # the conversation is remembered


def test_unknown_commands_are_errors(server: Server) -> None:
    done = chat("/forget\nKING\n", "--server", server.url, "-m", "3")
    assert done.stderr == "zmoe-chat: no such command: /forget\n"
    assert done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--server", "http://127.0.0.1:9"), "127.0.0.1:9/v1/chat/completions: Connection refused"),
        (("--server", "http://127.0.0.1:9", "-n", "2"), "flags of a cluster do not apply"),
        (("--api-key-file", "/no"), "--api-key-file is for a running server"),
        (("--server", "http://127.0.0.1:9", "--api-key-file", "/no"), "/no cannot be read"),
        (("--chat-template-config", "["), "--chat-template-config is not JSON"),
    ],
)
def test_bad_calls(flags: Sequence[str], words: str) -> None:
    done = chat("KING\n", *flags)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["server", "cluster"])
def test_ctrl_c_stops_an_answer_and_not_the_chat(server: Server, where: str) -> None:
    ours, terminal = pty.openpty()
    flags = (*partner(server, where), "-m", "800", "--temp", "1", "--seed", "1")
    with subprocess.Popen(
        [*CHAT, *flags],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        os.write(ours, b"KING\n")
        seen = b""
        while b">> " not in seen:
            seen += process.stdout.read(1)
        process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        while not seen.endswith(b">> "):  # the answer has ended early
            seen += process.stdout.read(1)
        assert len(seen) < 800
        os.write(ours, b"/quit\n")
        assert process.wait(END_S) == 0
    os.close(ours)
    os.close(terminal)
