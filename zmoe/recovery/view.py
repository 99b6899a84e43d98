"""Who is alive and who hosts what, as the leader decided it last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zmoe.errors import SettingError

MOST_NODES = 64
MOST_SESSION = 2**63 - 1

Slices = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ClusterView:
    """One membership of a run; only the leader makes views, one for each epoch.

    epoch: rises by one from view to view.
    session: a fresh random number, which the frames of this view's exchange carry; frames of
        a node that was left behind carry another one.
    hosts: shard -> the rank of the node that computes it. A shard is what one node owned at the
        start of the run. It never changes, so neither do the bits of any sum.
    nodes: the ranks of all living nodes, ascending, the leader's 0 first.
    base: the last step whose effects every node keeps; 0 before the first one.
    fresh: no node keeps any sequence: caches are dropped, and the leader prefills again.
    slices: where the weights are divided anew for each view, as many as there are nodes: the range
        of every expert's hidden dimension that each of them computes. Then a shard is what one node
        owns in this view, and `hosts` are the `nodes`. Else there are none.

    Raises SettingError, naming the field, for a view that is none.
    """

    epoch: int
    session: int
    hosts: tuple[int, ...]
    nodes: tuple[int, ...]
    base: int
    fresh: bool = False
    slices: Slices = ()

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise SettingError("epoch", f"is {self.epoch}: expected 0 or more")
        if not 0 <= self.session <= MOST_SESSION:
            raise SettingError("session", f"is {self.session}: expected 0 to {MOST_SESSION}")
        if not 1 <= len(self.nodes) <= MOST_NODES:
            raise SettingError("nodes", f"has {len(self.nodes)} nodes: expected 1 to {MOST_NODES}")
        if self.nodes[0] != 0 or list(self.nodes) != sorted(set(self.nodes)):
            raise SettingError("nodes", f"is {self.nodes}: expected ascending ranks from 0 on")
        if not 1 <= len(self.hosts) <= MOST_NODES:
            raise SettingError("hosts", f"has {len(self.hosts)} shards: expected 1 to {MOST_NODES}")
        for shard, host in enumerate(self.hosts):
            if host not in self.nodes:
                raise SettingError("hosts", f"gives shard {shard} to node {host}, which is gone")
        if self.base < 0:
            raise SettingError("base", f"is {self.base}: expected 0 or more")
        if self.slices and not (self.fresh and len(self.slices) == len(self.nodes)):
            raise SettingError(
                "slices", f"has {len(self.slices)} of {len(self.nodes)} nodes in a fresh view"
            )
        if self.slices and self.hosts != self.nodes:
            raise SettingError("hosts", f"is {self.hosts}: expected the nodes {self.nodes}")

    def shards_of(self, node: int) -> tuple[int, ...]:
        """The shards that `node` hosts, ascending."""
        return tuple(shard for shard, host in enumerate(self.hosts) if host == node)

    def next(
        self, session: int, hosts: Sequence[int], nodes: Sequence[int], base: int, fresh: bool
    ) -> ClusterView:
        """The view of the next epoch, with as many shards. Raises SettingError."""
        if len(hosts) != len(self.hosts):
            raise SettingError("hosts", f"has {len(hosts)} shards: expected {len(self.hosts)}")
        if session == self.session:
            raise SettingError("session", "is that of the view before: expected a fresh one")
        return ClusterView(self.epoch + 1, session, tuple(hosts), tuple(nodes), base, fresh)

    def divided(self, session: int, nodes: Sequence[int], base: int, slices: Slices) -> ClusterView:
        """The next epoch's view, in which `nodes` divide the weights anew. Raises SettingError."""
        everyone = tuple(nodes)
        return ClusterView(self.epoch + 1, session, everyone, everyone, base, True, slices)


def first_view(nodes: int, session: int) -> ClusterView:
    """The view with which a run of `nodes` nodes begins: each hosts the shard of its rank."""
    everyone = tuple(range(nodes))
    return ClusterView(epoch=0, session=session, hosts=everyone, nodes=everyone, base=0)
