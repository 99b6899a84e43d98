"""The leader's side of recoveries: what happens is told to the state machine of zmoe.recovery,
and what that decides is carried out on sockets, processes and the leader's own node.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

from zmoe.batch.plan import Plan
from zmoe.cluster.crew import error_of
from zmoe.cluster.keeper import Process
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.membership import Halted, join_view, open_view
from zmoe.cluster.messages import Failed, Loading, Message
from zmoe.cluster.node import Node
from zmoe.cluster.returning import Restarts, Returns
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Timing
from zmoe.engine.base import CachesEmptied, Floats
from zmoe.engine.draw import Draw, Drawn
from zmoe.errors import PeerError, ZmoeError
from zmoe.recovery.actions import (
    Connect,
    Evict,
    GiveUp,
    Halt,
    LeaderAction,
    Notice,
    Open,
    Repeat,
    Resume,
    Send,
)
from zmoe.recovery.adopt import Stock
from zmoe.recovery.leader import LeaderRecovery, Patience, Phase
from zmoe.recovery.messages import FromNode, Suspect
from zmoe.recovery.view import ClusterView, Slices

_SLICE_S = 0.02  # of a wait for the nodes, in a recovery
_PROBE_S = 0.5  # between two looks at their links meanwhile
# For a node to say that it has stopped: it hears that in an exchange, between two layers.
_ANSWER_S = 15.0
_SPARE_S = 10.0  # that nodes wait longer for the leader than it waits for them
End = Callable[[], Floats | Drawn | None]
T = TypeVar("T")


class Leading(Protocol):
    """What a Survival acts by: the leader."""

    node: Node
    bus: LeaderBus
    spec: ClusterSpec
    workers: list[int]  # those that take part
    processes: list[Process]

    def take(self, rank: int, message: Message) -> None:
        """A message that has nothing to do with losses."""
        ...

    def start_worker(self, rank: int) -> None:
        """Start the process of a worker again."""
        ...

    def end_process(self, rank: int) -> bool:
        """Kill the process of a worker; whether this leader had started it."""
        ...

    def once(self, plan: Plan) -> Floats | None:
        """Run a plan on all nodes."""
        ...

    def begin_once(self, plan: Plan, draws: Sequence[Draw]) -> End:
        """Begin a plan on all nodes; the result ends it."""
        ...


def patience_of(timing: Timing) -> Patience:
    """The deadlines of a recovery in a run with these."""
    answer = min(timing.peer, _ANSWER_S)
    return Patience(answer, answer, timing.load, max(answer, timing.load) + _SPARE_S)


class Survival:
    """Runs steps, and goes on without the nodes that are lost meanwhile."""

    def __init__(
        self,
        leader: Leading,
        view: ClusterView,
        stock: Stock,
        returns: Returns,
        new_session: Callable[[], int],
        on_notice: Callable[[str], None],
        divide: Callable[[Sequence[int]], Slices] | None = None,
    ) -> None:
        """`view`: the one in which the run begins, of which `stock` tells; `divide` is
        LeaderRecovery's.
        """
        self._leader, self._on_notice = leader, on_notice
        patience = patience_of(leader.spec.timing)
        rewinds = leader.node.can_undo
        self._machine = LeaderRecovery(
            view, stock, patience, new_session, rewinds=rewinds, divide=divide
        )
        self._stock, self._returns = stock, returns
        self._restarts = Restarts(leader.start_worker, on_notice)
        self._actions: deque[LeaderAction] = deque()
        self._begun: dict[int, End] = {}  # what ends the steps under way: all that holds the model
        self._may_be_halted = False
        self._emptied = False
        self._next_probe = 0.0

    @property
    def view(self) -> ClusterView:
        """Who is alive, and who hosts what."""
        return self._machine.view

    @property
    def has_returned(self) -> bool:
        """Whether a node waits to be admitted."""
        return bool(self._machine.waiting_to_enter)

    def lose(self, rank: int, reason: str) -> None:
        """A worker was lost before the first step, and its process is ended."""
        if not self._leader.spec.manual:
            self._restarts.ended(rank)
        self._take(self._machine.ended(rank, reason, time.monotonic()))
        self.settle()

    def suspect(self, rank: int, message: Suspect) -> None:
        """A worker has lost another one before the first step."""
        self._take(self._machine.receive(rank, message, time.monotonic()))
        self.settle()

    # ---- what happens ----------------------------------------------------------------

    def hear(self) -> None:
        """Handle what workers have said. Raises Halted where that ends what is under way, and
        what a worker has failed with.
        """
        try:
            heard = self._leader.bus.hear()
        except PeerError as lost:
            self._gone(lost.rank, self._ending(lost.rank) or lost.reason)
            return
        halted = False
        for rank, message in heard:
            try:
                self._handle(rank, message)
            except Halted:
                halted = True
        if halted:
            raise Halted

    def _handle(self, rank: int, message: Message) -> None:
        if rank not in self._leader.workers:
            self._handle_outsider(rank, message)
        elif isinstance(message, Failed) and message.lost is not None:
            self._gone(rank, f"lost its leader: {message.error}")
        elif isinstance(message, Failed):
            raise error_of(rank, message)
        elif isinstance(message, FromNode):
            if isinstance(message, Suspect):
                self._leader.bus.doubt(message.lost)
            self._take(self._machine.receive(rank, message, time.monotonic()))
        else:
            self._leader.take(rank, message)

    def _handle_outsider(self, rank: int, message: Message) -> None:
        """What a node says that is on its way back, or in the first view that has it."""
        if isinstance(message, FromNode):
            self._take(self._machine.receive(rank, message, time.monotonic()))
        elif isinstance(message, Failed):
            self._refuse(rank, f"node {rank} could not come back: {message.error}")
        elif not isinstance(message, Loading):
            try:
                answer = self._returns.answer(rank, message)
            except ZmoeError as error:
                self._refuse(rank, str(error))
                return
            if answer is not None:
                self._tell(rank, answer)
            elif rank not in self._machine.waiting_to_enter:
                self._machine.returned(rank, self._stock.holdings[rank])

    def _refuse(self, rank: int, reason: str) -> None:
        self._on_notice(reason)
        self._leader.bus.give_up(rank, reason)
        self._take(self._machine.ended(rank, reason, time.monotonic()))

    def check_processes(self) -> None:
        """Handle the ends of processes, as hear(); and start again those that are due."""
        for process in list(self._leader.processes):
            if process.exit_code() is not None:
                with suppress(Halted):
                    self.hear()  # its own words, if it sent them, say more
                self._end_process(process.rank)
                self._gone(process.rank, process.ending())
        self._restarts.start()

    def _ending(self, rank: int) -> str:
        """How the process of a worker has ended; "" if it has not, or another one started it."""
        ended = [p for p in self._leader.processes if p.rank == rank and p.exit_code() is not None]
        return ended[0].ending() if ended else ""

    def _gone(self, rank: int, reason: str) -> None:
        """A worker's process has ended, or its link with the leader."""
        if rank not in self._leader.workers:  # it was on its way back
            self._leader.bus.give_up(rank, f"node {rank} {reason}")
            self._end_process(rank)
        self._take(self._machine.ended(rank, reason, time.monotonic()))

    def _lost(self, lost: PeerError) -> None:
        """The exchange has lost the host of the shard `lost.rank`."""
        self.doubt(self.view.hosts[lost.rank])

    def doubt(self, rank: int) -> None:
        """The leader does not reach a worker. Raises Halted as hear() does."""
        self._leader.bus.doubt(rank)
        self._take(self._machine.lost(rank, time.monotonic()))

    def _take(self, actions: Sequence[LeaderAction]) -> None:
        halts = any(isinstance(action, Halt) for action in actions)
        if halts:  # what follows from the view before is of no use any more
            kept = [a for a in self._actions if not isinstance(a, (Open, Connect, Repeat))]
            self._actions = deque(kept)
        self._actions += actions
        if halts and self._may_be_halted:
            raise Halted

    # ---- what is to be done ------------------------------------------------------------

    def run(self, plan: Plan) -> Floats | None:
        """Run a step, whatever nodes are lost meanwhile: the logits that Node.run gives.

        Raises CachesEmptied in its place where caches cannot go back; else what Leading.once() does
        but PeerError, and ZmoeError where the run cannot go on.
        """
        self.settle()
        found: list[Floats | None] = []
        if not self._emptied:
            self._machine.begin(plan)
            self._attempt(partial(self._step, plan, found))
            while self._machine.phase is not Phase.RUNNING or self._actions:
                found += self._recover()
        if self.take_emptied():
            raise CachesEmptied
        return found[-1]

    def begin(self, plan: Plan, draws: Sequence[Draw]) -> End:
        """As run(), in two parts, of which the second ends the step; another one may begin between.

        In either part CachesEmptied is raised where a node was lost: then no step is under way.
        """
        self._go_on()
        self._machine.begin(plan)
        self._attempt(partial(self._begin, plan, draws))
        self._go_on()

        def end() -> Floats | Drawn | None:
            found: list[Floats | Drawn | None] = []
            self._go_on()
            if plan.step not in self._begun:
                raise CachesEmptied
            self._attempt(lambda: found.append(self._end(plan.step)))
            self._go_on()
            return found[0]

        return end

    def _begin(self, plan: Plan, draws: Sequence[Draw]) -> None:
        self._begun[plan.step] = self._leader.begin_once(plan, draws)

    def _end(self, step: int) -> Floats | Drawn | None:
        found = self._begun.pop(step)()
        self._actions += self._machine.finish(step)
        return found

    def _go_on(self) -> None:
        """As settle(). Raises CachesEmptied where that has emptied all caches."""
        self.settle()
        if self.take_emptied():
            raise CachesEmptied

    def take_emptied(self) -> bool:
        """Whether all caches were emptied since this was asked last, or since they were made."""
        emptied, self._emptied = self._emptied, False
        return emptied

    def settle(self) -> None:
        """Between steps: go on without the nodes that were lost since the last one."""
        while self._machine.phase is not Phase.RUNNING or self._actions:
            self._recover()

    def undisturbed(self, part: Callable[[], T]) -> T:
        """What `part` returns, which is called again where a node is lost meanwhile."""
        found: list[T] = []
        while not found:
            self.settle()
            self._attempt(lambda: found.append(part()))
        return found[0]

    def _attempt(self, part: Callable[[], object]) -> bool:
        """Call `part`; whether it came to its end: the loss of a node, of which the machine is
        told, ends it before.
        """
        self._may_be_halted = True
        try:
            part()
        except Halted:
            return False
        except PeerError as lost:
            self._may_be_halted = False
            self._lost(lost)
            return False
        finally:
            self._may_be_halted = False
        return True

    def _step(self, plan: Plan, found: list[Floats | None]) -> None:
        found.append(self._leader.once(plan))
        self._actions += self._machine.finish(plan.step)

    def _recover(self) -> list[Floats | None]:
        """Carry out what is due, or wait for the nodes; the logits of steps that were repeated."""
        found: list[Floats | None] = []
        if not self._actions:
            self._listen(_SLICE_S)
            self._take(self._machine.tick(time.monotonic()))
            return found
        action = self._actions.popleft()
        if isinstance(action, Send):
            self._tell(action.rank, action.message)
        elif isinstance(action, Evict):
            self._let_go(action.rank, action.reason)
            self._on_notice(f"node {action.rank} {action.reason}")
        elif isinstance(action, Notice):
            self._on_notice(action.text)
        elif isinstance(action, Open):
            view, node = action.view, self._leader.node
            self._begun.clear()
            self._take(self._machine.opened(view.epoch, open_view(node, view), time.monotonic()))
        elif isinstance(action, Connect):
            self._attempt(partial(self._connect, action))
        elif isinstance(action, Repeat):
            for plan in action.plans:
                assert isinstance(plan, Plan)
                if not self._attempt(partial(self._step, plan, found)):
                    break
        elif isinstance(action, Resume):
            self._resume(action.view)
        elif isinstance(action, GiveUp):
            raise action.error
        return found

    def _listen(self, timeout: float) -> None:
        self._leader.bus.wait(timeout)
        now = time.monotonic()
        if now >= self._next_probe:
            self._next_probe = now + _PROBE_S
            self._leader.bus.probe()
        self.check_processes()
        self.hear()
        self._look_at_links()

    def _look_at_links(self) -> None:
        """While nodes are to halt: one that is stopped says nothing, and its system keeps the
        control link up. Only the heartbeats of the exchange, which it leaves unanswered, tell it
        from one that computes.
        """
        if self._machine.phase is not Phase.QUIESCE:
            return
        try:
            self._leader.node.service()
        except PeerError as lost:
            for rank in {self.view.hosts[shard] for shard in (lost.rank, *lost.others)}:
                self._take(self._machine.lost(rank, time.monotonic()))

    def _tell(self, rank: int, message: Message) -> None:
        with suppress(PeerError):  # which is noticed elsewhere
            self._leader.bus.broadcast(message, (rank,))

    def _let_go(self, rank: int, reason: str) -> None:
        self._leader.bus.give_up(rank, f"node {rank} is no longer part of the run: {reason}")
        if rank in self._leader.workers:
            self._leader.workers.remove(rank)
        self._end_process(rank)

    def _end_process(self, rank: int) -> None:
        """End the process of a worker, if this leader has started it; another one comes later."""
        if self._leader.end_process(rank):
            self._restarts.ended(rank)

    def _resume(self, view: ClusterView) -> None:
        for rank in set(view.nodes) - {0, *self._leader.workers}:
            self._restarts.entered(rank)
            self._on_notice(f"node {rank} is back")
        self._leader.workers = list(view.nodes[1:])
        self._emptied |= view.fresh
        self._on_notice(_who_hosts_what(view, self._leader.spec.nodes))

    def admit(self) -> None:
        """Let the nodes in that have returned. All caches are empty then: theirs are."""
        self.settle()
        self._take(self._machine.admit(time.monotonic()))
        self.settle()

    def _connect(self, action: Connect) -> None:
        view = action.view
        join_view(self._leader.node, view, action.endpoints, partial(self._listen, 0))
        self._actions += self._machine.adopted(view.epoch, time.monotonic())


def _who_hosts_what(view: ClusterView, nodes: int) -> str:
    """One line for the user, of a run that began with so many `nodes`."""
    if view.slices and len(view.nodes) < nodes:
        lost = " and ".join(f"node {rank}" for rank in range(nodes) if rank not in view.nodes)
        left = " and ".join(f"node {rank}" for rank in view.nodes)
        divided = "has all experts" if len(view.nodes) == 1 else "have divided the experts anew"
        return (
            f"the run goes on without {lost}, once what runs is prefilled again: {left} {divided}"
        )
    adopted: defaultdict[int, list[str]] = defaultdict(list)
    for shard, host in enumerate(view.hosts):
        if host != shard:
            adopted[host].append(f"node {shard}")
    if not adopted:
        return "every node computes its own share again"
    shares = [f"node {host} computes the share of {' and '.join(s)}" for host, s in adopted.items()]
    again = ", once what runs is prefilled again" if view.fresh else ""
    return f"the run goes on{again}; besides its own, {', '.join(shares)}"
