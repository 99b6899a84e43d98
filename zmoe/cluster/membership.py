"""What a node does to enter a view of the cluster: listen, connect, load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zmoe.cluster.node import Node
from zmoe.errors import AbsentError, PeerError, ZmoeError
from zmoe.exchange.local import Endpoint
from zmoe.recovery.view import ClusterView

Listeners = tuple[Endpoint, ...]  # of the shards that a node hosts, ascending


class Halted(BaseException):
    """What this node was at is to be dropped: a recovery has begun. No Exception, which the loading
    of a model would take for a fault of the checkpoint.
    """


def open_view(node: Node, view: ClusterView) -> Listeners:
    """Leave the exchange, undo what follows the view's base, and listen for the view's nodes.

    Raises ZmoeError for a view of another run.
    """
    if bool(view.slices) != node.divides:
        raise ZmoeError(f"a view with {len(view.slices)} slices, of a run in another form")
    if view.slices:
        return node.divide(view.session, view.nodes, view.slices)
    if len(view.hosts) != node.nodes:
        raise ZmoeError(f"a view of {len(view.hosts)} shards in a run of {node.nodes} nodes")
    if view.fresh:
        node.forget()
    else:
        node.undo(view.base)
    endpoints = node.host(view.session, view.shards_of(node.rank))
    return tuple(endpoints[shard] for shard in sorted(endpoints))


def join_view(
    node: Node, view: ClusterView, listeners: Sequence[Any], tick: Callable[[], None]
) -> None:
    """Connect with the view's nodes, which listen there, and load what the view adds.

    `listeners`, Listeners each, are in the order of the view's nodes. `tick` is called now and
    then, and may raise. Raises PeerError, of one of its shards, for a node that cannot be reached.
    """
    by_shard = dict[int, Endpoint]()
    for rank, theirs in zip(view.nodes, listeners):
        by_shard.update(zip(view.shards_of(rank), theirs))
    if node.nodes > 1:
        if len(by_shard) != node.nodes:
            raise ZmoeError(f"listeners of {len(by_shard)} shards in a view of {node.nodes}")
        try:
            node.connect([by_shard[shard] for shard in range(node.nodes)], tick)
        except AbsentError as absent:
            raise PeerError(absent.ranks[0], None, view.base, "cannot be reached") from absent
    load = node.load if view.slices else node.adopt
    load(lambda done, total: tick())
