"""zmoe-node, which from SIGUSR1 on tells the others of another routing than it has."""

from __future__ import annotations

import signal
import sys

import mlx.core as mx

from zmoe.cli import node
from zmoe.moe.graph import Graph

_sum = Graph.sum
_is_astray = False


def stray(*_: object) -> None:
    global _is_astray
    _is_astray = True


def sum_astray(graph: Graph, layer: int, partial: mx.array, ids: mx.array) -> mx.array:
    return _sum(graph, layer, partial, mx.zeros_like(ids) if _is_astray else ids)


if __name__ == "__main__":
    setattr(Graph, "sum", sum_astray)  # noqa: B010 (a method that mypy lets nobody assign to)
    signal.signal(signal.SIGUSR1, stray)
    sys.exit(node.main(sys.argv[1:]))
