"""Rank 0's view of a cluster: bring the nodes up, run steps, bring them down."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from zmoe.batch.plan import Plan
from zmoe.cluster.crew import Crew
from zmoe.cluster.crew import OnManual as OnManual
from zmoe.cluster.hello import check_hello, hello_of, hello_patience
from zmoe.cluster.keeper import Lender
from zmoe.cluster.messages import (
    AskMemory,
    AskTimes,
    Cache,
    Endpoints,
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
    Times,
)
from zmoe.cluster.node import Node
from zmoe.cluster.resolver import PlacementResolver
from zmoe.cluster.resources import peak_memory, resources_of
from zmoe.cluster.returning import Returns, Terms
from zmoe.cluster.spec import ClusterSpec
from zmoe.cluster.stock import stock_of
from zmoe.cluster.stragglers import ROUND_S, Stragglers
from zmoe.cluster.survival import Survival
from zmoe.engine.base import Floats
from zmoe.engine.draw import Draw, Drawn
from zmoe.errors import AbsentError, LaunchError, MismatchError, PeerError, PlacementError
from zmoe.exchange.sockets import Endpoint
from zmoe.kernels.arithmetic import arithmetic_of
from zmoe.kernels.threads import common_isa, is_native
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import ModelInfo
from zmoe.recovery.messages import Suspect
from zmoe.recovery.view import ClusterView, Slices, first_view

Progress = Callable[[int, int, int], None]  # rank, bytes done, bytes of its share
OnNotice = Callable[[str], None]  # a line for the user, while the run goes on
T = TypeVar("T")


class Leader(Crew):
    """A running cluster of at least two nodes, seen from rank 0."""

    collected = (Join, Hello, Ready, Memory, Loaded)

    def __init__(
        self,
        info: ModelInfo,
        model_name: str,
        spec: ClusterSpec,
        resolver: PlacementResolver,
        progress: Progress,
        on_manual: OnManual,
        on_notice: OnNotice,
        lender: Lender | None = None,
    ) -> None:
        session = _new_session()
        self.node = Node(info, spec.engine, spec.timing, nodes=spec.nodes, session=session)
        super().__init__(spec, session, on_manual, lender=lender)
        self.info = info
        self._model_name, self._resolver, self._progress = model_name, resolver, progress
        # By rank, once all have said hello:
        self.resources: list[NodeResources] = []
        self.endpoints: tuple[Endpoint, ...] = ()
        self._load_deadline = math.inf
        self._on_notice = on_notice
        self._terms: Terms | None = None  # once all have loaded
        self._survival: Survival | None = None  # from survive() on, where the run can go on
        # Of workers that are lost between the time when all are connected and the first step:
        self._lost_early: dict[int, AbsentError | PeerError] | None = None
        self._suspected_early: list[tuple[int, Suspect]] = []  # who said so
        self.stragglers = Stragglers()
        self._round, self._next_round = 0, 0.0
        self._times: dict[int, tuple[int, float]] = {}  # of this round, by rank

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
        joins, setup = self.collect_joins(), self._setup()
        self.bus.broadcast(setup)
        mine = hello_of(node.info, arithmetic, offer, self._open_exchange())
        everyone = [mine, *self._hellos(mine, joins)]
        self.resources = [hello.resources for hello in everyone]
        placement = self._resolver.resolve(self.resources)
        node.place(placement)
        self.bus.broadcast(Place(placement))
        self.endpoints = tuple(hello.endpoint for hello in everyone)
        isa = common_isa([hello.isa for hello in everyone])
        node.use_isa(isa)
        self.bus.broadcast(Endpoints(isa, self.endpoints))
        node.connect(self.endpoints, self.watch)
        self._load_deadline = time.monotonic() + timing.load
        self._lost_early = {}
        shard, seconds = node.load(self._own_progress)
        ready = self.collect(Ready, "has not loaded its share", timing.load, self._load_deadline)
        if not node.can_go_on:
            lost, self._lost_early = self._lost_early, None
            for error in lost.values():
                raise error
        for rank, message in ready.items():
            if message.placement != placement.digest:
                raise MismatchError(
                    f"node {rank} ({joins[rank].host}) has loaded placement {message.placement}, "
                    f"the leader {placement.digest}"
                )
        assert node.exchange is not None
        figures = node.exchange.choice.figures
        self._terms = Terms(setup, placement, isa, figures, mine, node.divides)
        told = {0: shard.notices, **{rank: message.notices for rank, message in ready.items()}}
        return notices_of(told), max([seconds, *(message.seconds for message in ready.values())])

    def _setup(self) -> Setup:
        """What every worker is told of the run."""
        return Setup(
            nodes=self.spec.nodes,
            model=self._model_name,
            engine=self.spec.engine,
            timing=self.spec.timing,
            memory_limit=self.spec.placement.memory_limit,
            ports=self.spec.port_range,
            keep_alive=self.spec.keep_alive,
        )

    def _open_exchange(self) -> Endpoint:
        """Where the leader's own node listens for the others."""
        endpoint = self.node.open_exchange(
            self.spec.address,
            self._context,
            encrypted=self.spec.encrypted,
            ports=self.spec.port_range,
        )
        assert self.node.exchange is not None
        self.node.exchange.tick = self._listen_in_step
        return endpoint

    def _hellos(self, mine: Hello, joins: Mapping[int, Join]) -> list[Hello]:
        """The workers', by rank. Raises MismatchError for one that cannot share this run."""
        patience = hello_patience(self._model_name, self.spec.timing)
        hellos = self.collect(Hello, "has not said hello", patience)
        for rank, hello in hellos.items():
            name = f"node {rank} ({joins[rank].host})"
            check_hello(mine, hello, name, self.spec.engine.schedule)
        return list(hellos.values())

    def listeners(self) -> list[tuple[str, list[int]]]:
        """The address and the ports at which each node listens for the others, by rank."""
        found = [(each.host, [each.data_port, each.control_port]) for each in self.endpoints]
        found[0][1].insert(0, self.bus.port)
        return found

    def make_cache(self, blocks: int) -> None:
        """Have every node hold `blocks` blocks of keys and values."""
        self.node.make_cache(blocks)
        self.bus.broadcast(Cache(blocks))

    def survive(self, blocks: int) -> None:
        """Go on without nodes that are lost from here on, where that can be. `blocks`: of every
        node's caches, 0 where these are not paged.
        """
        node, mapped = self.node, is_native(self.spec.engine)
        lost, self._lost_early = self._lost_early or {}, None
        if not node.can_go_on:
            return
        assert node.placement is not None and self._terms is not None
        stock = stock_of(self.info, node.placement, self.resources, mapped)
        view = first_view(self.spec.nodes, node.session)
        returns = Returns(self._terms, blocks)
        divide = self._divide if node.divides else None
        self._survival = Survival(self, view, stock, returns, _new_session, self._on_notice, divide)
        for rank, error in lost.items():
            self._survival.lose(rank, str(error).removeprefix(f"node {rank} "))
        for rank, message in self._suspected_early:
            self._survival.suspect(rank, message)

    def _divide(self, nodes: Sequence[int]) -> Slices:
        """How these nodes divide the weights. Raises PlacementError where they have no room."""
        try:
            placement = self._resolver.divide([self.resources[rank] for rank in nodes])
        except PlacementError as error:
            raise PlacementError(f"the nodes that are left cannot go on: {error}") from None
        return placement.slices or ((0, self.info.moe_intermediate_size),)

    def load_prefix(self, path: Path, places: Sequence[int], digest: str) -> None:
        """Have every node that has caches read a prompt cache into `places`, as Node does.

        Raises InputError, naming the node, for one that cannot.
        """
        if self.spec.engine.schedule == "decentralized":
            self._say(LoadPrefix(str(path), digest, tuple(places)))
        self.node.load_prefix(path, places, digest)
        if self.spec.engine.schedule == "decentralized":
            wait = partial(self.collect, Loaded, "has not read the prompt cache")
            self._undisturbed(partial(wait, self.spec.timing.load))

    def _pin(self, cores: Sequence[int]) -> None:
        self.node.pin(cores)

    def _own_progress(self, done: int, total: int) -> None:
        if time.monotonic() > self._load_deadline:
            patience = self.spec.timing.load
            raise LaunchError(f"node 0 has not loaded its share within {patience:g} s")
        self._progress(0, done, total)
        self.watch()

    # ---- control messages ---------------------------------------------------

    def hear(self) -> None:
        """As Crew's. With a Survival, the loss of a worker is told to it, and not raised."""
        if self._survival is not None:
            self._survival.hear()
            return
        try:
            super().hear()
        except PeerError as lost:
            self._lose_early(lost.rank, lost)

    def take(self, rank: int, message: Message) -> None:
        """As Crew's."""
        if isinstance(message, Loading):
            self._progress(rank, message.done, message.total)
        elif isinstance(message, Suspect) and self._lost_early is not None:
            self._suspected_early.append((rank, message))
        elif isinstance(message, Suspect):
            raise PeerError(message.lost, None, message.step, f"was lost by node {rank}")
        elif isinstance(message, Times):
            if message.round == self._round:
                self._times[rank] = message.steps, message.seconds
                self._compare()
        else:
            super().take(rank, message)

    def check_processes(self) -> None:
        """As Crew's, and as hear()."""
        if self._survival is not None:
            self._survival.check_processes()
            return
        try:
            super().check_processes()
        except AbsentError as lost:
            self._lose_early(lost.ranks[0], lost)

    def _lose_early(self, rank: int, error: AbsentError | PeerError) -> None:
        """Raise `error` unless the others can go on loading without that worker."""
        if self._lost_early is None:
            raise error
        if rank in self._lost_early:
            return
        self._lost_early[rank] = error
        self.workers.remove(rank)
        self.end_process(rank)
        self.bus.give_up(rank, str(error))

    def watch(self) -> None:
        """As Crew's; and serve peers between exchanges. Goes on without those that are lost."""
        if self._survival is not None:
            self._survival.undisturbed(self._look)
        else:
            self._look()

    def _listen_in_step(self) -> None:
        self.check_processes()
        self.hear()

    def _look(self) -> None:
        self.check_processes()
        try:
            self.node.service()
        except PeerError as lost:
            self._lose_early(lost.rank, lost)
        self.hear()

    # ---- running --------------------------------------------------------------

    def once(self, plan: Plan) -> Floats | None:
        """Run a step on all ranks, of which one may be lost: PeerError is raised then."""
        self._send(plan)
        return self.node.run(plan)

    def run(self, plan: Plan) -> Floats | None:
        """Run a step on all ranks; the argument and the result are those of Node.run.

        Raises CachesEmptied in its place, PeerError where the others cannot go on without a node
        that is lost, DivergenceError, and what a worker has failed with.
        """
        if self._survival is not None:
            return self._survival.run(plan)
        with self._naming_cause():
            return self.once(plan)

    def begin_once(self, plan: Plan, draws: Sequence[Draw]) -> Callable[[], Floats | Drawn | None]:
        """As once(), in two parts: see Node.begin."""
        self._send(plan)
        return self.node.begin(plan, draws)

    def begin(self, plan: Plan, draws: Sequence[Draw]) -> Callable[[], Floats | Drawn | None]:
        """As run(), in two parts: see Node.begin."""
        if self._survival is not None:
            return self._survival.begin(plan, draws)
        with self._naming_cause():
            end = self.begin_once(plan, draws)

        def named() -> Floats | Drawn | None:
            with self._naming_cause():
                return end()

        return named

    def _send(self, plan: Plan) -> None:
        self._step = self.bus.step = plan.step
        if self._survival is not None and time.monotonic() >= self._next_round:
            self._ask_times()
        self._say(Step(plan))
        self.hear()

    def _ask_times(self) -> None:
        """Between two steps: begin a round, in which all tell of the same steps."""
        self.hear()  # what is yet to come of the last round
        self._round, self._next_round = self._round + 1, time.monotonic() + ROUND_S
        self._times = {0: self.node.take_times()}
        self._say(AskTimes(self._round))

    def _compare(self) -> None:
        """Once all have told: who is slow?"""
        times = self._times
        if times.keys() != {0, *self.workers} or not all(steps for steps, _ in times.values()):
            return
        seconds = {rank: spent / steps for rank, (steps, spent) in sorted(times.items())}
        if self.spec.engine.schedule == "centralized":  # where it computes other things
            del seconds[0]
        for line in self.stragglers.add(seconds, self.hosts):
            self._on_notice(line)

    def _say(self, message: Message) -> None:
        """Send it to all workers that take part."""
        try:
            self.bus.broadcast(message, self.workers)
        except PeerError as lost:
            if self._survival is None:
                raise
            self._survival.doubt(lost.rank)

    @contextmanager
    def _naming_cause(self) -> Iterator[None]:
        try:
            yield
        except PeerError as own:
            self._look_for_cause(own)
            raise

    def _look_for_cause(self, lost: PeerError) -> None:
        """Raise what a worker said of its own end, if that is why it is `lost`."""
        try:
            self.hear()
        except PeerError as told:
            if told.rank != lost.rank:
                raise
        cause = self.explained(lost)
        if cause is not lost:
            raise cause from lost

    def peak_memory(self) -> list[int]:
        """Peak resident bytes of every node, by rank; 0 of one that is lost."""
        answers = self._undisturbed(self._ask_memory)
        others = (answers[rank].peak_memory if rank in answers else 0 for rank in self._ranks)
        return [peak_memory(), *others]

    def _ask_memory(self) -> dict[int, Memory]:
        self._say(AskMemory())
        return self.collect(Memory, "did not tell its memory", self.spec.timing.join)

    @property
    def view(self) -> ClusterView:
        """Who is alive, and who hosts what."""
        survival = self._survival
        return first_view(self.spec.nodes, 0) if survival is None else survival.view

    @property
    def hosts(self) -> tuple[int | None, ...]:
        """Which node computes the share of each rank; None: all that are left, a part each."""
        view = self.view
        if not view.slices:
            return view.hosts
        return tuple(rank if rank in view.nodes else None for rank in range(self.spec.nodes))

    def links(self) -> tuple[int, ...]:
        """The ranks to which the leader's link in the exchange stands."""
        shards = self.node.exchange.links() if self.node.exchange is not None else ()
        return tuple(sorted({self.view.hosts[shard] for shard in shards} - {0}))

    @property
    def has_returned(self) -> bool:
        """Whether a node that was lost waits to be admitted."""
        return self._survival is not None and self._survival.has_returned

    def admit(self) -> None:
        """Let nodes in that have returned."""
        assert self._survival is not None
        self._survival.admit()

    def take_emptied(self) -> bool:
        """Whether all nodes have emptied all their caches since this was asked last."""
        return self._survival is not None and self._survival.take_emptied()

    def _undisturbed(self, part: Callable[[], T]) -> T:
        return part() if self._survival is None else self._survival.undisturbed(part)

    def _close_own(self) -> None:
        self.node.close()


def _new_session() -> int:
    return secrets.randbits(63)


def notices_of(told: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """What the nodes have told, by rank: each notice once, and who told it unless all did."""
    ranks: dict[str, list[int]] = {}
    for rank, notices in told.items():
        for notice in notices:
            ranks.setdefault(notice, []).append(rank)
    return tuple(
        notice if len(those) == len(told) else f"node {', '.join(map(str, those))}: {notice}"
        for notice, those in ranks.items()
    )
