"""A simulated run: nodes, links with delays, faults, and a model whose text depends on every sum.

Time is virtual. Each node has the real state machine and runs steps of two exchanges. A node sends
the partial of each shard that it hosts; the next token is a function of the sum over all shards,
which covers the whole text. So the text is right only if every shard was summed once, over the
right caches.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from zmoe.errors import ZmoeError
from zmoe.recovery.actions import (
    Connect,
    End,
    Evict,
    GiveUp,
    Halt,
    LeaderAction,
    NodeAction,
    Notice,
    Open,
    Repeat,
    Resume,
    Send,
    Tell,
)
from zmoe.recovery.adopt import Holding, Stock
from zmoe.recovery.leader import LeaderRecovery, Patience, Phase
from zmoe.recovery.messages import FromLeader, FromNode, View
from zmoe.recovery.node import NodeRecovery, State
from zmoe.recovery.view import ClusterView, Slices, first_view

LAYERS = 2
PROMPT = (5, 6, 7)
PEER_S, JOIN_S, TICK_S = 5.0, 8.0, 0.5
PATIENCE = Patience(quiesce=6.0, open=6.0, adopt=12.0, silence=20.0)
MOST_EVENTS, MOST_SECONDS = 20_000, 600.0


def partial_sum(shard: int, layer: int, text: Sequence[int]) -> int:
    return hash((shard, layer, *text)) % 1_000_003


def next_token(shards: int, text: Sequence[int]) -> int:
    return sum(partial_sum(shard, LAYERS - 1, text) for shard in range(shards)) % 1000


def undisturbed(shards: int, length: int) -> list[int]:
    text = list(PROMPT)
    while len(text) < length:
        text.append(next_token(shards, text))
    return text


@dataclass(frozen=True)
class Plan:
    """Rows of one sequence; `position` must be where the cache ends."""

    step: int
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """What happens right after the event number `event`.

    kill: `node` ends; with `silent` nobody is told. cut, half: the data link between `node` and
    `other` fails, both ways or from the first to the second. stall: `node` does nothing for
    `seconds`. unlink: `node` and the leader hear no more of each other. come back: `node` is
    started again.
    """

    event: int
    kind: str
    node: int
    other: int = 0
    seconds: float = 0.0
    silent: bool = False


class Host:
    """A process. `cache` has the tokens that each step added."""

    def __init__(self, network: Network, rank: int, machine: NodeRecovery | LeaderRecovery) -> None:
        self.network, self.rank, self.machine = network, rank, machine
        self.alive, self.stalled_until = True, 0.0
        self.cache: list[tuple[int, tuple[int, ...]]] = []
        self.work = 0  # number of what is under way: later ones end it
        self.queue: list[Plan] = []
        self.plan: Plan | None = None
        self.layer = 0
        self.frames: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        self.connecting = False
        self.greeted: set[int] = set()
        self.opened: ClusterView | None = network.view
        self.error: ZmoeError | None = None

    # ---- time -------------------------------------------------------------------

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Work of this host, unless it begins something else before."""
        work = self.work
        self.network.at(seconds, self, lambda: act() if work == self.work else None)

    def tick(self) -> None:
        assert isinstance(self.machine, NodeRecovery)
        self.do(self.machine.tick(self.network.now))

    # ---- actions ----------------------------------------------------------------

    def do(self, actions: Iterable[NodeAction | LeaderAction]) -> None:
        for action in actions:
            self.act(action)

    def act(self, action: NodeAction | LeaderAction) -> None:
        if isinstance(action, Halt):
            self.halt()
        elif isinstance(action, Open):
            self.open(action.view)
        elif isinstance(action, Connect):
            self.connect(action.view, action.endpoints)
        elif isinstance(action, Tell):
            self.network.tell(self, action.message)
        else:
            assert isinstance(action, End)
            self.error = action.error
            self.network.kill(self, silent=False)

    def halt(self) -> None:
        self.work += 1
        self.plan, self.connecting = None, False
        self.queue.clear()

    def open(self, view: ClusterView) -> None:
        assert self.rank in view.nodes
        self.halt()
        keeps = [entry for entry in self.cache if entry[0] <= view.base and not view.fresh]
        self.cache, self.opened = keeps, view
        self.frames.clear()
        self.greeted.clear()
        # Neither this nor adopting can be interrupted, so their ends may come late.
        self.network.at(self.network.short(), self, partial(self.is_open, view))

    def is_open(self, view: ClusterView) -> None:
        self.do(self.machine.opened(view.epoch, (self.rank, view.session), self.network.now))

    def connect(self, view: ClusterView, endpoints: tuple[object, ...]) -> None:
        assert view == self.opened
        assert endpoints == tuple((node, view.session) for node in view.nodes)
        self.connecting = True
        self.network.publish(self, view, partial(Host.greet, rank=self.rank))
        self.later(JOIN_S, self.miss_greeting)
        self.check_greetings()

    def greet(self, rank: int) -> None:
        self.greeted.add(rank)
        self.check_greetings()

    def check_greetings(self) -> None:
        view = self.opened
        assert view is not None
        if self.connecting and self.greeted | {self.rank} == set(view.nodes):
            self.work += 1
            self.connecting = False
            self.network.at(self.network.short() * 20, self, partial(self.adopted, view))

    def miss_greeting(self) -> None:
        view = self.opened
        assert view is not None
        self.lose(min(set(view.nodes) - self.greeted - {self.rank}))

    def adopted(self, view: ClusterView) -> None:
        assert isinstance(self.machine, NodeRecovery)
        self.do(self.machine.adopted(view.epoch))

    def lose(self, rank: int) -> None:
        self.do(self.machine.lost(rank, self.network.now))

    def reset(self, rank: int) -> None:
        """The process of `rank` is gone, as its connection tells."""
        if self.opened is not None and rank in self.opened.nodes:
            self.lose(rank)

    # ---- steps ------------------------------------------------------------------

    @property
    def text(self) -> list[int]:
        return [token for _, tokens in self.cache for token in tokens]

    def hear_plan(self, plan: Plan) -> None:
        assert isinstance(self.machine, NodeRecovery)
        if self.machine.takes(plan.step):
            self.queue.append(plan)
            self.begin_next()

    def begin_next(self) -> None:
        if self.plan is None and self.queue:
            self.begin(self.queue.pop(0))

    def begin(self, plan: Plan) -> None:
        assert len(self.text) == plan.position, "a step is missing, or was applied twice"
        self.plan, self.layer = plan, 0
        self.later(self.network.short(), self.send_partials)

    def send_partials(self) -> None:
        view, plan = self.opened, self.plan
        assert view is not None and plan is not None
        text = [*self.text, *plan.tokens]
        for shard in view.shards_of(self.rank):
            parts = range(*view.slices[shard]) if view.slices else (shard,)
            value = sum(partial_sum(part, self.layer, text) for part in parts)
            self.frames[plan.step, self.layer][shard] = value
            send = partial(
                Host.hear_partial, step=plan.step, layer=self.layer, shard=shard, value=value
            )
            self.network.publish(self, view, send)
        self.later(PEER_S, self.miss_partial)
        self.check_partials()

    def hear_partial(self, step: int, layer: int, shard: int, value: int) -> None:
        frames = self.frames[step, layer]
        assert shard not in frames, "a shard was summed twice"
        frames[shard] = value
        self.check_partials()

    def check_partials(self) -> None:
        view, plan = self.opened, self.plan
        if plan is None or view is None:
            return
        frames = self.frames[plan.step, self.layer]
        if len(frames) < len(view.hosts) or not set(view.shards_of(self.rank)) <= frames.keys():
            return
        self.work += 1
        self.layer += 1
        if self.layer < LAYERS:
            self.later(self.network.short(), self.send_partials)
            return
        self.cache.append((plan.step, plan.tokens))
        self.plan = None
        self.finish(plan, sum(frames.values()) % 1000)

    def miss_partial(self) -> None:
        view, plan = self.opened, self.plan
        assert view is not None and plan is not None
        frames = self.frames[plan.step, self.layer]
        missing = {host for shard, host in enumerate(view.hosts) if shard not in frames}
        self.lose(min(missing - {self.rank}))

    def finish(self, plan: Plan, token: int) -> None:
        assert isinstance(self.machine, NodeRecovery)
        self.machine.finish(plan.step)
        self.begin_next()


class LeaderHost(Host):
    """Rank 0: it samples, and runs step after step until the network lets it rest."""

    machine: LeaderRecovery

    def __init__(self, network: Network, machine: LeaderRecovery) -> None:
        super().__init__(network, 0, machine)
        self.out = list(PROMPT)  # the text as its reader has it
        self.step, self.known, self.cached = 0, 0, 0
        self.repeats: list[Plan] = []
        self.gave_up = False
        self.notices: list[str] = []

    def tick(self) -> None:
        if self.machine.phase is Phase.QUIESCE:  # it looks at its links meanwhile
            for rank in self.network.unheard():
                self.lose(rank)
        self.do(self.machine.tick(self.network.now))

    def act(self, action: NodeAction | LeaderAction) -> None:
        if isinstance(action, Send):
            self.network.check_send(action)
            self.network.bus(action.rank, action.message)
        elif isinstance(action, Evict):
            self.network.evict(action.rank)
        elif isinstance(action, Notice):
            self.notices.append(action.text)
        elif isinstance(action, Repeat):
            assert 1 <= len(action.plans) <= 2
            plans = [plan for plan in action.plans if isinstance(plan, Plan)]
            assert action.known == self.known
            self.repeats = plans
            self.go_on()
        elif isinstance(action, Resume):
            if action.view.fresh:
                self.cached = 0
            self.go_on()
        elif isinstance(action, GiveUp):
            self.error, self.gave_up = action.error, True
            self.halt()
        else:
            super().act(action)

    def halt(self) -> None:
        super().halt()
        self.repeats.clear()

    def adopted(self, view: ClusterView) -> None:
        self.do(self.machine.adopted(view.epoch, self.network.now))

    def go_on(self) -> None:
        """The next step, if there is one."""
        if self.plan is not None:
            return
        if self.repeats:
            plan = self.repeats.pop(0)
        elif self.machine.phase is Phase.RUNNING and not self.network.rests:
            if self.machine.waiting_to_enter:
                self.do(self.machine.admit(self.network.now))
                return
            self.step += 1
            plan = Plan(self.step, self.cached, tuple(self.out[self.cached :]))
            self.machine.begin(plan)
        else:
            return
        for node in self.machine.view.nodes[1:]:
            self.network.bus(node, plan)
        self.begin(plan)

    def finish(self, plan: Plan, token: int) -> None:
        if plan.step > self.known:
            self.known = plan.step
            self.out.append(token)
            self.cached = plan.position + len(plan.tokens)
            self.network.progressed()
        self.do(self.machine.finish(plan.step))
        self.go_on()

    def hear(self, sender: Host, message: FromNode) -> None:
        if self.network.linked[sender.rank] is sender:  # else its link is another process's
            self.do(self.machine.receive(sender.rank, message, self.network.now))

    def hear_end(self, host: Host) -> None:
        if self.network.linked[host.rank] is host:
            self.do(self.machine.ended(host.rank, "has ended", self.network.now))


class Network:
    """The nodes 0 to `nodes` - 1, on which faults are inflicted while they run."""

    def __init__(
        self,
        nodes: int,
        seed: int,
        faults: Sequence[Fault] = (),
        form: str = "rewinds",
        room: bool = True,
    ) -> None:
        """`form`: caches can go back ("rewinds"), or are dropped ("forgets"), and the weights are
        divided anew ("divides"). `room`: there is memory to adopt; else weights are not mapped
        either.
        """
        self.shards, self.room = nodes, room
        self.random = random.Random(seed)
        self.faults = sorted(faults, key=lambda fault: fault.event)
        self.now, self.events, self.quiet_steps = 0.0, 0, 0
        self.numbers = itertools.count()
        self.sessions = itertools.count(1)
        self.heap: list[tuple[float, int, Host | None, Callable[[], None], bool]] = []
        self.arrivals: dict[tuple[Host, Host, bool], float] = {}
        self.cuts: set[tuple[int, int]] = set()
        self.silent_since: dict[Host, float] = {}  # those that once were, by is_silent
        self.unlinked: set[Host] = set()
        self.evicted: dict[Host, int] = {}  # and from which epoch on
        self.pending = 0  # events that are no ticks
        everything = tuple(range(nodes))
        self.holdings = {
            node: Holding(10**6 if room else 0, {node: 1000}, everything) for node in everything
        }
        stock = Stock((1000,) * nodes, self.holdings, mapped=room)
        self.view = first_view(nodes, next(self.sessions))
        self.views = {0: self.view}
        machine = LeaderRecovery(
            self.view,
            stock,
            PATIENCE,
            lambda: next(self.sessions),
            rewinds=form == "rewinds",
            divide=self.divide if form == "divides" else None,
        )
        self.leader = LeaderHost(self, machine)
        self.hosts: dict[int, Host] = {0: self.leader}  # the latest process of each rank
        for rank in everything[1:]:
            self.hosts[rank] = Host(self, rank, NodeRecovery(rank, self.view, PATIENCE.silence))
        self.linked = dict(self.hosts)  # with the leader

    def divide(self, nodes: Sequence[int]) -> Slices:
        """Runs of the shards with which the run began, one for each node."""
        if not self.room and len(nodes) < self.shards:
            raise ZmoeError("no node has room for shard 0")
        bounds = [self.shards * index // len(nodes) for index in range(len(nodes) + 1)]
        return tuple(itertools.pairwise(bounds))

    # ---- time -------------------------------------------------------------------

    def short(self) -> float:
        return self.random.uniform(0.001, 0.05)

    def at(self, seconds: float, host: Host, act: Callable[[], None]) -> None:
        self.pending += 1
        heapq.heappush(self.heap, (self.now + seconds, next(self.numbers), host, act, True))

    def tick(self, host: Host) -> None:
        host.tick()
        entry = (self.now + TICK_S, next(self.numbers), host, partial(self.tick, host), False)
        heapq.heappush(self.heap, entry)

    def run(self) -> None:
        """Until all faults are over and have been lived down, or the leader is no more."""
        for host in list(self.hosts.values()):
            self.tick(host)
        self.leader.go_on()
        while self.heap and not (self.rests and not self.pending) and not self.over:
            self.now, number, host, act, counts = heapq.heappop(self.heap)
            assert self.now < MOST_SECONDS and self.events < MOST_EVENTS, "it hangs"
            assert host is not None
            if host.alive and self.now < host.stalled_until:
                # What has come meanwhile is heard before anybody looks at the clock.
                until = host.stalled_until + (0.0 if counts else 1e-3)
                entry = (until, number, host, act, counts)
                heapq.heappush(self.heap, entry)
                continue
            self.pending -= counts
            if not host.alive:
                continue
            act()
            if counts:
                self.events += 1
                self.inflict()

    @property
    def over(self) -> bool:
        """Nobody is left, or only nodes that wait for a leader that gave up."""
        return self.leader.gave_up or not any(host.alive for host in self.hosts.values())

    @property
    def rests(self) -> bool:
        """The leader has run two whole steps since the last fault."""
        return not self.faults and self.quiet_steps > 2

    def progressed(self) -> None:
        stalled = any(h.alive and h.stalled_until > self.now for h in self.hosts.values())
        returning = any(
            h.alive and isinstance(h.machine, NodeRecovery) and h.machine.state is State.ENTERING
            for h in self.hosts.values()
        )
        self.quiet_steps = 0 if self.faults or stalled or returning else self.quiet_steps + 1

    # ---- links ------------------------------------------------------------------

    def unheard(self) -> list[int]:
        """The nodes of the view whose links with the leader in the exchange are gone for good."""
        hosts = (self.hosts[rank] for rank in self.leader.machine.view.nodes[1:])
        return [
            host.rank
            for host in hosts
            if self.is_silent(host) and self.now >= self.silent_since.get(host, self.now) + PEER_S
        ]

    def is_silent(self, host: Host) -> bool:
        cut = not self.cuts.isdisjoint({(0, host.rank), (host.rank, 0)})
        return cut or not host.alive or host.stalled_until > self.now

    def fall_silent(self, host: Host) -> None:
        """To be called before something silences it."""
        if not self.is_silent(host):
            self.silent_since[host] = self.now

    def deliver(self, source: Host, target: Host, control: bool, act: Callable[[], None]) -> None:
        """In the order of sending."""
        link = (source, target, control)
        arrival = max(self.now + self.short(), self.arrivals.get(link, 0.0) + 1e-6)
        self.arrivals[link] = arrival
        self.at(arrival - self.now, target, act)

    def publish(self, source: Host, view: ClusterView, act: Callable[[Host], None]) -> None:
        """A frame to all other nodes of a view."""

        def arrive(target: Host) -> None:
            if target.opened is not None and target.opened.session == view.session:
                assert view.epoch < self.evicted.get(source, 10**9), "an evicted node acts"
                act(target)

        for rank in view.nodes:
            if rank != source.rank and (source.rank, rank) not in self.cuts:
                target = self.hosts[rank]
                self.deliver(source, target, False, partial(arrive, target))

    def bus(self, rank: int, message: FromLeader | Plan) -> None:
        target = self.linked[rank]
        if target in self.unlinked:
            return
        machine = target.machine
        assert isinstance(machine, NodeRecovery)
        if isinstance(message, Plan):
            act = partial(target.hear_plan, message)
        else:

            def act() -> None:
                target.do(machine.receive(message, self.now))

        self.deliver(self.leader, target, True, act)

    def tell(self, source: Host, message: FromNode) -> None:
        if source not in self.unlinked:
            self.deliver(source, self.leader, True, partial(self.leader.hear, source, message))

    # ---- what must hold -----------------------------------------------------------

    def check_send(self, action: Send) -> None:
        if isinstance(action.message, View):
            view = action.message.view
            assert self.views.setdefault(view.epoch, view) == view, "two views of one epoch"
            assert view.epoch == max(self.views)
            assert action.rank in view.nodes

    def evict(self, rank: int) -> None:
        view = self.leader.machine.view
        self.evicted[self.linked[rank]] = view.epoch + (rank in view.nodes)

    # ---- faults -----------------------------------------------------------------

    def inflict(self) -> None:
        while self.faults and self.faults[0].event <= self.events:
            fault = self.faults.pop(0)
            self.quiet_steps = 0
            host = self.hosts[fault.node]
            if fault.kind == "kill":
                self.kill(host, fault.silent)
            elif fault.kind in ("cut", "half"):
                if 0 in (fault.node, fault.other):
                    self.fall_silent(self.hosts[fault.node or fault.other])
                self.cuts.add((fault.node, fault.other))
                if fault.kind == "cut":
                    self.cuts.add((fault.other, fault.node))
            elif fault.kind == "stall":
                self.fall_silent(host)
                host.stalled_until = max(host.stalled_until, self.now + fault.seconds)
            elif fault.kind == "unlink" and host is not self.leader:
                self.unlinked.add(host)
                self.at(3.0, self.leader, partial(self.leader.hear_end, host))
                self.at(3.0, host, partial(self.kill, host, True))  # as a node without a leader
            elif fault.kind == "come back" and not host.alive and self.leader.alive:
                self.start_again(fault.node)

    def kill(self, host: Host, silent: bool) -> None:
        if not host.alive:
            return
        self.fall_silent(host)
        host.alive = False
        if host is self.leader:
            for other in self.hosts.values():
                self.at(150.0, other, partial(self.orphan, other))
        elif not silent:
            self.at(self.short(), self.leader, partial(self.leader.hear_end, host))
        for other in self.hosts.values():
            if not silent and self.random.random() < 0.5 and host.opened == other.opened:
                self.at(self.short(), other, partial(self.reset, other, host, host.opened))

    def reset(self, other: Host, host: Host, view: ClusterView | None) -> None:
        if other.opened == view:
            other.reset(host.rank)

    def start_again(self, rank: int) -> None:
        host = Host(self, rank, NodeRecovery(rank, None, PATIENCE.silence))
        host.opened, self.hosts[rank] = None, host
        self.at(self.short(), self.leader, partial(self.enter, host))
        self.tick(host)

    def enter(self, host: Host) -> None:
        """The link of a new process tells the leader that the old one is gone."""
        machine = self.leader.machine
        self.leader.do(machine.ended(host.rank, "was started again", self.now))
        self.linked[host.rank] = host
        machine.returned(host.rank, self.holdings[host.rank])

    def orphan(self, host: Host) -> None:
        """Its link to the leader is gone for so long that all who wait should have ended."""
        assert isinstance(host.machine, NodeRecovery)
        waits = (State.SUSPECTING, State.HALTED, State.OPENED)
        assert host.machine.state not in waits, "it waits for a leader for too long"
        self.kill(host, silent=True)
