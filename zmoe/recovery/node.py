"""Any node's part in a recovery, the leader's own node included: a state machine."""

from __future__ import annotations

import math
from enum import Enum, auto

from zmoe.errors import PeerError, ZmoeError
from zmoe.recovery.actions import Connect, End, Halt, NodeAction, Open, Tell
from zmoe.recovery.messages import (
    Adopted,
    Evicted,
    FromLeader,
    Halted,
    Mesh,
    Opened,
    Quiesce,
    Suspect,
    View,
)
from zmoe.recovery.view import ClusterView


class State(Enum):
    """Of a node, in the usual order."""

    ENTERING = auto()  # started anew: waits for its first view
    RUNNING = auto()
    SUSPECTING = auto()  # has lost another node: waits for Quiesce
    HALTED = auto()  # waits for View
    OPENING = auto()
    OPENED = auto()  # waits for Mesh
    ADOPTING = auto()
    ENDED = auto()


_WAITING = (State.SUSPECTING, State.HALTED, State.OPENED)


class NodeRecovery:
    """Each method takes an event and returns what is to be done; `now` is in seconds, on any clock.

    `done` is the last step that this node has finished and kept.
    """

    def __init__(self, rank: int, view: ClusterView | None, silence: float) -> None:
        """`view`: the one in which the run began; None for a node that enters later. `silence`:
        how many seconds the leader may say nothing in a recovery.
        """
        self.rank, self.view = rank, view
        self.state = State.RUNNING if view is not None else State.ENTERING
        self.done = view.base if view is not None else 0
        self._epoch = view.epoch if view is not None else -1
        self._silence, self._deadline = silence, math.inf

    # ---- steps ------------------------------------------------------------------

    def takes(self, step: int) -> bool:
        """Whether to run this step, which the leader has sent. Raises ZmoeError for a wrong one.

        A node that waits for Quiesce drops what the leader sent before it knew.
        """
        if self.state is State.SUSPECTING:
            return False
        if self.state is not State.RUNNING or step <= self.done:
            raise ZmoeError(f"step {step} came after step {self.done}, {self._where()}")
        return True

    def finish(self, step: int) -> None:
        """`step` is done. Raises ZmoeError where none can be."""
        if self.state is not State.RUNNING or step <= self.done:
            raise ZmoeError(f"step {step} ended after step {self.done}, {self._where()}")
        self.done = step

    # ---- recovery ---------------------------------------------------------------

    def lost(self, lost: int, now: float) -> list[NodeAction]:
        """The exchange has lost the node `lost`, or cannot connect with it."""
        if self.state not in (State.RUNNING, State.ADOPTING):
            return []  # this is known, and under way
        self._wait(State.SUSPECTING, now)
        return [Halt(), Tell(Suspect(self._epoch, self.done, lost))]

    def receive(self, message: FromLeader, now: float) -> list[NodeAction]:
        """A message of the leader. Raises ZmoeError for one that it cannot have sent."""
        if self.state is State.ENDED:
            return []
        if isinstance(message, Evicted):
            return self._end(ZmoeError(f"node {self.rank} was evicted: {message.reason}"))
        if message.epoch < self._epoch:
            return []
        if isinstance(message, Quiesce):
            if self.view is None or message.epoch != self._epoch + 1:
                raise self._unexpected(message)
            self._epoch = message.epoch
            self._wait(State.HALTED, now)
            return [Halt(), Tell(Halted(self._epoch, self.done))]
        if isinstance(message, View):
            return self._take_view(message)
        if self.state is not State.OPENED or message.epoch != self._epoch:
            raise self._unexpected(message)
        assert self.view is not None
        found, expected = len(message.endpoints), len(self.view.nodes)
        if found != expected:
            raise ZmoeError(f"the leader sent {found} endpoints of {expected} nodes")
        self._work(State.ADOPTING)
        return [Connect(self.view, message.endpoints)]

    def _take_view(self, message: View) -> list[NodeAction]:
        view = message.view
        halted = self.state is State.HALTED and view.epoch == self._epoch
        if not halted and self.state is not State.ENTERING:
            raise self._unexpected(message)
        if self.rank not in view.nodes:
            raise ZmoeError(f"the leader sent node {self.rank} a view without it")
        if view.base > self.done and not view.fresh:
            raise ZmoeError(
                f"the leader lets all nodes keep step {view.base}, node {self.rank} has "
                f"finished step {self.done}"
            )
        self.view, self.done, self._epoch = view, view.base, view.epoch
        self._work(State.OPENING)
        return [Open(view)]

    def opened(self, epoch: int, endpoint: object, now: float) -> list[NodeAction]:
        """What Open of the view of `epoch` asked for is done: others may connect at `endpoint`."""
        if self.state is not State.OPENING or epoch != self._epoch:
            return []  # Quiesce came meanwhile
        self._wait(State.OPENED, now)
        return [Tell(Opened(epoch, endpoint))]

    def adopted(self, epoch: int) -> list[NodeAction]:
        """What Connect to the view of `epoch` asked for is done."""
        if self.state is not State.ADOPTING or epoch != self._epoch:
            return []
        self._work(State.RUNNING)
        return [Tell(Adopted(epoch))]

    def tick(self, now: float) -> list[NodeAction]:
        """To be called now and then: the leader may be silent for too long."""
        if now < self._deadline:
            return []
        reason = f"said nothing for {self._silence:g} s in a recovery"
        return self._end(PeerError(0, None, self.done, reason))

    # ---- states -----------------------------------------------------------------

    def _wait(self, state: State, now: float) -> None:
        """For the leader."""
        assert state in _WAITING
        self.state, self._deadline = state, now + self._silence

    def _work(self, state: State) -> None:
        """At something that has its own deadline, here or at the leader."""
        self.state, self._deadline = state, math.inf

    def _end(self, error: ZmoeError) -> list[NodeAction]:
        self._work(State.ENDED)
        return [Halt(), End(error)]

    def _where(self) -> str:
        return f"when node {self.rank} was {self.state.name.lower()} in epoch {self._epoch}"

    def _unexpected(self, message: Quiesce | View | Mesh) -> ZmoeError:
        return ZmoeError(
            f"the leader sent {type(message).__name__} of epoch {message.epoch} {self._where()}"
        )
