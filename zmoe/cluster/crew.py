"""A leader's workers: started, joined, listened to, ended; whatever they then compute."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from zmoe import __version__
from zmoe.cluster.bus import FAREWELL_S
from zmoe.cluster.keeper import Access, Lender, Process
from zmoe.cluster.launch import (
    NodeProcess,
    OnLine,
    command_by_hand,
    end_all,
    start_local,
    start_over_ssh,
)
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.messages import Failed, Join, Message, Stop, one_line
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import PROTOCOL_VERSION
from zmoe.errors import AbsentError, InputError, LaunchError, MismatchError, PeerError, ZmoeError
from zmoe.exchange.keys import KeyPair, Pinned, is_loopback
from zmoe.exchange.sockets import Context
from zmoe.topology.cores import divide_cores

OnManual = Callable[[list[str]], None]  # commands that start the workers, in rank order
M = TypeVar("M", bound=Message)
_LEFT_S = 5.0  # for a worker that the leader before has left to notice that, and join us
ENDING_S = 0.5  # a process closes its sockets a moment before it can be waited for


class Crew:
    """Ranks 1 and up of `session`, whose leader listens from here on.

    `program`: the command line of a program of the user's that all ranks run, of which
    `on_line(rank, line)` is given what workers print; empty: they are zmoe-nodes. `lender`: of
    workers that outlive this process; without, those that it starts end with it.
    """

    collected: ClassVar[tuple[type[Any], ...]] = (Join,)  # messages that collect() waits for

    def __init__(
        self,
        spec: ClusterSpec,
        session: int,
        on_manual: OnManual,
        program: Sequence[str] = (),
        on_line: OnLine | None = None,
        lender: Lender | None = None,
    ) -> None:
        self.spec, self._on_manual = spec, on_manual
        self._program, self._on_line, self._lender = program, on_line, lender
        self.processes: list[Process] = []
        self._cores: Sequence[Sequence[int]] | None = None  # of each rank, once they are divided
        self._ranks = range(1, spec.nodes)  # of the workers
        self.workers = list(self._ranks)  # those that are not lost
        self._step = 0
        self._inbox: defaultdict[type[Any], dict[int, Any]] = defaultdict(dict)
        before = lender.access if lender is not None else None
        self._access = before or new_access(spec)
        self._context = Context()
        try:
            self.bus = self._listen(session)
        except InputError:
            self._context.term()
            raise
        if lender is not None:
            lender.remember(replace(self._access, port=self.bus.port))

    def _listen(self, session: int) -> LeaderBus:
        """At the port of the leader before us, if another process has not taken it meanwhile."""
        spec, access = self.spec, self._access
        addresses = None  # of all nodes, where workers have nothing else to show
        if spec.manual and access.keys is None and spec.hosts is not None:
            addresses = {spec.address, *(host.address for host in spec.hosts.hosts)}
        listen = partial(
            LeaderBus,
            self._context,
            spec.address,
            session=session,
            nodes=spec.nodes,
            grace=spec.timing.grace,
            tokens=access.tokens,
            keys=access.keys,
            addresses=addresses,
            ports=spec.port_range,
        )
        if access.port != spec.port:
            with suppress(InputError):
                return listen(access.port)
        return listen(spec.port)

    # ---- coming up ----------------------------------------------------------

    def launch(self) -> None:
        """Start the workers, or tell `on_manual` how to start them by hand.

        Raises LaunchError for a process that cannot be started.
        """
        if self.spec.manual:
            leader = f"{self.spec.address}:{self.bus.port}"
            how = self.spec.how_by_hand
            lines = [
                command_by_hand(leader, rank, self._address_of(rank), how, self._program)
                for rank in self._ranks
            ]
            self._on_manual(lines)
            return
        if self.spec.hosts is None:
            self._cores = divide_cores(self.spec.nodes)
        if self._cores is not None:
            self._pin(self._cores[0])
        for rank in self._ranks:
            self.start_worker(rank)

    def start_worker(self, rank: int) -> None:
        """Start the process of a worker. Raises LaunchError."""
        leader = f"{self.spec.address}:{self.bus.port}"
        hosts = self.spec.hosts.hosts if self.spec.hosts is not None else None
        line = self._access.lines[rank]
        start = self._lender.start if self._lender is not None else NodeProcess
        told = (self.spec.timing.join, line, self._program, self._on_line, start)
        if hosts is None:
            cores = self._cores[rank] if self._cores is not None else None
            process = start_local(leader, rank, self.spec.address, cores, *told)
        elif hosts[rank].is_local:
            process = start_local(leader, rank, hosts[rank].address, None, *told)
        else:
            process = start_over_ssh(leader, rank, hosts[rank], self.spec.remote, *told)
        self.processes.append(process)

    def _pin(self, cores: Sequence[int]) -> None:
        """Keep this process on `cores`, its part of the machine's."""

    def _address_of(self, rank: int) -> str:
        """Where a worker that is started by hand listens, as far as we know."""
        if self.spec.hosts is not None:
            return self.spec.hosts.hosts[rank].address
        return self.spec.address if is_loopback(self.spec.address) else "ITS_ADDRESS"

    def collect_joins(self) -> dict[int, Join]:
        """The Join of every worker. Raises LaunchError, and MismatchError for another protocol."""
        self._replace_missing()
        joins = self.collect(Join, "has not joined", self.spec.timing.join)
        for join in joins.values():
            check_protocol(join)
        return joins

    def _replace_missing(self) -> None:
        """Start workers anew that the leader before has left, but that have ended or do not
        join.
        """
        until = time.monotonic() + _LEFT_S
        left = {each.rank: each for each in self.processes if each.is_left}
        while left:
            self.hear()
            is_late = time.monotonic() > until
            for rank, process in list(left.items()):
                if rank in self._inbox[Join]:
                    del left[rank]
                elif is_late or process.exit_code() is not None:
                    self.end_process(rank)
                    self.start_worker(rank)
                    del left[rank]
            self.bus.wait(0.05)

    # ---- control messages ---------------------------------------------------

    def hear(self) -> None:
        """Handle what has come; what somebody will wait for goes to the inbox."""
        for rank, message in self.bus.hear():
            if isinstance(message, Failed):
                raise error_of(rank, message)
            self.take(rank, message)

    def take(self, rank: int, message: Message) -> None:
        """Keep what somebody will wait for. Raises ZmoeError for anything else."""
        if not isinstance(message, self.collected):
            raise ZmoeError(f"node {rank} sent an unexpected {type(message).__name__}")
        self._inbox[type(message)][rank] = message

    def watch(self) -> None:
        """While busy with something else: handle what workers say, notice those that ended."""
        self.check_processes()
        self.hear()

    def collect(
        self, kind: type[M], missing: str, timeout: float, deadline: float | None = None
    ) -> dict[int, M]:
        """One message of `kind` from every worker, by rank, within `timeout` seconds from now,
        or until the `deadline` (monotonic) that they gave.
        """
        found: dict[int, M] = self._inbox[kind]
        if deadline is None:
            deadline = time.monotonic() + timeout
        while any(rank not in found for rank in self.workers):
            self.watch()
            late = [rank for rank in self.workers if rank not in found]
            if not late:
                break
            if time.monotonic() > deadline:
                ranks = ", ".join(map(str, late))
                raise LaunchError(f"node {ranks} {missing} within {timeout:g} s{self._refused()}")
            self.bus.wait(0.05)
        return dict(sorted(self._inbox.pop(kind).items()))

    def _refused(self) -> str:
        """Who was refused so far."""
        return "".join(f"; refused {who}" for who in self._context.authenticator.refused)

    def check_processes(self) -> None:
        """Raise PeerError, or while coming up LaunchError, for a process that has ended."""
        for process in self.processes:
            if process.exit_code() is None:
                continue
            self.hear()  # its own words, if it sent them, say more
            if self._step > 0:
                raise PeerError(process.rank, None, self._step, process.ending())
            raise AbsentError((process.rank,), f"node {process.rank} {process.ending()}")

    def end_process(self, rank: int) -> bool:
        """Kill the process of a worker that is lost; whether this leader had started it."""
        ours = [process for process in self.processes if process.rank == rank]
        self.processes = [process for process in self.processes if process.rank != rank]
        for process in ours:
            process.kill()
        end_all(ours)
        return bool(ours)

    def explained(self, lost: PeerError) -> PeerError:
        """The same with what is known of the process, if that has ended."""
        for process in self.processes:
            if process.rank == lost.rank and process.wait(time.monotonic() + ENDING_S):
                return PeerError(lost.rank, lost.layer, lost.step, process.ending())
        return lost

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that this leader started."""
        return [process.pid for process in sorted(self.processes, key=lambda each: each.rank)]

    # ---- ending ---------------------------------------------------------------

    def close(self, error: str = "") -> None:
        """End every node: politely when all is well, at once after an `error`."""
        try:
            with suppress(ZmoeError):  # who is gone already need not be told
                self.bus.broadcast(Stop(one_line(error)))
            if not error:  # a worker that sees our links go first takes us for lost
                self.bus.finish(FAREWELL_S)
        finally:
            self._end(0.0 if error else 2.0)

    def _end(self, patience: float) -> None:
        try:
            self._close_own()
        finally:
            end_all(self.processes, patience)
            self.bus.close()
            self._context.term()

    def _close_own(self) -> None:
        """Close what rank 0 itself has."""


def new_access(spec: ClusterSpec) -> Access:
    """New secrets for the workers that a leader starts, by which they are told from strangers.

    Where links are encrypted they get their keys, and its public one, in their lines. Those that
    the user starts have the user's key, on this machine without having to ask for one.
    """
    if spec.manual:
        return Access(spec.port, {}, _keys_by_hand(spec), {})
    started = range(1, spec.nodes)
    tokens = {rank: secrets.token_hex(16) for rank in started}
    if not spec.encrypted:
        return Access(spec.port, tokens, None, tokens)
    own, theirs = KeyPair.fresh(), {rank: KeyPair.fresh() for rank in started}
    lines = {rank: f"{tokens[rank]} {pair.secret} {own.public}" for rank, pair in theirs.items()}
    return Access(spec.port, tokens, Pinned(own, tuple(p.public for p in theirs.values())), lines)


def _keys_by_hand(spec: ClusterSpec) -> Pinned | None:
    if spec.encrypted:
        return Pinned.shared(spec.key_of_all())
    return Pinned.of_user() if is_loopback(spec.address) else None


def check_protocol(join: Join) -> None:
    """Raise MismatchError, naming both versions, for a worker of another protocol."""
    if join.protocol != PROTOCOL_VERSION:
        raise MismatchError(
            f"node {join.rank} ({join.host}) speaks protocol {join.protocol} "
            f"(zmoe {join.version}), the leader {PROTOCOL_VERSION} (zmoe {__version__})"
        )


def error_of(rank: int, failed: Failed) -> ZmoeError:
    """What worker `rank` told, as an error of ours."""
    if failed.lost == 0:
        return PeerError(rank, failed.layer, failed.step, f"lost its leader: {failed.error}")
    if failed.lost is not None:
        return PeerError(failed.lost, failed.layer, failed.step, failed.error)
    kind = InputError if failed.input_error else ZmoeError
    return kind(f"node {rank}: {failed.error}")
