"""The life of a server: its socket, its engine, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import uvicorn

from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.spec import ClusterSpec
from zmoe.engine.prompt import open_tokenizer
from zmoe.errors import InputError
from zmoe.exchange.keys import is_loopback
from zmoe.server.app import make_app
from zmoe.server.connections import BoundedProtocol
from zmoe.server.front import Front, ServeConfig
from zmoe.server.keys import read_api_keys
from zmoe.server.link import EngineLink
from zmoe.server.metrics import CountRequests
from zmoe.server.security import Guard

_BACKLOG = 512
_KEEP_ALIVE_S = 30
_MOST_HEAD_BYTES = 32 << 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watcher(Protocol):
    """Who is told how the server comes up."""

    def loading(self, rank: int, done: int, total: int) -> None:
        """So many bytes of a node's share have been read."""

    def notice(self, line: str) -> None:
        """Something that whoever started the server should know."""

    def ready(self, address: str) -> None:
        """The server answers requests at `address`, a URL."""


def serve(model: str, spec: ClusterSpec, config: ServeConfig, watcher: Watcher) -> None:
    """Serve `model` until SIGTERM or Ctrl-C. Raises InputError and its kin."""
    keys = read_api_keys(config.api_key_file) if config.api_key_file is not None else ()
    template = _read(config.chat_template) if config.chat_template is not None else None
    _check_certificate(config)
    if not keys and not is_loopback(config.host):
        watcher.notice(
            f"warning: whoever reaches {config.host} may use this server: --api-key-file lets "
            "only those in who have a key"
        )
    listener = _listen(config)
    try:
        tokenizer = open_tokenizer(Path(resolve_model(model)), template)
        link = EngineLink(
            model,
            spec,
            on_loading=lambda m: watcher.loading(m.rank, m.done, m.total),
            on_notice=watcher.notice,
        )
        name = config.served_model_name or model
        front = Front(config, name, link, tokenizer, created=int(time.time()))
        asyncio.run(_serve(front, listener, keys, watcher))
    finally:
        listener.close()


def _listen(config: ServeConfig) -> socket.socket:
    """The socket of the server. Raises InputError where that cannot be."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    address = (config.host, config.http_port)
    try:
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"cannot listen on {address[0]}:{address[1]}: {reason}") from None
    # Connections inherit it. asyncio sets it on sockets of a named protocol only, and without it
    # what follows an answer's head waits some 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _check_certificate(config: ServeConfig) -> None:
    """Raise InputError for files that TLS cannot use."""
    if config.ssl_certfile is None:
        if config.ssl_keyfile is not None:
            raise InputError("--ssl-keyfile is for a certificate: give --ssl-certfile")
        return
    files = [file for file in (config.ssl_certfile, config.ssl_keyfile) if file is not None]
    for file in files:
        _read(file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*map(str, files))
    except ssl.SSLError as error:
        names = " and ".join(map(str, files))
        raise InputError(f"{names} cannot be used for TLS: {error.reason or error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}") from None


class _Server(uvicorn.Server):
    """A server that ends when it is told to: at once when it is told again."""

    def __init__(self, config: uvicorn.Config, front: Front) -> None:
        super().__init__(config)
        self._front = front

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have SIGTERM and Ctrl-C call end()."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def end(self) -> None:
        """Refuse new requests, and finish those that run; the second time, drop these."""
        self.force_exit = self.should_exit
        self.should_exit = self._front.is_draining = True


async def _serve(
    front: Front, listener: socket.socket, keys: Sequence[str], watcher: Watcher
) -> None:
    config = front.config
    app = make_app(front)
    guarded = Guard(app, keys, config.host, config.timeout)
    server = _Server(
        uvicorn.Config(
            CountRequests(guarded, front.link.meters, app.routes),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(config.drain),
            h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        ),
        front,
    )
    engine = asyncio.ensure_future(front.link.run())
    engine.add_done_callback(lambda _: server.end())
    telling = asyncio.ensure_future(_tell_when_ready(front, watcher))
    try:
        await server.serve(sockets=[listener])
    finally:
        telling.cancel()
        engine.cancel()
        with suppress(asyncio.CancelledError):
            await engine


async def _tell_when_ready(front: Front, watcher: Watcher) -> None:
    while front.link.state != "ready":
        await asyncio.sleep(0.05)
    config = front.config
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    watcher.ready(f"{scheme}://{host}:{config.http_port}")
