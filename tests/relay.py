"""A TCP relay that a test puts into a link, to break the link at a moment of its choice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

CHUNK_BYTES = 1 << 14
QUEUED_CHUNKS = 64  # a relay takes no more than this until it has passed some on


class _Direction:
    """What is done to the bytes of all connections that go one way."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.rate: float | None = None
        self.delay_s = 0.0
        self.forwarded = 0  # bytes, of all connections
        self.flip_at: int | None = None
        self.cut_at: int | None = None

    def flipped(self, chunk: bytes) -> bytes:
        """`chunk` as it goes out next; the bit that is to be flipped may lie in it."""
        at = None if self.flip_at is None else self.flip_at - self.forwarded
        if at is None or at >= len(chunk):
            return chunk
        self.flip_at = None
        return chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]


class Relay:
    """Listens on a port of its own, and forwards each connection to `port` of `host`.

    The side that connects is the client, the other one the server. A relay is
    faithful until a method says otherwise, and again after `restore`; each method
    has taken effect when it returns. Methods that have `to_server` and `to_client`
    act on these directions. To be used in a `with`, or closed.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._connections: set[asyncio.Task[None]] = set()
        self._refusing = False
        self.accepted = 0  # connections, refused ones not counted
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self, refuse: bool = False) -> None:
        """Break all connections; what is under way is lost. `refuse` new ones until `restore`."""
        self._call(self._cut, refuse)

    def cut_after(self, count: int, *, to_server: bool = True) -> None:
        """Break all connections once, when `count` more bytes have gone that way."""
        way = self._way(to_server)
        way.cut_at = way.forwarded + count

    def hold(self, *, to_server: bool = True, to_client: bool = True) -> None:
        """Forward nothing until `restore`, and close nothing: the link is half-open.

        What is held goes out after `restore`, as TCP would send it again.
        """
        for way in self._ways(to_server, to_client):
            self._call(way.open.clear)

    def throttle(self, rate: float, *, to_server: bool = True, to_client: bool = True) -> None:
        """Forward at most `rate` bytes per second, on each connection."""
        for way in self._ways(to_server, to_client):
            way.rate = rate

    def delay(self, seconds: float, *, to_server: bool = True, to_client: bool = True) -> None:
        """Forward everything that much later."""
        for way in self._ways(to_server, to_client):
            way.delay_s = seconds

    def flip(self, at: int = 0, *, to_server: bool = True) -> None:
        """Flip the lowest bit of the byte that goes that way after `at` others, once."""
        way = self._way(to_server)
        way.flip_at = way.forwarded + at

    def restore(self) -> None:
        """Forward faithfully again, and accept connections; what was cut stays cut."""
        self._call(self._restore)

    def forwarded(self, *, to_server: bool = True) -> int:
        """How many bytes have gone that way."""
        return self._way(to_server).forwarded

    def close(self) -> None:
        """Break all connections and end; idempotent."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- on the relay's thread ---------------------------------------------------

    async def _listen(self) -> asyncio.Server:
        self._to_server, self._to_client = _Direction(), _Direction()
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers = [writer]
        pumps: list[asyncio.Task[None]] = []
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            writers.append(far_writer)
            for ends in (
                (reader, far_writer, self._to_server),
                (far_reader, writer, self._to_client),
            ):
                queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
                pumps.append(asyncio.create_task(self._take(ends[0], queue, ends[2])))
                pumps.append(asyncio.create_task(self._pass_on(queue, ends[1], ends[2])))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):  # nobody listens; cut
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in writers:
                end.transport.abort()
            self._connections.discard(task)

    async def _take(
        self,
        reader: asyncio.StreamReader,
        queue: asyncio.Queue[tuple[float, bytes]],
        way: _Direction,
    ) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            await queue.put((self._loop.time() + way.delay_s, chunk))
        await queue.put((self._loop.time() + way.delay_s, b""))
        await asyncio.Event().wait()  # the other task ends the connection

    async def _pass_on(
        self,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        way: _Direction,
    ) -> None:
        while True:
            due, chunk = await queue.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            if way.rate is not None:
                await asyncio.sleep(len(chunk) / way.rate)
            await way.open.wait()
            if not chunk:
                return
            chunk = way.flipped(chunk)
            cut = way.cut_at is not None and way.forwarded + len(chunk) >= way.cut_at
            if cut:
                assert way.cut_at is not None
                chunk, way.cut_at = chunk[: way.cut_at - way.forwarded], None
            way.forwarded += len(chunk)  # first: whoever has received them may look
            writer.write(chunk)
            await writer.drain()
            if cut:
                self._cut(False)

    def _cut(self, refuse: bool) -> None:
        self._refusing = self._refusing or refuse
        for task in self._connections:
            task.cancel()
        self._connections = set()

    def _restore(self) -> None:
        self._refusing = False
        for way in (self._to_server, self._to_client):
            way.rate, way.delay_s, way.flip_at, way.cut_at = None, 0.0, None, None
            way.open.set()

    async def _end(self) -> None:
        self._server.close()
        ending = list(self._connections)
        self._cut(True)
        await asyncio.gather(*ending, return_exceptions=True)

    # ---- from the test's thread --------------------------------------------------

    def _way(self, to_server: bool) -> _Direction:
        return self._to_server if to_server else self._to_client

    def _ways(self, to_server: bool, to_client: bool) -> list[_Direction]:
        return [self._to_server] * to_server + [self._to_client] * to_client

    def _call(self, work: Callable[..., None], *given: bool) -> None:
        """Run `work` on the relay's thread, and wait for it."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (work(*given), done.set()))
        done.wait()
