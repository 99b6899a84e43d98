"""zmoe-chat: a chat in the terminal, with a cluster that it starts or with a running server."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zmoe import __version__
from zmoe.cli.cluster import add_cluster, cluster_spec
from zmoe.cli.common import (
    Parser,
    add_settings,
    given_settings,
    run_command,
    template_config,
    warn_unencrypted,
)
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import DEFAULT_MODEL, Batching, EngineConfig, Sampling
from zmoe.errors import InputError, ZmoeError

if TYPE_CHECKING:
    from zmoe.cluster.cluster import Cluster

PROG = "zmoe-chat"
MAX_TOKENS = 1024
_SERVER_S = 600.0  # that a server may be silent
_HELP = """\
/reset  forget the conversation
/help   show these commands
/quit   end (as Ctrl-D does); Ctrl-C stops an answer
"""

Messages = list[dict[str, str]]


class Piece(NamedTuple):
    """A piece of an answer; thoughts are no part of the conversation."""

    text: str
    is_thought: bool = False


class Partner(Protocol):
    """Who answers. `tokens` counts those of the last answer."""

    tokens: int

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """The pieces of an answer. Raises ZmoeError."""
        ...

    def stop(self) -> None:
        """Called by a signal's handler while an answer comes: let it end."""
        ...


class _Stopped(Exception):
    """The user has stopped an answer."""


class ClusterPartner:
    """A cluster of this command's own."""

    def __init__(self, cluster: Cluster, sampling: Sampling, template: dict[str, Any]) -> None:
        self._cluster, self._sampling, self._template = cluster, sampling, template
        self._stopped, self.tokens = False, 0

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """See Partner."""
        from zmoe.engine.prompt import encode_chat

        self._stopped = False
        ids = encode_chat(self._cluster.tokenizer, messages, self._template)
        with closing(self._cluster.generate(ids, self._sampling)) as generation:
            for self.tokens, token in enumerate(generation, 1):
                yield Piece(token.text)
                if self._stopped:  # within a step it would have ended the cluster
                    return

    def stop(self) -> None:
        """See Partner."""
        self._stopped = True


class ServerPartner:
    """A running server of OpenAI's API."""

    def __init__(self, url: str, key: str | None, sampling: Sampling, template: dict[str, Any]):
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self.tokens = 0
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._body: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temp,
            "top_p": sampling.top_p,
        }
        for name in ("top_k", "min_p", "repetition_penalty"):
            if value := getattr(sampling, name):
                self._body[name] = value
        for name in ("presence_penalty", "frequency_penalty", "seed"):
            if (value := getattr(sampling, name)) is not None:
                self._body[name] = value
        if template:
            self._body["chat_template_kwargs"] = template

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """See Partner."""
        body = json.dumps({**self._body, "messages": messages}).encode()
        request = urllib.request.Request(self._url, body, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_SERVER_S) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        yield from self._pieces(json.loads(line[6:]))
        except urllib.error.HTTPError as error:
            raise ZmoeError(f"{self._url}: {_reason(error)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ZmoeError(f"{self._url}: {getattr(reason, 'strerror', None) or reason}") from None

    def _pieces(self, event: dict[str, Any]) -> Iterator[Piece]:
        if "error" in event:
            raise ZmoeError(f"{self._url}: {event['error'].get('message')}")
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", []):
            delta = choice["delta"]
            yield Piece(delta.get("reasoning_content") or "", is_thought=True)
            yield Piece(delta.get("content") or "")

    def stop(self) -> None:
        """See Partner."""
        raise _Stopped


def _reason(error: urllib.error.HTTPError) -> str:
    """What an answer with an error says."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{error.code} {error.reason}"


def _parser() -> Parser:
    parser = Parser(PROG, "Chat with a model whose experts are spread over several nodes.")
    add = parser.add_argument
    add("--version", action="version", version=f"zmoe {__version__}", help="Print the version")
    add(
        "--model", help=f"Checkpoint folder, store, or Hugging Face name (default: {DEFAULT_MODEL})"
    )
    add("--server", metavar="URL", help="Chat with this running server instead of a cluster")
    add("--api-key-file", type=Path, metavar="FILE", help="File whose first key the server takes")
    add("--system-prompt", help="System message")
    add("--chat-template-config", metavar="JSON", help="More arguments of the chat template")
    to_text = parser.add_argument_group("generation").add_argument
    add_settings(to_text, Sampling)
    add_settings(to_text, EngineConfig, "prefill_chunk", "max_kv_size", "kv_bits")
    add_settings(to_text, Batching, "speculate")
    add_cluster(parser)
    return parser


def _partner(options: argparse.Namespace, stack: ExitStack) -> Partner:
    given = given_settings(options, Sampling)
    sampling = Sampling(**{"max_tokens": MAX_TOKENS, **given})
    template = template_config(options.chat_template_config) or {}
    spec = cluster_spec(options, parallel=1)
    if options.server is None:
        if options.api_key_file is not None:
            raise InputError("--api-key-file is for a running server: give --server")
        return ClusterPartner(stack.enter_context(_cluster(options, spec)), sampling, template)
    if options.model is not None or spec != ClusterSpec(engine=EngineConfig(parallel=1)):
        raise InputError("--server is a running server: flags of a cluster do not apply to it")
    key = None
    if options.api_key_file is not None:
        from zmoe.server.keys import read_api_keys

        key = read_api_keys(options.api_key_file)[0]
    return ServerPartner(options.server, key, sampling, template)


@contextmanager
def _cluster(options: argparse.Namespace, spec: ClusterSpec) -> Iterator[Cluster]:
    from zmoe.cli.progress import Bars
    from zmoe.cluster.cluster import Cluster
    from zmoe.cluster.launch import ask_for_nodes

    if spec.nodes > 1:
        warn_unencrypted(PROG, spec.address, spec.insecure)
    with ExitStack() as stack:
        with Bars([f"loading node {rank}" for rank in range(spec.nodes)]) as progress:
            cluster = Cluster(
                options.model or DEFAULT_MODEL,
                spec=spec,
                progress=progress,
                on_manual=lambda lines: progress.print(f"{PROG}: {ask_for_nodes(lines)}"),
                on_notice=lambda line: print(f"{PROG}: {line}", file=sys.stderr),
            )
            stack.enter_context(cluster)
        for notice in cluster.notices:
            print(f"{PROG}: {notice}", file=sys.stderr)
        yield cluster


@contextmanager
def _ctrl_c(partner: Partner) -> Iterator[None]:
    """Have Ctrl-C stop the partner's answer, and the second time the command."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        partner.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _chat(options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        partner = _partner(options, stack)
        with suppress(ImportError):
            import readline  # noqa: F401  # which gives input() a history
        interactive = sys.stdin.isatty()
        if interactive:
            print(_HELP, end="", flush=True)
        messages = _beginning(options)
        while True:
            try:
                said = input(">> " if interactive else "").strip()
            except EOFError:
                return
            if said == "/quit":
                return
            if said == "/reset":
                messages = _beginning(options)
            elif said == "/help":
                print(_HELP, end="", flush=True)
            elif said.startswith("/"):
                print(f"{PROG}: no such command: {said.split()[0]}", file=sys.stderr)
            elif said:
                _exchange(partner, messages, said, interactive)


def _beginning(options: argparse.Namespace) -> Messages:
    prompt = options.system_prompt
    return [{"role": "system", "content": prompt}] if prompt is not None else []


def _exchange(partner: Partner, messages: Messages, said: str, interactive: bool) -> None:
    """One question and its answer, which `messages` then hold."""
    text = ""
    begun = time.monotonic()
    messages.append({"role": "user", "content": said})
    try:
        with _ctrl_c(partner), closing(partner.answer(messages)) as answer:
            for piece in answer:
                text += "" if piece.is_thought else piece.text
                print(piece.text, end="", flush=True)
    except _Stopped:
        pass
    except InputError as error:  # such as a conversation that has become too long
        messages.pop()
        print(f"{PROG}: {error}", file=sys.stderr)
        return
    print(flush=True)
    messages.append({"role": "assistant", "content": text})
    if interactive and partner.tokens:
        rate = partner.tokens / (time.monotonic() - begun)
        print(f"[{partner.tokens} tokens, {rate:.1f} tokens/s]", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _chat(options))


if __name__ == "__main__":
    sys.exit(main())
