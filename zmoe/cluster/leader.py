"""Rank 0's view of a cluster: bring the nodes up, run steps, bring them down."""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx

from zmoe import __version__
from zmoe.cluster.bus import LeaderBus
from zmoe.cluster.hosts import Host, HostList, check_address, check_listener, is_loopback
from zmoe.cluster.launch import (
    NodeProcess,
    RemoteOptions,
    command_by_hand,
    end_all,
    start_local,
    start_over_ssh,
)
from zmoe.cluster.member import Member, check_hello, hello_of, hello_patience, offer_in, peak_memory
from zmoe.cluster.messages import (
    AskMemory,
    Failed,
    Hello,
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
)
from zmoe.cluster.placing import PlacementRequest, Placing
from zmoe.cluster.resources import offer_of
from zmoe.compute.team import common_isa
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing, check_setting, is_int
from zmoe.errors import (
    InputError,
    LaunchError,
    MismatchError,
    PeerError,
    ZmoeError,
)
from zmoe.models import LoadedShard
from zmoe.moe.exchange import Endpoint
from zmoe.moe.sockets import Context
from zmoe.planner.given import Offer
from zmoe.topology.cores import divide_cores
from zmoe.types import ModelInfo

Progress = Callable[[int, int, int], None]  # rank, bytes done, bytes of its share
OnManual = Callable[[list[str]], None]  # commands that start the workers, in rank order
M = TypeVar("M", bound=Message)
ENDING_S = 0.5  # a process closes its sockets a moment before it can be waited for


@dataclass(frozen=True)
class ClusterSpec:
    """Which nodes, and how they come to be.

    `hosts` None: `nodes` processes on this machine. Otherwise one node per
    host, in rank order, the first being this machine. `manual`: start nothing;
    `zmoe-node` is started by hand, `nodes` - 1 times. `port` 0: any.
    `record_usage`: count which experts are selected.
    """

    nodes: int = 1
    hosts: HostList | None = None
    manual: bool = False
    bind: str | None = None
    port: int = 0
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    timing: Timing = field(default_factory=Timing)
    engine: EngineConfig = field(default_factory=EngineConfig)
    placement: PlacementRequest = field(default_factory=PlacementRequest)
    record_usage: bool = False

    def __post_init__(self) -> None:
        check_setting(is_int(self.nodes, 1, 64), "nodes", self.nodes, "a whole number from 1 to 64")
        if self.hosts is not None and len(self.hosts.hosts) != self.nodes:
            raise InputError(f"{self.nodes} nodes on {len(self.hosts.hosts)} hosts: give one each")
        check_address(self.address, "bind")
        if self.nodes > 1:
            check_listener(self.bind, self.hosts)

    @property
    def address(self) -> str:
        """Where the leader listens: loopback unless hosts or `bind` say otherwise."""
        if self.bind is not None:
            return self.bind
        return self.hosts.hosts[0].address if self.hosts is not None else "127.0.0.1"


class Leader:
    """A running cluster of at least two nodes, seen from rank 0."""

    def __init__(
        self,
        info: ModelInfo,
        model_name: str,
        spec: ClusterSpec,
        placing: Placing,
        progress: Progress,
        on_manual: OnManual,
    ) -> None:
        self.info, self.spec = info, spec
        self.member = Member(info, 0, spec.nodes, secrets.randbits(63), spec.engine, spec.timing)
        self._model_name, self._placing, self._progress = model_name, placing, progress
        self._on_manual = on_manual
        self._context = Context()
        self._processes: list[NodeProcess] = []
        self._workers = range(1, spec.nodes)
        self._step = 0
        self._inbox: defaultdict[type[Any], dict[int, Any]] = defaultdict(dict)
        self._joined: set[int] = set()
        self._load_deadline = math.inf
        self._bus = LeaderBus(self._context, spec.address, spec.port)

    # ---- coming up ----------------------------------------------------------

    def start(self) -> tuple[LoadedShard, float]:
        """Greet, connect and load, after launch().

        Returns this rank's shard, and the seconds until all had theirs. Any failure
        names the node; the caller then closes.
        """
        timing, member = self.spec.timing, self.member
        offer = offer_of(self.spec.engine, self.spec.placement.memory_limit)  # while others start
        joins = self._collect(Join, "has not joined", timing.join)
        for rank, join in joins.items():
            self._check_protocol(rank, join)
        self._broadcast(self._setup())
        own = member.open_exchange(self.spec.address)
        patience = hello_patience(self._model_name, timing)
        hellos = self._collect(Hello, "has not said hello", patience)
        mine = hello_of(member.info, offer, own)
        for rank, hello in hellos.items():
            check_hello(mine, hello, f"node {rank} ({joins[rank].host})")
        digest = self._place([offer, *map(offer_in, hellos.values())])
        endpoints = [own, *(Endpoint(h.host, h.data_port, h.control_port) for h in hellos.values())]
        hosts, data, control = zip(*((e.host, e.data_port, e.control_port) for e in endpoints))
        isa = common_isa([mine.isa, *(hello.isa for hello in hellos.values())])
        member.use_isa(isa)
        self._broadcast(Mesh(isa, list(hosts), list(data), list(control)))
        member.connect(endpoints, self._listen)
        self._load_deadline = time.monotonic() + timing.load
        shard, seconds = member.load(self._own_progress)
        ready = self._collect(Ready, "has not loaded its share", timing.load, self._load_deadline)
        for rank, message in ready.items():
            if message.placement != digest:
                raise MismatchError(
                    f"node {rank} ({joins[rank].host}) has loaded placement {message.placement}, "
                    f"the leader {digest}"
                )
        return shard, max(seconds, *(message.seconds for message in ready.values()))

    def _place(self, offers: Sequence[Offer]) -> str:
        """Choose the placement and tell every node; its digest."""
        placement = self._placing.choose(offers)
        self.member.place(placement)
        self._broadcast(Place.of(placement))
        return placement.digest

    def launch(self) -> None:
        """Start the workers, or say how to start them by hand."""
        address, patience = f"{self.spec.address}:{self._bus.port}", self.spec.timing.join
        if self.spec.manual:
            places = [self._address_of(rank) for rank in self._workers]
            lines = [command_by_hand(address, r, p) for r, p in zip(self._workers, places)]
            self._on_manual(lines)
            return
        if self.spec.hosts is not None:
            for rank in self._workers:
                host = self.spec.hosts.hosts[rank]
                self._processes.append(self._start_on(host, address, rank))
            return
        cores = divide_cores(self.spec.nodes)
        if cores is not None:
            self.member.pin(cores[0])
        for rank in self._workers:
            mine = cores[rank] if cores is not None else None
            process = start_local(address, rank, self.spec.address, mine, patience)
            self._processes.append(process)

    def _address_of(self, rank: int) -> str:
        """Where a worker that is started by hand listens, as far as we know."""
        if self.spec.hosts is not None:
            return self.spec.hosts.hosts[rank].address
        return self.spec.address if is_loopback(self.spec.address) else "ITS_ADDRESS"

    def _start_on(self, host: Host, leader: str, rank: int) -> NodeProcess:
        patience = self.spec.timing.join
        if host.is_local:
            return start_local(leader, rank, host.address, None, patience)
        return start_over_ssh(leader, rank, host, self.spec.remote, patience)

    def _setup(self) -> Setup:
        timing, engine = self.spec.timing, self.spec.engine
        return Setup(
            session=self.member.session,
            nodes=self.spec.nodes,
            model=self._model_name,
            prefill_chunk=engine.prefill_chunk,
            max_kv_size=engine.max_kv_size,
            compute=engine.compute,
            activations=engine.activations,
            wire_dtype=engine.wire_dtype,
            schedule=engine.schedule,
            policy=engine.policy,
            memory_limit=self.spec.placement.memory_limit,
            peer_timeout=timing.peer,
            grace_timeout=timing.grace,
            load_timeout=timing.load,
            join_timeout=timing.join,
        )

    def _check_protocol(self, rank: int, join: Join) -> None:
        if join.protocol != PROTOCOL_VERSION:
            raise MismatchError(
                f"node {rank} ({join.host}) speaks protocol {join.protocol} (zmoe {join.version}), "
                f"the leader {PROTOCOL_VERSION} (zmoe {__version__})"
            )

    def _own_progress(self, done: int, total: int) -> None:
        if time.monotonic() > self._load_deadline:
            patience = self.spec.timing.load
            raise LaunchError(f"node 0 has not loaded its share within {patience:g} s")
        self._progress(0, done, total)
        self._listen()

    # ---- control messages ---------------------------------------------------

    def _receive(self, timeout: float) -> bool:
        """Handle one message; what somebody will wait for goes to the inbox."""
        got = self._bus.receive(timeout)
        if got is None:
            return False
        rank, message = got
        if rank not in self._workers:
            with suppress(PeerError):  # a stranger need not listen
                error = f"rank {rank} is none of the workers 1 to {self.spec.nodes - 1} of this run"
                self._bus.send(rank, Stop(error))
        elif isinstance(message, Failed):
            if rank in self._joined:  # else it is a stranger
                raise _error_of(rank, message)
        elif isinstance(message, Loading):
            self._progress(rank, message.done, message.total)
        elif isinstance(message, (Join, Hello, Ready, Memory)):
            self._joined.add(rank)
            self._inbox[type(message)][rank] = message
        else:
            raise ZmoeError(f"node {rank} sent an unexpected {type(message).__name__}")
        return True

    def _listen(self) -> None:
        """While busy with something else: handle what workers say, notice those that ended."""
        self._check_processes()
        self.member.service()
        while self._receive(0):
            pass

    def _collect(
        self, kind: type[M], missing: str, timeout: float, deadline: float | None = None
    ) -> dict[int, M]:
        """One message of `kind` from every worker, by rank, within `timeout` seconds from now,
        or until the `deadline` (monotonic) that they gave.
        """
        found: dict[int, M] = self._inbox[kind]
        if deadline is None:
            deadline = time.monotonic() + timeout
        while len(found) < len(self._workers):
            self._listen()
            if (
                len(found) < len(self._workers)
                and not self._receive(0.05)
                and time.monotonic() > deadline
            ):
                ranks = ", ".join(str(rank) for rank in self._workers if rank not in found)
                raise LaunchError(f"node {ranks} {missing} within {timeout:g} s")
        return dict(sorted(self._inbox.pop(kind).items()))

    def _check_processes(self) -> None:
        for process in self._processes:
            if process.exit_code() is None:
                continue
            while self._receive(0):  # its own words, if it sent them, say more
                pass
            if self._step > 0:
                raise PeerError(process.rank, None, self._step, process.ending())
            raise LaunchError(f"node {process.rank} {process.ending()}")

    def _broadcast(self, message: Message) -> None:
        for rank in self._workers:
            self._bus.send(rank, message)

    # ---- running --------------------------------------------------------------

    def forward(self, tokens: Sequence[int], reset: bool, logits: bool = True) -> mx.array:
        """One step on all ranks; logits (vocabulary,). Raises PeerError, DivergenceError."""
        self._step += 1
        self._bus.step = self._step
        try:
            self._broadcast(Step(self._step, reset, list(tokens)))
            return self.member.forward(self._step, tokens, reset, logits)
        except PeerError as own:
            self._look_for_cause(own)
            raise

    def _look_for_cause(self, lost: PeerError) -> None:
        """Raise what a worker said of its own end, if that is why it is `lost`."""
        try:
            while self._receive(0):
                pass
        except PeerError as told:
            if told.rank not in (0, lost.rank):
                raise
        for process in self._processes:
            if process.rank == lost.rank and process.wait(time.monotonic() + ENDING_S):
                raise PeerError(lost.rank, lost.layer, lost.step, process.ending()) from lost

    def peak_memory(self) -> list[int]:
        """Peak resident bytes of every node, by rank."""
        self._broadcast(AskMemory())
        answers = self._collect(Memory, "did not tell its memory", self.spec.timing.join)
        return [peak_memory(), *(m.peak_memory for m in answers.values())]

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that this leader started."""
        return [process.pid for process in self._processes]

    def close(self, error: str = "") -> None:
        """End every node: politely when all is well, at once after an `error`."""
        try:
            for rank in self._workers:
                with suppress(PeerError):  # it is gone already
                    self._bus.send(rank, Stop(error))
            self.member.close()
        finally:
            end_all(self._processes, patience=0.0 if error else 2.0)
            self._bus.close()
            self._context.term()


def _error_of(rank: int, failed: Failed) -> ZmoeError:
    """What worker `rank` told, as an error of ours."""
    if failed.lost is not None:
        return PeerError(failed.lost, failed.layer, failed.step, failed.error)
    kind = InputError if failed.input_error else ZmoeError
    return kind(f"node {rank}: {failed.error}")
