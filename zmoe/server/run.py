"""The life of a server: its socket, its engine, its end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.spec import ClusterSpec
from zmoe.engine.prompt import open_tokenizer
from zmoe.errors import InputError
from zmoe.server.app import make_app
from zmoe.server.front import Front, ServeConfig
from zmoe.server.link import EngineLink

_BACKLOG = 512


class Watcher:
    """Who is told how the server comes up: does nothing, unless overridden."""

    def loading(self, rank: int, done: int, total: int) -> None:
        """So many bytes of a node's share have been read."""

    def notice(self, line: str) -> None:
        """Something that whoever started the server should know."""

    def ready(self, address: str) -> None:
        """The server answers requests at `address`, a URL."""


def serve(model: str, spec: ClusterSpec, config: ServeConfig, watcher: Watcher) -> None:
    """Serve `model` until SIGTERM or Ctrl-C. Raises InputError and its kin."""
    listener = _listen(config)
    try:
        folder = resolve_model(model)
        tokenizer = open_tokenizer(Path(folder))
        if config.chat_template is not None:
            tokenizer.chat_template = _read(config.chat_template, "--chat-template")
            tokenizer.has_chat_template = True
        link = EngineLink(
            model,
            spec,
            on_loading=lambda m: watcher.loading(m.rank, m.done, m.total),
            on_notice=watcher.notice,
        )
        name = config.served_model_name or model
        front = Front(config, name, link, tokenizer, created=int(time.time()))
        asyncio.run(_serve(front, listener, watcher))
    finally:
        listener.close()


def _listen(config: ServeConfig) -> socket.socket:
    """The socket of the server. Raises InputError where that cannot be."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.http_port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {config.host}:{config.http_port}: {error.strerror or error}"
        ) from None
    return listener


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{flag} {path} cannot be read: {reason}") from None


async def _serve(front: Front, listener: socket.socket, watcher: Watcher) -> None:
    config = front.config
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(front),
            log_level="error",
            access_log=False,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            timeout_graceful_shutdown=int(config.drain),
        )
    )
    engine = asyncio.ensure_future(front.link.run())
    engine.add_done_callback(lambda _: _stop(server))
    scheme = "https" if config.ssl_certfile else "http"
    host, port = listener.getsockname()[:2]
    telling = asyncio.ensure_future(
        _when_ready(front.link, lambda: watcher.ready(f"{scheme}://{host}:{port}"))
    )
    try:
        await server.serve(sockets=[listener])
    finally:
        front.is_draining = True
        telling.cancel()
        if not engine.done():
            engine.cancel()
        with suppress(asyncio.CancelledError):
            await engine


def _stop(server: uvicorn.Server) -> None:
    server.should_exit = True


async def _when_ready(link: EngineLink, tell: Callable[[], None]) -> None:
    while link.state != "ready":
        await asyncio.sleep(0.05)
    tell()
