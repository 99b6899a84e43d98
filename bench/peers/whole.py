"""Figures are those of all nodes of a cluster, or none: where a node is lost, a program ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec
from zmoe.errors import ZmoeError


def whole_cluster(model: str, spec: ClusterSpec) -> Cluster:
    """A Cluster that goes on without no node: it raises ZmoeError where one is lost, also one that
    would come back.
    """

    def refuse(line: str) -> None:
        if cluster.hosts != tuple(range(spec.nodes)):
            raise ZmoeError(f"a node was lost, so nothing is measured: {line}")

    cluster = Cluster(model, spec=spec, on_notice=refuse)
    return cluster


def check_whole(status: Mapping[str, Any]) -> None:
    """Raise ZmoeError where the server that answers so to GET /v1/cluster has ever lost a node."""
    drops = status.get("counts", {}).get("exchange", {}).get("link_drops", 0)
    if drops or status["restarts"]:
        raise ZmoeError(
            f"a node was lost, so nothing is measured: {drops} links of the server's leader broke, "
            f"and its cluster was started again {status['restarts']} times"
        )
