"""What the leader and the other nodes say to each other in a recovery.

Who sends a message is known by its link. Links keep the order of messages and lose none, unless
they break for good. An endpoint is whatever tells the other nodes where one listens; it is only
passed on here.
"""

from __future__ import annotations

from dataclasses import dataclass

from zmoe.recovery.view import ClusterView

# ---- node to leader -------------------------------------------------------------


@dataclass(frozen=True)
class Suspect:
    """I have lost the node `lost` in the view of `epoch`, after I had finished `step`."""

    epoch: int
    step: int
    lost: int


@dataclass(frozen=True)
class Halted:
    """I have stopped for `epoch`; `done` is the last step that I have finished."""

    epoch: int
    done: int


@dataclass(frozen=True)
class Opened:
    """I listen at `endpoint` for the nodes of the view of `epoch`."""

    epoch: int
    endpoint: object


@dataclass(frozen=True)
class Adopted:
    """I am connected with all nodes of the view of `epoch`, and have loaded all that I host."""

    epoch: int


# ---- leader to node -------------------------------------------------------------


@dataclass(frozen=True)
class Quiesce:
    """Stop what you are at, and say how far you are: the view of `epoch` is being made."""

    epoch: int


@dataclass(frozen=True)
class View:
    """Close your exchange, go back to the view's base, and listen for the nodes of the view."""

    view: ClusterView

    @property
    def epoch(self) -> int:
        """That of the view."""
        return self.view.epoch


@dataclass(frozen=True)
class Mesh:
    """The endpoints of the view of `epoch`, in the order of its nodes: connect, and adopt."""

    epoch: int
    endpoints: tuple[object, ...]


@dataclass(frozen=True)
class Evicted:
    """You are no longer part of the run."""

    reason: str


FromNode = Suspect | Halted | Opened | Adopted
FromLeader = Quiesce | View | Mesh | Evicted
