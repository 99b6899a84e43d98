"""Which node adopts a shard whose host is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zmoe.errors import ZmoeError


@dataclass(frozen=True)
class Holding:
    """What a node brings to adoptions.

    free: bytes that it has left beside the weights that it loaded at its start.
    held: shard -> bytes of it among these weights: all of its own, parts of others' replicas.
    disk: the shards that it can read from its disk.
    """

    free: int
    held: Mapping[int, int]
    disk: tuple[int, ...]


@dataclass(frozen=True)
class Stock:
    """What there is to adopt, and who has what of it.

    sizes: bytes of each shard. holdings: by rank. mapped: weights are mapped from the checkpoint,
    as on a CPU, so that a node may host more than it has memory for, and reads again what it
    lacks; else, as on MLX, all weights must fit.
    """

    sizes: tuple[int, ...]
    holdings: Mapping[int, Holding]
    mapped: bool

    def missing(self, node: int, shard: int) -> int:
        """Bytes of `shard` that `node` would have to read."""
        return max(0, self.sizes[shard] - self.holdings[node].held.get(shard, 0))

    def room(self, node: int, hosts: Sequence[int]) -> int:
        """Bytes that `node` has left where shards are hosted so; negative: bytes that it lacks."""
        hosted = [shard for shard, host in enumerate(hosts) if host == node]
        return self.holdings[node].free - sum(self.missing(node, shard) for shard in hosted)


def adopt(
    hosts: Sequence[int], nodes: Sequence[int], stock: Stock
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`hosts` (shard -> rank) with each shard whose host is not among `nodes` given to one of them.

    The largest shard is given first. It goes to a node that has room for it, if there is one;
    among these to the one that holds most of it, then to the one that hosts fewest shards, then
    to the one with most room left, then to the lowest rank. Returns the hosts, and a notice for
    each adopter without room.

    Raises ZmoeError where nobody can read a shard, and, unless weights are mapped, where nobody
    has room for one.
    """
    placed, notices = list(hosts), []
    lost = [shard for shard, host in enumerate(hosts) if host not in nodes]
    for shard in sorted(lost, key=lambda shard: (-stock.sizes[shard], shard)):
        able = [
            node
            for node in nodes
            if shard in stock.holdings[node].disk or not stock.missing(node, shard)
        ]
        if not able:
            raise ZmoeError(
                f"shard {shard}, which node {hosts[shard]} hosted, is on no other node's disk"
            )

        def rank(node: int, shard: int = shard) -> tuple[bool, int, int, int, int]:
            missing, room = stock.missing(node, shard), stock.room(node, placed)
            return missing > max(room, 0), missing, placed.count(node), -room, node

        best = min(able, key=rank)
        missing, room = stock.missing(best, shard), stock.room(best, placed)
        if missing > max(room, 0):
            lack = missing - max(room, 0)
            if not stock.mapped:
                raise ZmoeError(
                    f"no node has room for shard {shard}, which node {hosts[shard]} hosted: "
                    f"node {best} lacks {lack} bytes"
                )
            notices.append(
                f"node {best} adopts shard {shard} with {lack} bytes too little memory, "
                "and will read them from disk again and again"
            )
        placed[shard] = best
    return tuple(placed), tuple(notices)
