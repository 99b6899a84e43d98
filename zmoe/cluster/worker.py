"""A worker's life: join, hello, mesh, load, then one step after the other."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import zmq

from zmoe import __version__
from zmoe.cluster.bus import WorkerBus
from zmoe.cluster.member import Member, hello_of, peak_memory
from zmoe.cluster.messages import (
    AskMemory,
    Failed,
    Hello,
    Join,
    Loading,
    Memory,
    Mesh,
    Message,
    Ready,
    Setup,
    Step,
    Stop,
)
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.models import inspect_model
from zmoe.models.hub import resolve_model
from zmoe.moe.exchange import Endpoint

IDLE_SLICE_S = 1.0
JOIN_SLICE_S = 0.2
PROGRESS_INTERVAL_S = 0.1
M = TypeVar("M", bound=Message)


class StoppedError(ZmoeError):
    """The leader ended the run before it began, and said why."""


@dataclass(frozen=True)
class WorkerSpec:
    """How a worker finds its leader. `model` None: the one that the leader names."""

    leader: str
    rank: int
    bind: str = "127.0.0.1"
    model: str | None = None
    join_timeout: float | None = None  # None: wait for a leader for as long as it takes


class Worker:
    """One session with one leader."""

    def __init__(self, spec: WorkerSpec, context: zmq.Context[Any]) -> None:
        self.spec = spec
        self._bus = WorkerBus(context, spec.leader, spec.rank, Timing().grace)
        self._member: Member | None = None

    def run(self) -> None:
        """Until the leader says stop; raises what went wrong, having told the leader."""
        try:
            member = self._come_up(self._join())
            if member is not None:
                self._serve(member)
        except Exception as error:
            self._report(error)
            raise
        finally:
            if self._member is not None:
                self._member.close()
            self._bus.close()

    def _join(self) -> Setup:
        here = Join(
            PROTOCOL_VERSION, self.spec.rank, __version__, socket.gethostname(), os.getpid()
        )
        patience = self.spec.join_timeout
        deadline = None if patience is None else time.monotonic() + patience
        joined = 0
        while deadline is None or time.monotonic() < deadline:
            if self._bus.handshakes > joined:  # a leader may end before it reads our first
                joined = self._bus.handshakes
                self._bus.send(here)
            setup = self._expect(Setup, JOIN_SLICE_S)
            if setup is not None:
                return setup
        raise ZmoeError(f"leader {self.spec.leader} did not begin a run within {patience:g} s")

    def _expect(self, kind: type[M], timeout: float) -> M | None:
        """The next message, of `kind`; None for a Stop, or for none within `timeout` seconds."""
        message = self._bus.receive(timeout)
        if isinstance(message, kind):
            return message
        if isinstance(message, Stop):
            if message.error:
                raise StoppedError(f"leader {self.spec.leader} stopped: {message.error}")
            return None
        if message is not None:
            raise self._unexpected(message)
        return None

    def _unexpected(self, message: Message) -> ZmoeError:
        return ZmoeError(f"leader {self.spec.leader} sent an unexpected {type(message).__name__}")

    def _come_up(self, setup: Setup) -> Member | None:
        timing = Timing(
            setup.join_timeout, setup.load_timeout, setup.peer_timeout, setup.grace_timeout
        )
        info = inspect_model(resolve_model(self.spec.model or setup.model))
        config = EngineConfig(setup.prefill_chunk, setup.max_kv_size)
        member = Member(info, self.spec.rank, setup.nodes, setup.session, config, timing)
        self._member = member
        hello: Hello = hello_of(info, member.placement, member.open_exchange(self.spec.bind))
        self._bus.send(hello)
        mesh = self._expect(Mesh, timing.join)
        if mesh is None:  # told to stop, or forgotten
            return None
        member.connect([_endpoint(entry) for entry in mesh.endpoints])
        shard, seconds = member.load(_Throttled(self._bus))
        self._bus.send(
            Ready(shard.bytes_read, shard.share_bytes, seconds, peak_memory(), list(shard.notices))
        )
        return member

    def _serve(self, member: Member) -> None:
        assert member.exchange is not None
        while True:
            message = self._bus.take()
            if message is None:
                member.service()
                self._bus.wait(member.exchange.poll_sockets(), IDLE_SLICE_S)
            elif isinstance(message, Step):
                self._bus.step = message.step
                member.forward(message.step, message.tokens, message.reset)
            elif isinstance(message, AskMemory):
                self._bus.send(Memory(peak_memory()))
            elif isinstance(message, Stop):
                return
            else:
                raise self._unexpected(message)

    def _report(self, error: Exception) -> None:
        lost_leader = isinstance(error, PeerError) and error.rank == 0
        if not lost_leader and not isinstance(error, StoppedError):
            words = str(error) if isinstance(error, ZmoeError) else f"internal error: {error!r}"
            with suppress(PeerError):  # the error itself goes on to our own standard error
                self._bus.send(Failed(words, isinstance(error, InputError)))


class _Throttled:
    """Passes load progress on to the leader, ten times a second at most."""

    def __init__(self, bus: WorkerBus) -> None:
        self._bus, self._next = bus, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + PROGRESS_INTERVAL_S
            self._bus.send(Loading(done, total))


def _endpoint(entry: list[Any]) -> Endpoint:
    host, data_port, control_port = entry
    return Endpoint(str(host), int(data_port), int(control_port))
