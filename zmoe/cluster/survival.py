"""The leader's side of recoveries: what happens is told to the state machine of zmoe.recovery,
and what that decides is carried out on sockets, processes and the leader's own node.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from zmoe.batch.plan import Plan
from zmoe.cluster.membership import Halted, join_view, open_view
from zmoe.cluster.node import Node
from zmoe.config import Timing
from zmoe.engine.base import Floats
from zmoe.errors import PeerError
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
from zmoe.recovery.messages import FromLeader, FromNode
from zmoe.recovery.view import ClusterView

_SLICE_S = 0.02  # of a wait for the nodes, in a recovery
_SPARE_S = 10.0  # that nodes wait longer for the leader than it waits for them
T = TypeVar("T")


class LeaderLike(Protocol):
    """What a Survival acts by."""

    node: Node

    def listen(self, timeout: float) -> None:
        """Wait for what workers say and for the ends of their processes, and tell the Survival."""
        ...

    def tell(self, rank: int, message: FromLeader) -> None:
        """Send `message` to a worker, which may be gone."""
        ...

    def let_go(self, rank: int, reason: str) -> None:
        """End the process of a worker, if it is ours, and hear it no more."""
        ...

    def once(self, plan: Plan) -> Floats | None:
        """Run a plan on all nodes."""
        ...


def patience_of(timing: Timing) -> Patience:
    """The deadlines of a recovery in a run with these."""
    return Patience(timing.peer, timing.peer, timing.load, max(timing.peer, timing.load) + _SPARE_S)


class Survival:
    """Runs steps, and goes on without the nodes that are lost meanwhile."""

    def __init__(
        self,
        leader: LeaderLike,
        view: ClusterView,
        stock: Stock,
        timing: Timing,
        new_session: Callable[[], int],
        on_notice: Callable[[str], None],
    ) -> None:
        """`view`: the one in which the run begins, of which `stock` tells."""
        self._leader, self._on_notice = leader, on_notice
        self._machine = LeaderRecovery(view, stock, patience_of(timing), new_session, rewinds=True)
        self._actions: deque[LeaderAction] = deque()
        self._may_be_halted = False

    @property
    def view(self) -> ClusterView:
        """Who is alive, and who hosts what."""
        return self._machine.view

    # ---- what happens ----------------------------------------------------------------

    def heard(self, rank: int, message: FromNode) -> None:
        """A worker has said so. Raises Halted where that ends what is under way."""
        self._take(self._machine.receive(rank, message, time.monotonic()))

    def gone(self, rank: int, reason: str) -> None:
        """A worker's process has ended, or its link with the leader. May raise Halted."""
        self._take(self._machine.ended(rank, reason, time.monotonic()))

    def _lost(self, lost: PeerError) -> None:
        """The exchange has lost the host of the shard `lost.rank`."""
        self._take(self._machine.lost(self.view.hosts[lost.rank], time.monotonic()))

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

        Raises what LeaderLike.once() does but PeerError, and ZmoeError where the run cannot go on.
        """
        self.settle()
        self._machine.begin(plan)
        found: list[Floats | None] = []
        self._attempt(partial(self._step, plan, found))
        while self._machine.phase is not Phase.RUNNING or self._actions:
            found += self._recover()
        return found[-1]

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
            self._leader.listen(_SLICE_S)
            self._take(self._machine.tick(time.monotonic()))
            return found
        action = self._actions.popleft()
        if isinstance(action, Send):
            self._leader.tell(action.rank, action.message)
        elif isinstance(action, Evict):
            self._leader.let_go(action.rank, action.reason)
            self._on_notice(f"node {action.rank} {action.reason}")
        elif isinstance(action, Notice):
            self._on_notice(action.text)
        elif isinstance(action, Open):
            view, node = action.view, self._leader.node
            self._take(self._machine.opened(view.epoch, open_view(node, view), time.monotonic()))
        elif isinstance(action, Connect):
            self._attempt(partial(self._connect, action))
        elif isinstance(action, Repeat):
            for plan in action.plans:
                assert isinstance(plan, Plan)
                if not self._attempt(partial(self._step, plan, found)):
                    break
        elif isinstance(action, Resume):
            self._on_notice(_who_hosts_what(action.view))
        elif isinstance(action, GiveUp):
            raise action.error
        return found

    def _connect(self, action: Connect) -> None:
        view = action.view
        join_view(self._leader.node, view, action.endpoints, partial(self._leader.listen, 0))
        self._actions += self._machine.adopted(view.epoch, time.monotonic())


def _who_hosts_what(view: ClusterView) -> str:
    """One line for the user."""
    moved = [
        f"node {host} computes the share of node {shard}"
        for shard, host in enumerate(view.hosts)
        if host != shard
    ]
    if not moved:
        return "every node computes its own share again"
    return f"the run goes on; besides its own, {', '.join(moved)}"
