"""A worker's life: join, hello, mesh, load, then one step after the other."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import zmq

from zmoe import __version__
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.bus import FAREWELL_S, WorkerBus
from zmoe.cluster.hosts import is_loopback
from zmoe.cluster.messages import (
    AskMemory,
    Failed,
    Join,
    Loading,
    Memory,
    Mesh,
    Message,
    Place,
    Ready,
    Setup,
    Step,
    Stop,
    one_line,
)
from zmoe.cluster.node import Member, hello_of, hello_patience, peak_memory
from zmoe.cluster.resources import offer_of
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.exchange.local import Endpoint
from zmoe.kernels.arithmetic import arithmetic_of
from zmoe.loading import Skeleton, describe

IDLE_SLICE_S = 1.0
# After a step the next one is near: a core that sleeps meanwhile takes long to wake.
EAGER_S = 0.001
JOIN_SLICE_S = 0.2
PROGRESS_INTERVAL_S = 0.1
M = TypeVar("M", bound=Message)


class StoppedError(ZmoeError):
    """The leader ended the run, and said why."""


@dataclass(frozen=True)
class WorkerSpec:
    """How a worker finds its leader. `model`, `memory_limit` (bytes) None: as the leader says."""

    leader: str
    rank: int
    bind: str = "127.0.0.1"
    model: str | None = None
    memory_limit: int | None = None
    token: str = ""  # what the leader that started us wrote to our standard input
    join_timeout: float | None = None  # None: wait for a leader for as long as it takes


class Worker:
    """One session with one leader."""

    def __init__(
        self, spec: WorkerSpec, context: zmq.Context[Any], on_setup: Callable[[Setup], None]
    ) -> None:
        """`on_setup` is called when the session begins."""
        self.spec = spec
        self._on_setup = on_setup
        host = one_line(socket.gethostname())[:200]
        join = Join(PROTOCOL_VERSION, spec.rank, __version__, host, spec.token)
        self._bus = WorkerBus(context, spec.leader, join, Timing().grace)
        self._member: Member | None = None

    def run(self) -> None:
        """Until the leader says stop; raises what went wrong, having told the leader."""
        try:
            setup = self._join()
            self._on_setup(setup)
            self._serve(self._come_up(setup))
        except Exception as error:
            self._report(error)
            raise
        finally:
            if self._member is not None:
                self._member.close()
            self._bus.close()

    def _join(self) -> Setup:
        patience = self.spec.join_timeout
        deadline = None if patience is None else time.monotonic() + patience
        while deadline is None or time.monotonic() < deadline:
            setup = self._expect(Setup, JOIN_SLICE_S)
            if setup is not None:
                return setup
        raise ZmoeError(f"leader {self.spec.leader} did not begin a run within {patience:g} s")

    def _expect(self, kind: type[M], timeout: float) -> M | None:
        """The next message, of `kind`; None for none within `timeout` seconds."""
        message = self._bus.receive(timeout)
        if isinstance(message, kind):
            return message
        if isinstance(message, Stop):
            raise self._stopped(message.error or "too early")
        if message is not None:
            raise self._unexpected(message)
        return None

    def _stopped(self, why: str) -> StoppedError:
        return StoppedError(f"leader {self.spec.leader} stopped: {why}")

    def _unexpected(self, message: Message) -> ZmoeError:
        return ZmoeError(f"leader {self.spec.leader} sent an unexpected {type(message).__name__}")

    def _come_up(self, setup: Setup) -> Member:
        timing = Timing(
            setup.join_timeout, setup.load_timeout, setup.peer_timeout, setup.grace_timeout
        )
        self._bus.grace = timing.grace
        skeleton = Skeleton(resolve_model(self.spec.model or setup.model))
        info = describe(skeleton)
        config = EngineConfig(
            setup.prefill_chunk,
            setup.max_kv_size,
            setup.compute,
            setup.activations,
            setup.wire_dtype,
            setup.schedule,
            setup.policy,
        )
        member = Member(info, self.spec.rank, setup.nodes, self._bus.session, config, timing)
        self._member, member.skeleton = member, skeleton
        limit = setup.memory_limit if self.spec.memory_limit is None else self.spec.memory_limit
        # On loopback all nodes are on one machine, and count as equal.
        offer = offer_of(config, limit, measure=not is_loopback(self.spec.bind))
        endpoint = member.open_exchange(self.spec.bind)
        self._bus.send(hello_of(info, arithmetic_of(config), offer, endpoint))
        patience = hello_patience(setup.model, timing)  # until the others have said theirs
        place, mesh = self._expect(Place, patience), self._expect(Mesh, timing.join)
        if place is None or mesh is None:
            raise ZmoeError(f"leader {self.spec.leader} did not say who owns what and who is where")
        member.place(place.placement(setup.nodes))
        member.use_isa(mesh.isa)
        endpoints = zip(mesh.hosts, mesh.data_ports, mesh.control_ports)
        member.connect([Endpoint(*endpoint) for endpoint in endpoints], self._listen)
        seconds = member.load_follower(_Throttled(self._bus, self._listen))
        assert member.placement is not None
        self._bus.send(Ready(seconds, member.placement.digest))
        return member

    def _listen(self) -> None:
        """While busy with something else: notice a leader that is gone or says stop."""
        self._expect(Mesh, 0)
        assert self._member is not None
        self._member.service()

    def _serve(self, member: Member) -> None:
        assert member.exchange is not None
        eager_until = 0.0
        while True:
            message = self._bus.take()
            if message is None and time.monotonic() < eager_until:
                os.sched_yield()
            elif message is None:
                member.service()
                self._bus.wait(member.exchange.poll_sockets(), IDLE_SLICE_S)
            elif isinstance(message, Step):
                self._bus.step = message.step
                self._follow(member, message)
                eager_until = time.monotonic() + EAGER_S
            elif isinstance(message, AskMemory):
                self._bus.send(Memory(peak_memory()))
            elif isinstance(message, Stop):
                if message.error:
                    raise self._stopped(message.error)
                return
            else:
                raise self._unexpected(message)

    def _follow(self, member: Member, step: Step) -> None:
        try:
            member.follow(step.step, step.tokens, step.reset)
        except PeerError as lost:
            if lost.rank == 0:
                self._look_for_cause(lost)
            raise

    def _look_for_cause(self, lost: PeerError) -> None:
        """Raise what the leader said before it went, if it did."""
        message = None
        with suppress(PeerError):
            message = self._bus.take()
        if isinstance(message, Stop) and message.error:
            raise self._stopped(message.error) from lost

    def _report(self, error: Exception) -> None:
        if isinstance(error, StoppedError) or not self._bus.has_session:
            return
        words = str(error) if isinstance(error, ZmoeError) else f"internal error: {error!r}"
        failed = Failed(one_line(words), isinstance(error, InputError), None, None, self._bus.step)
        if isinstance(error, PeerError):
            reason = one_line(error.reason)
            failed = Failed(reason, False, error.rank, error.layer, error.step)
        with suppress(PeerError):  # the error itself goes on to our own standard error
            self._bus.send(failed)
            self._bus.finish(FAREWELL_S)


class _Throttled:
    """Passes load progress on to the leader, ten times a second at most, and listens to it."""

    def __init__(self, bus: WorkerBus, listen: Callable[[], None]) -> None:
        self._bus, self._listen, self._next = bus, listen, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + PROGRESS_INTERVAL_S
            self._bus.note(Loading(done, total))
            self._listen()
