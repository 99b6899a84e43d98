"""The front's side of the engine: its process, its state, and the requests that it serves."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import zmq
import zmq.asyncio

from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Sampling
from zmoe.errors import InputError, ZmoeError
from zmoe.server.engine import run_engine
from zmoe.server.history import History
from zmoe.server.messages import (
    ENGINE,
    FRONT,
    Abort,
    Close,
    Ended,
    Loading,
    Notice,
    Output,
    Outputs,
    Ready,
    Stats,
    Submit,
)
from zmoe.server.meters import Meters

State = Literal["loading", "ready", "failed", "closed"]
_CLOSE_S = 10.0  # for the engine to end its nodes
_LONGEST_PAUSE_S = 30.0  # between two starts


class EngineError(ZmoeError):
    """The engine refused or gave up a request; `kind` is an Output's."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class EngineLink:
    """Keeps an engine running, and gives it requests. All methods belong to one event loop."""

    def __init__(
        self,
        model: str,
        spec: ClusterSpec,
        *,
        on_loading: Callable[[Loading], None],
        on_notice: Callable[[str], None],
    ) -> None:
        self._model, self.spec = model, spec
        self._on_loading, self._on_notice = on_loading, on_notice
        self._numbers = itertools.count()
        self._queues: dict[int, asyncio.Queue[Output]] = {}
        self._socket: zmq.asyncio.Socket | None = None
        self.state: State = "loading"
        self.reason = ""  # of the last failure
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.history, self.meters = History(), Meters()
        self.restarts = 0

    # ---- the process ----------------------------------------------------------------------

    async def run(self) -> None:
        """Start the engine, and again whenever it ends, until this is cancelled, which closes it.

        Raises InputError for what starting again would not help.
        """
        pause = 1.0
        while True:
            begun = time.monotonic()
            try:
                ended = await self._live()
            except asyncio.CancelledError:
                self.state = "closed"
                self._fail_all("the server is closing")
                raise
            self.state, self.reason, self.ready = "failed", ended.error, None
            self._fail_all(f"the cluster has ended: {ended.error}")
            if ended.input_error:
                raise InputError(ended.error)
            self._on_notice(f"the cluster has ended: {ended.error}; it is started again")
            pause = 1.0 if time.monotonic() - begun > _LONGEST_PAUSE_S else pause * 2
            await asyncio.sleep(min(pause, _LONGEST_PAUSE_S))
            self.state, self.stats, self.history = "loading", None, History()
            self.restarts += 1

    async def _live(self) -> Ended:
        """One engine's life. Cancelled, it ends the engine."""
        context = zmq.asyncio.Context()
        with tempfile.TemporaryDirectory(prefix="zmoe-") as folder:
            socket = self._socket = context.socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            address = f"ipc://{Path(folder) / 'engine'}"
            socket.bind(address)
            # Not forked: MLX and ZeroMQ have threads.
            process = multiprocessing.get_context("spawn").Process(
                target=run_engine, args=(address, self._model, self.spec), name="zmoe-engine"
            )
            process.start()
            ended = asyncio.ensure_future(_end_of(process))
            try:
                return await self._listen(socket, ended)
            finally:
                await self._end(socket, process, ended)
                self._socket = None
                socket.close()
                context.term()

    async def _listen(self, socket: zmq.asyncio.Socket, ended: asyncio.Future[None]) -> Ended:
        """Handle messages until the engine has ended."""
        while True:
            readable = asyncio.ensure_future(socket.poll())
            waits: set[asyncio.Future[Any]] = {readable, ended}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            while await socket.poll(0):
                message = ENGINE.decode(await socket.recv())
                if isinstance(message, Ended):
                    return message
                self._handle(message)
            if ended.done():
                readable.cancel()
                return Ended("its process ended without a word", False)

    async def _end(
        self,
        socket: zmq.asyncio.Socket,
        process: multiprocessing.process.BaseProcess,
        ended: asyncio.Future[None],
    ) -> None:
        """End the process, politely while that works."""
        if not ended.done():
            with suppress(zmq.Again):
                await _send(socket, Close())
            for harsher in (process.terminate, process.kill):
                await asyncio.wait({ended}, timeout=_CLOSE_S)
                if ended.done():
                    break
                harsher()
        await ended
        process.join()
        process.close()

    def _handle(self, message: object) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                queue = self._queues.get(output.number)
                if queue is not None:  # otherwise it was aborted
                    queue.put_nowait(output)
        elif isinstance(message, Stats):
            self.stats = message
            self.history.add(message.counts)
        elif isinstance(message, Loading):
            self._on_loading(message)
        elif isinstance(message, Notice):
            self._on_notice(message.text)
        elif isinstance(message, Ready):
            self.ready, self.state, self.reason = message, "ready", ""

    def _fail_all(self, reason: str) -> None:
        """Tell all requests that their engine has ended."""
        for number, queue in self._queues.items():
            queue.put_nowait(Output(number, (), (), "error", "failed", reason, 0))

    # ---- requests ---------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        borders: tuple[int, ...] = (),
        salt: bytes = b"",
        grammar: str = "",
        grammar_after: tuple[int, ...] = (),
    ) -> AsyncGenerator[Output]:
        """Yield what the steps give to a request; closing the iterator ends it.

        Raises EngineError for a request that is refused, given up, or lost with the engine.
        """
        if self.state != "ready" or self._socket is None:
            raise EngineError("failed", f"the model is not ready: it is {self.state}")
        number = next(self._numbers)
        queue: asyncio.Queue[Output] = asyncio.Queue()  # bounded by what may be generated
        self._queues[number] = queue
        submit = Submit(number, tuple(prompt), sampling, borders, salt, grammar, grammar_after)
        finish, meter = "", self.meters.begin()
        reason = "cancelled"
        try:
            try:
                await _send(self._socket, submit)
            except zmq.Again:
                raise EngineError("failed", "the cluster has ended") from None
            while not finish:
                output = await queue.get()
                finish = output.finish
                meter.tokens(len(output.tokens), output.cached)
                reason = output.kind or finish or reason
                if finish == "error":
                    raise EngineError(output.kind, output.error)
                yield output
        finally:
            del self._queues[number]
            meter.end(reason)
            if not finish and self._socket is not None and self.state == "ready":
                with suppress(zmq.Again):
                    await _send(self._socket, Abort(number))


async def _send(socket: zmq.asyncio.Socket, message: object) -> None:
    """Send without waiting, since an engine that has ended would be waited for in vain.

    Raises zmq.Again where there is no engine.
    """
    await socket.send(FRONT.encode(message), zmq.NOBLOCK)


async def _end_of(process: multiprocessing.process.BaseProcess) -> None:
    """Wait for a process to end."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
