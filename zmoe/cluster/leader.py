"""Rank 0's view of a cluster: bring the nodes up, run steps, bring them down."""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from zmoe import __version__
from zmoe.batch.plan import Plan
from zmoe.cluster.bus import FAREWELL_S, LeaderBus
from zmoe.cluster.hosts import Host
from zmoe.cluster.launch import (
    NodeProcess,
    command_by_hand,
    end_all,
    start_local,
    start_over_ssh,
)
from zmoe.cluster.messages import (
    AskMemory,
    Cache,
    Endpoints,
    Failed,
    Hello,
    Join,
    Loaded,
    Loading,
    LoadPrefix,
    Memory,
    Message,
    Place,
    Ready,
    Setup,
    Step,
    Stop,
    one_line,
)
from zmoe.cluster.node import Node, check_hello, hello_of, hello_patience, peak_memory
from zmoe.cluster.resolver import PlacementResolver
from zmoe.cluster.resources import resources_of
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import PROTOCOL_VERSION
from zmoe.engine.base import Floats
from zmoe.errors import InputError, LaunchError, MismatchError, PeerError, ZmoeError
from zmoe.exchange.keys import KeyPair, Pinned, is_loopback
from zmoe.exchange.sockets import Context, Endpoint
from zmoe.kernels.arithmetic import arithmetic_of
from zmoe.kernels.threads import common_isa
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import ModelInfo
from zmoe.topology.cores import divide_cores

Progress = Callable[[int, int, int], None]  # rank, bytes done, bytes of its share
OnManual = Callable[[list[str]], None]  # commands that start the workers, in rank order
M = TypeVar("M", bound=Message)
ENDING_S = 0.5  # a process closes its sockets a moment before it can be waited for


class Leader:
    """A running cluster of at least two nodes, seen from rank 0."""

    def __init__(
        self,
        info: ModelInfo,
        model_name: str,
        spec: ClusterSpec,
        resolver: PlacementResolver,
        progress: Progress,
        on_manual: OnManual,
    ) -> None:
        self.info, self.spec = info, spec
        self._model_name, self._resolver, self._progress = model_name, resolver, progress
        self._on_manual = on_manual
        self._processes: list[NodeProcess] = []
        self._workers = range(1, spec.nodes)
        self._step = 0
        # By rank, once all have said hello:
        self.resources: list[NodeResources] = []
        self.endpoints: tuple[Endpoint, ...] = ()
        self._inbox: defaultdict[type[Any], dict[int, Any]] = defaultdict(dict)
        self._load_deadline = math.inf
        # By these the workers that we start are told from strangers.
        started = () if spec.manual else self._workers
        self._tokens = {rank: secrets.token_hex(16) for rank in started}
        self._lines = dict(self._tokens)  # of the standard input of each
        keys = self._make_keys() if spec.encrypted else None
        session = secrets.randbits(63)
        self.node = Node(info, spec.engine, spec.timing, nodes=spec.nodes, session=session)
        self._context = Context()
        try:
            self._bus = LeaderBus(
                self._context,
                spec.address,
                spec.port,
                session=session,
                nodes=spec.nodes,
                grace=spec.timing.grace,
                tokens=self._tokens,
                keys=keys,
                ports=spec.port_range,
            )
        except InputError:
            self._context.term()
            raise

    def _make_keys(self) -> Pinned:
        """The bus's keys. Workers that we start get theirs, and our public one, in their lines."""
        if self.spec.manual:
            return Pinned.shared(self.spec.key_of_all())
        own, theirs = KeyPair.fresh(), {rank: KeyPair.fresh() for rank in self._workers}
        for rank, pair in theirs.items():
            self._lines[rank] += f" {pair.secret} {own.public}"
        return Pinned(own, tuple(pair.public for pair in theirs.values()))

    # ---- coming up ----------------------------------------------------------

    def start(self) -> tuple[tuple[str, ...], float]:
        """Greet the workers, connect and load; to be called after launch().

        Returns the nodes' notices, and the seconds that the slowest node took to load.
        Raises LaunchError for a node that is late or has ended, MismatchError for one that
        cannot share the run, PlacementError where the model does not fit, and what a worker
        has failed with; each names the node. The caller then closes.
        """
        timing, node = self.spec.timing, self.node
        # While the others start:
        offer = resources_of(self.spec.engine, self.spec.placement.memory_limit)
        arithmetic = arithmetic_of(self.spec.engine)
        joins = self._collect(Join, "has not joined", timing.join)
        for rank, join in joins.items():
            self._check_protocol(rank, join)
        setup = Setup(
            nodes=self.spec.nodes,
            model=self._model_name,
            engine=self.spec.engine,
            timing=timing,
            memory_limit=self.spec.placement.memory_limit,
            ports=self.spec.port_range,
        )
        self._bus.broadcast(setup)
        own = node.open_exchange(
            self.spec.address,
            self._context,
            encrypted=self.spec.encrypted,
            ports=self.spec.port_range,
        )
        assert node.exchange is not None
        node.exchange.tick = self._hear
        patience = hello_patience(self._model_name, timing)
        hellos = self._collect(Hello, "has not said hello", patience)
        mine = hello_of(node.info, arithmetic, offer, own)
        for rank, hello in hellos.items():
            name = f"node {rank} ({joins[rank].host})"
            check_hello(mine, hello, name, self.spec.engine.schedule)
        everyone = [mine, *hellos.values()]
        self.resources = [hello.resources for hello in everyone]
        placement = self._resolver.resolve(self.resources)
        node.place(placement)
        self._bus.broadcast(Place(placement))
        self.endpoints = tuple(hello.endpoint for hello in everyone)
        isa = common_isa([hello.isa for hello in everyone])
        node.use_isa(isa)
        self._bus.broadcast(Endpoints(isa, self.endpoints))
        node.connect(self.endpoints, self.watch)
        self._load_deadline = time.monotonic() + timing.load
        shard, seconds = node.load(self._own_progress)
        ready = self._collect(Ready, "has not loaded its share", timing.load, self._load_deadline)
        for rank, message in ready.items():
            if message.placement != placement.digest:
                raise MismatchError(
                    f"node {rank} ({joins[rank].host}) has loaded placement {message.placement}, "
                    f"the leader {placement.digest}"
                )
        told = [shard.notices, *(message.notices for message in ready.values())]
        return notices_of(told), max(seconds, *(message.seconds for message in ready.values()))

    def listeners(self) -> list[tuple[str, list[int]]]:
        """The address and the ports at which each node listens for the others, by rank."""
        found = [(each.host, [each.data_port, each.control_port]) for each in self.endpoints]
        found[0][1].insert(0, self._bus.port)
        return found

    def make_cache(self, blocks: int) -> None:
        """Have every node hold `blocks` blocks of keys and values."""
        self.node.make_cache(blocks)
        self._bus.broadcast(Cache(blocks))

    def load_prefix(self, path: Path, places: Sequence[int], digest: str) -> None:
        """Have every node that has caches read a prompt cache into `places`, as Node does.

        Raises InputError, naming the node, for one that cannot.
        """
        if self.spec.engine.schedule == "decentralized":
            self._bus.broadcast(LoadPrefix(str(path), digest, tuple(places)))
        self.node.load_prefix(path, places, digest)
        if self.spec.engine.schedule == "decentralized":
            self._collect(Loaded, "has not read the prompt cache", self.spec.timing.load)

    def launch(self) -> None:
        """Start the workers, or tell `on_manual` how to start them by hand.

        Raises LaunchError for a process that cannot be started.
        """
        address, patience = f"{self.spec.address}:{self._bus.port}", self.spec.timing.join
        if self.spec.manual:
            places = [self._address_of(rank) for rank in self._workers]
            how = self.spec.how_by_hand
            lines = [command_by_hand(address, r, p, how) for r, p in zip(self._workers, places)]
            self._on_manual(lines)
            return
        if self.spec.hosts is not None:
            for rank in self._workers:
                host = self.spec.hosts.hosts[rank]
                self._processes.append(self._start_on(host, address, rank))
            return
        cores = divide_cores(self.spec.nodes)
        if cores is not None:
            self.node.pin(cores[0])
        for rank in self._workers:
            mine = cores[rank] if cores is not None else None
            line = self._lines[rank]
            process = start_local(address, rank, self.spec.address, mine, patience, line)
            self._processes.append(process)

    def _address_of(self, rank: int) -> str:
        """Where a worker that is started by hand listens, as far as we know."""
        if self.spec.hosts is not None:
            return self.spec.hosts.hosts[rank].address
        return self.spec.address if is_loopback(self.spec.address) else "ITS_ADDRESS"

    def _start_on(self, host: Host, leader: str, rank: int) -> NodeProcess:
        patience, line = self.spec.timing.join, self._lines[rank]
        if host.is_local:
            return start_local(leader, rank, host.address, None, patience, line)
        return start_over_ssh(leader, rank, host, self.spec.remote, patience, line)

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
        self.watch()

    # ---- control messages ---------------------------------------------------

    def _hear(self) -> None:
        """Handle what has come; what somebody will wait for goes to the inbox."""
        for rank, message in self._bus.hear():
            if isinstance(message, Failed):
                raise _error_of(rank, message)
            if isinstance(message, Loading):
                self._progress(rank, message.done, message.total)
            elif isinstance(message, (Join, Hello, Ready, Memory, Loaded)):
                self._inbox[type(message)][rank] = message
            else:
                raise ZmoeError(f"node {rank} sent an unexpected {type(message).__name__}")

    def watch(self) -> None:
        """While busy with something else: handle what workers say, notice those that ended."""
        self._check_processes()
        self.node.service()
        self._hear()

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
            self.watch()
            if len(found) == len(self._workers):
                break
            if time.monotonic() > deadline:
                ranks = ", ".join(str(rank) for rank in self._workers if rank not in found)
                raise LaunchError(f"node {ranks} {missing} within {timeout:g} s{self._refused()}")
            self._bus.wait(0.05)
        return dict(sorted(self._inbox.pop(kind).items()))

    def _refused(self) -> str:
        """Whose keys were refused so far."""
        refused = self._context.authenticator.refused if self.spec.encrypted else []
        return "".join(f"; refused {who}" for who in refused)

    def _check_processes(self) -> None:
        for process in self._processes:
            if process.exit_code() is None:
                continue
            self._hear()  # its own words, if it sent them, say more
            if self._step > 0:
                raise PeerError(process.rank, None, self._step, process.ending())
            raise LaunchError(f"node {process.rank} {process.ending()}")

    # ---- running --------------------------------------------------------------

    def run(self, plan: Plan) -> Floats | None:
        """Run a step on all ranks; the argument and the result are those of Node.run.

        Raises PeerError, DivergenceError, and what a worker has failed with.
        """
        self._step = self._bus.step = plan.step
        try:
            self._bus.broadcast(Step(plan))
            self._hear()
            return self.node.run(plan)
        except PeerError as own:
            self._look_for_cause(own)
            raise

    def _look_for_cause(self, lost: PeerError) -> None:
        """Raise what a worker said of its own end, if that is why it is `lost`."""
        try:
            self._hear()
        except PeerError as told:
            if told.rank != lost.rank:
                raise
        for process in self._processes:
            if process.rank == lost.rank and process.wait(time.monotonic() + ENDING_S):
                raise PeerError(lost.rank, lost.layer, lost.step, process.ending()) from lost

    def peak_memory(self) -> list[int]:
        """Peak resident bytes of every node, by rank."""
        self._bus.broadcast(AskMemory())
        answers = self._collect(Memory, "did not tell its memory", self.spec.timing.join)
        return [peak_memory(), *(m.peak_memory for m in answers.values())]

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that this leader started."""
        return [process.pid for process in self._processes]

    def close(self, error: str = "") -> None:
        """End every node: politely when all is well, at once after an `error`."""
        try:
            with suppress(ZmoeError):  # who is gone already need not be told
                self._bus.broadcast(Stop(one_line(error)))
            if not error:  # a worker that sees our links go first takes us for lost
                self._bus.finish(FAREWELL_S)
        finally:
            self._end(0.0 if error else 2.0)

    def _end(self, patience: float) -> None:
        try:
            self.node.close()
        finally:
            end_all(self._processes, patience)
            self._bus.close()
            self._context.term()


def notices_of(told: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What the nodes have told, by rank: each notice once, and who told it unless all did."""
    ranks: dict[str, list[int]] = {}
    for rank, notices in enumerate(told):
        for notice in notices:
            ranks.setdefault(notice, []).append(rank)
    return tuple(
        notice if len(those) == len(told) else f"node {', '.join(map(str, those))}: {notice}"
        for notice, those in ranks.items()
    )


def _error_of(rank: int, failed: Failed) -> ZmoeError:
    """What worker `rank` told, as an error of ours."""
    if failed.lost == 0:
        return PeerError(rank, failed.layer, failed.step, f"lost its leader: {failed.error}")
    if failed.lost is not None:
        return PeerError(failed.lost, failed.layer, failed.step, failed.error)
    kind = InputError if failed.input_error else ZmoeError
    return kind(f"node {rank}: {failed.error}")
