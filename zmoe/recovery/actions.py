"""What the state machines want done by whoever runs them, in the order given."""

from __future__ import annotations

from dataclasses import dataclass

from zmoe.errors import ZmoeError
from zmoe.recovery.log import Numbered
from zmoe.recovery.messages import FromLeader, FromNode
from zmoe.recovery.view import ClusterView

# ---- of every node --------------------------------------------------------------


@dataclass(frozen=True)
class Halt:
    """Drop the step, or the connecting or loading, that is under way."""


@dataclass(frozen=True)
class Open:
    """Close the exchange, undo what follows the view's base, listen anew; then call opened().

    Where the view is fresh, drop all sequences instead.
    """

    view: ClusterView


@dataclass(frozen=True)
class Connect:
    """Connect with the view's nodes at `endpoints` and load what the view adds; call adopted().

    Whoever cannot reach a node calls lost() instead.
    """

    view: ClusterView
    endpoints: tuple[object, ...]


@dataclass(frozen=True)
class Tell:
    """Send `message` to the leader."""

    message: FromNode


@dataclass(frozen=True)
class End:
    """This node's part in the run is over, because of `error`."""

    error: ZmoeError


# ---- of the leader --------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send `message` to the node `rank`."""

    rank: int
    message: FromLeader


@dataclass(frozen=True)
class Evict:
    """The node `rank` is out: let go of its link and its process, once Evicted is sent."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Notice:
    """Show the user this line."""

    text: str


@dataclass(frozen=True)
class Repeat:
    """Run these plans again, in order, on all nodes, and call finish() after each.

    The results of those up to step `known` have been used before, and are dropped.
    """

    plans: tuple[Numbered, ...]
    known: int


@dataclass(frozen=True)
class Resume:
    """The run goes on in `view`; where that is fresh, every sequence is prefilled again."""

    view: ClusterView


@dataclass(frozen=True)
class GiveUp:
    """The run is over, because of `error`."""

    error: ZmoeError


NodeAction = Halt | Open | Connect | Tell | End
LeaderAction = Halt | Open | Connect | Send | Evict | Notice | Repeat | Resume | GiveUp
