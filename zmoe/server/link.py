"""The front's side of the engine: its process, its state, and the requests that it serves."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import zmq
import zmq.asyncio

from zmoe.cluster.keeper import Keeper
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
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0  # between two starts


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
        outlive = spec.keep_alive > 0 and spec.nodes > 1
        self._keeper = Keeper() if outlive else None  # of workers that outlive an engine
        self._numbers = itertools.count()
        # Of the requests that the engine has; None: it has ended.
        self._queues: dict[int, asyncio.Queue[Output | None]] = {}
        self._opened = asyncio.Event()  # set while there is an engine, and when there is none more
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

        What was running goes on with the next engine. Raises InputError for what starting again
        would not help.
        """
        try:
            await self._keep_running()
        finally:
            self.state = "closed"
            self._opened.set()
            self._tell_of_the_end()
            if self._keeper is not None:
                await asyncio.to_thread(self._keeper.close)

    async def _keep_running(self) -> NoReturn:
        pause = 0.0
        while True:
            begun = time.monotonic()
            ended = await self._live()
            self.state, self.reason, self.ready = "failed", ended.error, None
            self._opened.clear()
            if ended.input_error:
                raise InputError(ended.error)
            self._tell_of_the_end()
            self._on_notice(f"the cluster has ended: {ended.error}; it is started again")
            lived = time.monotonic() - begun > _LONGEST_PAUSE_S
            pause = _FIRST_PAUSE_S if lived or not pause else min(2 * pause, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause)
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
            workers = self._keeper.lend() if self._keeper is not None else None
            # Not forked: MLX and ZeroMQ have threads.
            process = multiprocessing.get_context("spawn").Process(
                target=run_engine,
                args=(address, self._model, self.spec, workers),
                name="zmoe-engine",
            )
            process.start()
            if workers is not None:
                workers.close()
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
            await self._send(Close())
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
            self._opened.set()

    def _tell_of_the_end(self) -> None:
        """Tell the requests that the engine had."""
        for queue in self._queues.values():
            queue.put_nowait(None)
        self._queues.clear()

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

        Where an engine ends, the next one goes on behind the tokens that came. Raises EngineError
        for a request that is refused or given up, and for one that two engines in a row did not
        survive, or that none could take.
        """
        if self.state != "ready":
            raise EngineError("failed", f"the model is not ready: it is {self.state}")
        if sampling.seed is None:  # the next engine has to draw the same numbers
            sampling = replace(sampling, seed=secrets.randbits(64))
        number = next(self._numbers)
        queue: asyncio.Queue[Output | None] = asyncio.Queue()  # bounded by what may be generated
        ids = tuple(prompt)
        submit = Submit(number, ids, sampling, borders, salt, grammar, grammar_after, None)
        tokens: list[int] = []
        finish, meter, cached, lost = "", self.meters.begin(), 0, 0
        reason = "cancelled"
        try:
            await self._submit(submit, queue)
            while not finish:
                output = await queue.get()
                if output is None:
                    lost, reason = lost + 1, "failed"
                    await self._until_ready(lost)
                    await self._submit(replace(submit, generated=tuple(tokens)), queue)
                    continue
                finish = output.finish
                if output.tokens:
                    cached, lost = cached if tokens else output.cached, 0
                    tokens += output.tokens
                meter.tokens(len(output.tokens), cached)
                reason = output.kind or finish or "cancelled"
                if finish == "error":
                    raise EngineError(output.kind, output.error)
                yield replace(output, cached=cached)
        finally:
            self._queues.pop(number, None)
            meter.end(reason)
            if not finish and self.state == "ready":
                await self._send(Abort(number))

    async def _submit(self, submit: Submit, queue: asyncio.Queue[Output | None]) -> None:
        self._queues[submit.number] = queue
        await self._send(submit)

    async def _until_ready(self, lost: int) -> None:
        """Wait for the next engine, for a request with which `lost` have ended in a row.

        Raises EngineError where it is given up.
        """
        reason = f"the cluster has ended: {self.reason}"
        if lost > 1:  # it may be what ends them
            raise EngineError("failed", reason)
        try:
            async with asyncio.timeout(self.spec.batching.queue_timeout):
                await self._opened.wait()
        except TimeoutError:
            raise EngineError("failed", reason) from None
        if self.state == "closed":
            raise EngineError("failed", reason if self.reason else "the server is closing")

    async def _send(self, message: object) -> None:
        """Tell the engine, without waiting: one that has ended would be waited for in vain. If
        it has, all requests are soon told.
        """
        if self._socket is not None:
            with suppress(zmq.Again):
                await self._socket.send(FRONT.encode(message), zmq.NOBLOCK)


async def _end_of(process: multiprocessing.process.BaseProcess) -> None:
    """Wait for a process to end."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
