"""The leader's part in a recovery: a state machine, the only one that makes views."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from zmoe.errors import SettingError, ZmoeError
from zmoe.recovery.actions import (
    End,
    Evict,
    GiveUp,
    Halt,
    LeaderAction,
    NodeAction,
    Notice,
    Repeat,
    Resume,
    Send,
    Tell,
)
from zmoe.recovery.adopt import Holding, Stock, adopt
from zmoe.recovery.log import Numbered, StepLog
from zmoe.recovery.messages import (
    Adopted,
    Evicted,
    FromNode,
    Halted,
    Mesh,
    Opened,
    Quiesce,
    Suspect,
    View,
)
from zmoe.recovery.node import NodeRecovery
from zmoe.recovery.view import ClusterView, Slices


@dataclass(frozen=True)
class Patience:
    """Deadlines of a recovery in seconds: who is silent for longer counts as dead.

    quiesce, open, adopt: for a node's answer to Quiesce, View and Mesh. silence: for the leader's
    next word to a node that waits for it. Raises SettingError unless that is the longest of all.
    """

    quiesce: float
    open: float
    adopt: float
    silence: float

    def __post_init__(self) -> None:
        longest = max(self.quiesce, self.open, self.adopt)
        if self.silence <= longest:
            raise SettingError(
                "silence", f"is {self.silence:g} s: expected more than the leader's {longest:g} s"
            )


class Phase(Enum):
    """Of a recovery, in order; the value says what nodes are waited for to do."""

    RUNNING = "run"
    QUIESCE = "halt"
    OPEN = "open its exchange"
    MESH = "connect and adopt"
    REPEAT = "repeat steps"
    ENDED = "end"


_ANSWERED_IN = {Halted: Phase.QUIESCE, Opened: Phase.OPEN, Adopted: Phase.MESH}


class LeaderRecovery:
    """Each method takes an event and returns what is to be done; `now` is in seconds, on any clock.

    It also has the part of the leader's own node, to which it sends nothing: Halt, Open and
    Connect are for that node, and lost(), opened() and adopted() are called by it.
    """

    def __init__(
        self,
        view: ClusterView,
        stock: Stock,
        patience: Patience,
        new_session: Callable[[], int],
        *,
        rewinds: bool,
        divide: Callable[[Sequence[int]], Slices] | None = None,
    ) -> None:
        """`view`: the one in which the run begins. `new_session` gives a fresh random number.

        `rewinds`: every cache can go back by two steps; else each view is fresh. With `divide`
        nobody adopts a shard: it says how the nodes of a view divide the weights, and raises
        ZmoeError where they cannot.
        """
        self.view = view
        self.phase = Phase.RUNNING
        self._stock, self._patience, self._new_session = stock, patience, new_session
        self._home = view.hosts
        self._rewinds, self._fresh, self._divide = rewinds, False, divide
        self._own = NodeRecovery(0, view, patience.silence)
        self._log = StepLog(view.base)
        self._epoch = view.epoch
        self._nodes = set(view.nodes)
        self._returned: set[int] = set()  # they wait for admit()
        self._entering: set[int] = set()  # for the view that is being made
        self._waiting: set[int] = set()  # for their answers
        self._deadline = math.inf
        # Since the last view was made:
        self._done: dict[int, int] = {}
        self._removed = False
        self._accusations: set[tuple[int, int]] = set()
        # Since then:
        self._endpoints: dict[int, object] = {}

    # ---- steps ------------------------------------------------------------------

    def begin(self, plan: Numbered) -> None:
        """A new plan is about to be sent. Raises ZmoeError where none can be."""
        if self.phase is not Phase.RUNNING:
            raise ZmoeError(f"plan {plan.step} in a recovery, in which nodes {self.phase.value}")
        if self._rewinds:
            self._log.add(plan)
        else:
            self._log.forget(plan.step)

    def finish(self, step: int) -> list[LeaderAction]:
        """The leader's node has finished `step`. Raises ZmoeError where none can be."""
        self._own.finish(step)
        if self._rewinds:
            self._log.finish(step)
        if self.phase is Phase.REPEAT and step == self._log.last:
            return self._resume()
        return []

    # ---- what happens to the leader's own node -----------------------------------

    def lost(self, lost: int, now: float) -> list[LeaderAction]:
        """The leader's exchange has lost the node `lost`, or cannot connect with it.

        While nodes are to halt, nobody waits for the answer of one whose link is gone.
        """
        if self.phase is Phase.QUIESCE and lost in self._waiting:
            return self._run(self._without({lost: "does not answer"}, now), now)
        return self._run(self._own.lost(lost, now), now)

    def opened(self, epoch: int, endpoint: object, now: float) -> list[LeaderAction]:
        """What Open asked for is done; as NodeRecovery.opened()."""
        return self._run(self._own.opened(epoch, endpoint, now), now)

    def adopted(self, epoch: int, now: float) -> list[LeaderAction]:
        """What Connect asked for is done; as NodeRecovery.adopted()."""
        return self._run(self._own.adopted(epoch), now)

    # ---- what happens to others --------------------------------------------------

    def receive(self, rank: int, message: FromNode, now: float) -> list[LeaderAction]:
        """A message of node `rank`; those of nodes that are out are ignored.

        Raises ZmoeError for one that no node can have sent.
        """
        return self._run(self._receive(rank, message, now), now)

    def ended(self, rank: int, reason: str, now: float) -> list[LeaderAction]:
        """The process of node `rank` has ended, or its link to the leader is gone for good.

        `reason` is the predicate of a sentence, such as "was killed by signal 9".
        """
        if rank not in self._nodes:
            self._returned.discard(rank)
            self._entering.discard(rank)
            return []
        return self._run(self._without({rank: reason}, now), now)

    def tick(self, now: float) -> list[LeaderAction]:
        """To be called now and then, once all messages that have come were handed over.

        Somebody may be silent for too long: but for the leader's own node, whose work ends by
        itself.
        """
        silent = sorted(self._waiting - {0})
        if now < self._deadline or not silent:
            return []
        late = f"did not {self.phase.value} in time"
        return self._run(self._without(dict.fromkeys(silent, late), now), now)

    def returned(self, rank: int, holding: Holding) -> None:
        """Node `rank`, which was out, is back, has loaded its weights, and waits for a view.

        Raises ZmoeError for a rank that never was one of the run's, or still is; ended() of its
        last process comes first.
        """
        if rank not in self._home or rank in self._nodes | self._entering | self._returned:
            raise ZmoeError(f"node {rank} cannot return: it is none of those that are out")
        holdings = {**self._stock.holdings, rank: holding}
        self._stock = replace(self._stock, holdings=holdings)
        self._returned.add(rank)

    @property
    def waiting_to_enter(self) -> tuple[int, ...]:
        """The nodes that have returned."""
        return tuple(sorted(self._returned))

    def admit(self, now: float) -> list[LeaderAction]:
        """Make a view with the nodes that have returned, where there are any.

        Their caches are empty, so the view is fresh: it is best made while no sequence runs.
        While a recovery is under way nothing happens.
        """
        if self.phase is not Phase.RUNNING or not self._returned:
            return []
        self._entering, self._returned = self._returned, set()
        return self._run(self._quiesce(now), now)

    # ---- phases -----------------------------------------------------------------

    def _run(self, actions: Sequence[LeaderAction | NodeAction], now: float) -> list[LeaderAction]:
        """`actions` without those between the leader and its own node, which are carried out."""
        queue, left = deque(actions), list[LeaderAction]()
        while queue:
            action = queue.popleft()
            if isinstance(action, Tell):
                queue.extend(self._receive(0, action.message, now))
            elif isinstance(action, Send) and action.rank == 0:
                queue.extend(self._own.receive(action.message, now))
            else:
                assert not isinstance(action, End)  # nobody evicts the leader
                left.append(action)
        return left

    def _receive(self, rank: int, message: FromNode, now: float) -> list[LeaderAction]:
        if self.phase is Phase.ENDED or rank not in self._nodes:
            return []
        if isinstance(message, Suspect):
            return self._suspected(rank, message, now)
        if message.epoch < self._epoch:
            return []
        expected = _ANSWERED_IN[type(message)] is self.phase and rank in self._waiting
        if message.epoch > self._epoch or not expected:
            raise self._unexpected(rank, message)
        if isinstance(message, Halted):
            self._done[rank] = message.done
        elif isinstance(message, Opened):
            self._endpoints[rank] = message.endpoint
        self._waiting.remove(rank)
        return self._go_on(now)

    def _suspected(self, rank: int, message: Suspect, now: float) -> list[LeaderAction]:
        evidence = message.epoch == self._epoch - 1 and self.phase is Phase.QUIESCE
        if message.epoch < self._epoch and not evidence:
            return []
        in_view = self.phase in (Phase.RUNNING, Phase.MESH, Phase.REPEAT)
        if message.epoch > self._epoch or (message.epoch == self._epoch and not in_view):
            raise self._unexpected(rank, message)
        if message.lost not in self.view.nodes or message.lost == rank:
            raise ZmoeError(f"node {rank} has lost node {message.lost}, which it never had")
        self._accusations.add((rank, message.lost))
        return [] if evidence else self._quiesce(now)

    def _without(self, gone: dict[int, str], now: float) -> list[LeaderAction]:
        """Go on without these nodes, by rank with the reason."""
        if self.phase is Phase.ENDED:
            return []
        actions = self._evict(gone)
        return actions + (self._go_on(now) if self.phase is Phase.QUIESCE else self._quiesce(now))

    def _evict(self, gone: dict[int, str]) -> list[LeaderAction]:
        actions: list[LeaderAction] = []
        for rank, reason in gone.items():
            self._nodes.remove(rank)
            self._waiting.discard(rank)
            self._done.pop(rank, None)
            self._removed = True
            actions += [Send(rank, Evicted(reason)), Evict(rank, reason)]
        return actions

    def _quiesce(self, now: float) -> list[LeaderAction]:
        self._epoch += 1
        self._enter(Phase.QUIESCE, now + self._patience.quiesce)
        return self._to_all(Quiesce(self._epoch))

    def _go_on(self, now: float) -> list[LeaderAction]:
        """To the next phase, once all have answered."""
        if self._waiting:
            return []
        if self.phase is Phase.QUIESCE:
            return self._make_view(now)
        if self.phase is Phase.OPEN:
            self._enter(Phase.MESH, now + self._patience.adopt)
            endpoints = tuple(self._endpoints[node] for node in self.view.nodes)
            return self._to_all(Mesh(self._epoch, endpoints))
        plans = self._log.after(self.view.base)
        if not plans:
            return self._resume()
        self._enter(Phase.REPEAT)
        return [Repeat(plans, self._log.known)]

    def _make_view(self, now: float) -> list[LeaderAction]:
        actions = self._evict(self._most_accused())
        self._fresh = self._fresh or not self._rewinds or bool(self._entering)
        base = self._log.last if self._fresh else self._log.go_back(self._done)
        self._nodes |= self._entering
        nodes = sorted(self._nodes)
        try:
            self.view, notices = self._next_view(nodes, base)
        except ZmoeError as error:
            return actions + self._give_up(error)
        if self._fresh:
            self._log.forget(base)
        self._done, self._removed, self._accusations = {}, False, set()
        self._endpoints, self._entering = {}, set()
        self._enter(Phase.OPEN, now + self._patience.open)
        return [*actions, *map(Notice, notices), *self._to_all(View(self.view))]

    def _next_view(self, nodes: Sequence[int], base: int) -> tuple[ClusterView, tuple[str, ...]]:
        """The view of these nodes, with notices for the user."""
        session = self._new_session()
        if self._divide is not None:
            return self.view.divided(session, nodes, base, self._divide(nodes)), ()
        hosts = [
            home if home in self._entering else host
            for home, host in zip(self._home, self.view.hosts)
        ]
        placed, notices = adopt(hosts, nodes, self._stock)
        return self.view.next(session, placed, nodes, base, self._fresh), notices

    def _most_accused(self) -> dict[int, str]:
        """Who goes although it answers, with the reason: nobody, where a death explains it all.

        The leader stays, so whoever loses it loses itself. Of two that are accused by as many, the
        higher rank goes.
        """
        if self._removed or not self._accusations:
            return {}
        accusers: defaultdict[int, set[int]] = defaultdict(set)
        for rank, lost in self._accusations:
            accusers[lost or rank].add(rank if lost else 0)
        worst = max(accusers, key=lambda rank: (len(accusers[rank]), rank))
        by = ", ".join(map(str, sorted(accusers[worst])))
        return {worst: f"and node {by} cannot reach each other"}

    def _resume(self) -> list[LeaderAction]:
        self._fresh = False
        self._enter(Phase.RUNNING)
        return [Resume(self.view)]

    def _give_up(self, error: ZmoeError) -> list[LeaderAction]:
        self._enter(Phase.ENDED)
        return [Halt(), GiveUp(error)]

    def _enter(self, phase: Phase, deadline: float = math.inf) -> None:
        """Wait for all nodes' answers, where there is a deadline."""
        self.phase, self._deadline = phase, deadline
        self._waiting = set(self._nodes) if deadline < math.inf else set()

    def _to_all(self, message: Quiesce | View | Mesh) -> list[LeaderAction]:
        return [Send(rank, message) for rank in sorted(self._nodes)]

    def _unexpected(self, rank: int, message: FromNode) -> ZmoeError:
        return ZmoeError(
            f"node {rank} sent {type(message).__name__} of epoch {message.epoch}; in epoch "
            f"{self._epoch} it was expected to {self.phase.value}"
        )
