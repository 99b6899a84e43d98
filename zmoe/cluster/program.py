"""A program of the user's on several ranks: they come to share an exchange, and end together."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Protocol

from zmoe.cluster.crew import Crew, OnManual
from zmoe.cluster.launch import OnLine
from zmoe.cluster.member import Member
from zmoe.cluster.messages import Ended, Endpoints, Finished, Join, Listening, Program, Stop
from zmoe.cluster.spec import ClusterSpec, WorkerSpec
from zmoe.config import Timing
from zmoe.errors import DivergenceError, PeerError, ProgramError, ZmoeError
from zmoe.exchange.keys import KeyPair
from zmoe.exchange.local import Exchange
from zmoe.exchange.sockets import Context, Ports
from zmoe.topology.cores import set_affinity

_FRAME_BYTES, _ROW_BYTES = 4 << 20, 64 << 10
_TICK_S = 0.05
_LATE_S = 1.0  # in which MLX may still call what a program that has ended had it compute


class Rank(Protocol):
    """One rank. One thread at a time calls it, but `exchange` may be in use meanwhile."""

    exchange: Exchange

    def come_up(self) -> None:
        """Join the others, and connect `exchange` with theirs. Raises ZmoeError."""
        ...

    def watch(self) -> None:
        """While the program runs, now and then: serve peers. Raises ZmoeError for why no rank can
        go on, once the others know.
        """
        ...

    def finish(self, code: int) -> None:
        """Ours has ended with `code`: if that is 0, wait for the others. Raises what watch() does,
        and ProgramError for one of them that failed.
        """
        ...

    def abandon(self, error: str) -> None:
        """Tell the others that we end, and have them end."""
        ...


class _Finished:
    """How many collectives the ranks called whose programs have ended: no more will come."""

    def __init__(self) -> None:
        self._called: dict[int, int] = {}
        self._late_since: float | None = None

    def take(self, rank: int, collectives: int) -> bool:
        """Whether that is news."""
        known = self._called.get(rank)
        self._called[rank] = collectives
        return known != collectives

    def check(self, exchange: Exchange) -> None:
        """Raise ZmoeError if this rank's program has called one that another does not call."""
        late = [rank for rank, called in self._called.items() if called < _called(exchange)]
        now = time.monotonic()
        if not late or self._late_since is None:
            self._late_since = now if late else None
        elif now - self._late_since > _LATE_S:
            raise ZmoeError(
                f"rank {late[0]} has ended, and rank {exchange.rank} waits for it in a collective"
            )


class ProgramLeader(Crew):
    """Rank 0, which starts the others with `program`, the command line of the user's."""

    collected = (Join, Listening, Ended)

    def __init__(
        self, spec: ClusterSpec, program: Sequence[str], on_manual: OnManual, on_line: OnLine
    ) -> None:
        session = secrets.randbits(63)
        self._has_begun = self._has_ended = False
        self._finished = _Finished()

        def pass_on(rank: int, line: str) -> None:
            if self._has_begun:  # before, it is why a node has ended, which is told elsewhere
                on_line(rank, line)

        super().__init__(spec, session, on_manual, program, pass_on)
        try:
            self.exchange = _listen(
                0, spec.nodes, session, spec.address, spec.timing, spec.encrypted, spec.port_range
            )
        except BaseException as error:
            self.abandon(str(error))
            raise

    def come_up(self) -> None:
        """See Rank."""
        timing = self.spec.timing
        self.launch()
        self.collect_joins()
        self.bus.broadcast(Program(self.spec.nodes, timing, self.spec.port_range))
        told = self.collect(Listening, "has not said where it listens", timing.join)
        nodes = (self.exchange.endpoint, *(message.endpoint for message in told.values()))
        self._has_begun = True
        self.bus.broadcast(Endpoints("", nodes))
        self.exchange.tick = self.watch
        self.exchange.connect(nodes, timing.join, self.watch)
        self.exchange.calibrate()
        self._step = 1  # from now on, who ends is lost

    def _pin(self, cores: Sequence[int]) -> None:
        set_affinity(cores)

    def watch(self) -> None:
        """See Rank."""
        try:
            super().watch()
            for rank, ended in self._inbox[Ended].items():
                if ended.code:
                    raise ProgramError(rank, ended.code)
                self._tell(rank, ended.collectives)
            if self._has_ended:
                self._tell(0, _called(self.exchange))
            else:
                self._finished.check(self.exchange)
            _serve(self.exchange)
        except PeerError as lost:
            raise self.explained(lost) from lost

    def _tell(self, rank: int, collectives: int) -> None:
        if self._finished.take(rank, collectives):
            self.bus.broadcast(Finished(rank, collectives))

    def finish(self, code: int) -> None:
        """See Rank."""
        if code:
            self.abandon(f"rank 0 ended with exit code {code}")
            return
        self._has_ended = True
        self.collect(Ended, "", 0, math.inf)
        self.close()

    def abandon(self, error: str) -> None:
        """See Rank."""
        self.close(error or "rank 0 has ended")


class ProgramWorker(Member):
    """A rank from 1 up, in a process that runs the program."""

    begins = Program
    exchange: Exchange

    def __init__(self, spec: WorkerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self._finished = _Finished()

    def come_up(self) -> None:
        """See Rank."""
        try:
            self._come_up(self.join(self.spec.join_timeout))
        except Exception as error:
            self.report(error)
            raise

    def _come_up(self, begun: Program) -> None:
        timing, rank, session = begun.timing, self.spec.rank, self._bus.session
        self._bus.grace = timing.grace
        encrypted, bind = self._keys is not None, self.spec.bind
        self.exchange = _listen(rank, begun.nodes, session, bind, timing, encrypted, begun.ports)
        self._bus.send(Listening(self.exchange.endpoint))
        endpoints = self.expect(Endpoints, timing.join)
        if endpoints is None:
            raise ZmoeError(f"leader {self.spec.leader} did not say who is where")
        self.exchange.tick = self._hear
        self.exchange.connect(endpoints.nodes, timing.join, self._hear)
        self.exchange.calibrate()

    def _is_over(self) -> bool:
        """Whether the leader has said that all is over. Raises what else it says."""
        message = self._bus.take()
        while isinstance(message, Finished):
            self._finished.take(message.rank, message.collectives)
            message = self._bus.take()
        if isinstance(message, Stop) and message.error:
            raise self.stopped(message.error)
        if message is not None and not isinstance(message, Stop):
            raise self.unexpected(message)
        return message is not None

    def _hear(self) -> None:
        if self._is_over():
            raise self.stopped("too early")

    def watch(self) -> None:
        """See Rank."""
        try:
            self._hear()
            self._finished.check(self.exchange)
            _serve(self.exchange)
        except Exception as error:
            self.report(error)
            raise

    def finish(self, code: int) -> None:
        """See Rank."""
        told = -1
        while not self._is_over():
            called = _called(self.exchange)
            if called != told:
                self._bus.send(Ended(code, called))
                told = called
            _serve(self.exchange)
            self._bus.wait(self.exchange.poll_sockets(), _TICK_S)
        self._bus.close()

    def abandon(self, error: str) -> None:
        """See Rank."""
        self._bus.close()


def _called(exchange: Exchange) -> int:
    return 0 if exchange.door is None else exchange.door.called


def _serve(exchange: Exchange) -> None:
    """Raise what a collective has failed with, else answer peers."""
    if exchange.door is None:
        return
    try:
        exchange.door.check()
        exchange.service()
    except DivergenceError:  # in words of steps and layers, which a program has none of
        words = "the ranks call different collectives, or in groups of some ranks"
        raise ZmoeError(words) from None


def _listen(
    rank: int,
    nodes: int,
    session: int,
    host: str,
    timing: Timing,
    encrypted: bool,
    ports: Ports | None,
) -> Exchange:
    return Exchange(
        rank,
        nodes,
        session=session,
        max_payload_bytes=_FRAME_BYTES,
        small_payload_bytes=_ROW_BYTES,
        bind_host=host,
        deadline_s=timing.peer,
        grace_s=timing.grace,
        keys=KeyPair.fresh() if encrypted else None,
        ports=ports,
    )
