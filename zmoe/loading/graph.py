"""Whether a run's exchanges are operations of MLX's graph, and by which backend."""

from __future__ import annotations

import os
from collections.abc import Sequence

import mlx.core as mx

from zmoe.config import EngineConfig
from zmoe.errors import SettingError
from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.groups import Door, has_other_library, join_backend
from zmoe.families.sites import Site
from zmoe.loading.load import DTYPES
from zmoe.moe.experts import gathers
from zmoe.moe.graph import Graph
from zmoe.placement.types import ModelInfo, Placement

_RDMA_DEVICES = "MLX_IBV_DEVICES"  # the file that says which of them lead to which rank


def make_graph(
    info: ModelInfo,
    placement: Placement,
    sites: Sequence[Site],
    exchange: Exchange | None,
    config: EngineConfig,
    records: bool,
) -> tuple[Graph | None, tuple[str, ...]]:
    """The graph of a node that computes with MLX, and lines for the user.

    None where its MoE layers are evaluated one by one: with whole experts, for what MLX
    cannot gather, or where a node `records` the routing or has another MPI library. All nodes
    decide alike, and call this at the same time, once they are connected. Raises SettingError
    where `config` asks for a backend that cannot be had.
    """
    reason = _what_speaks_against(info, placement, sites, config)
    if exchange is None or reason:
        if config.backend not in ("auto", "zmq"):
            reason = reason or "there is one node"
            raise SettingError("backend", f"is {config.backend}: expected auto, as {reason}")
        return None, ()
    facts = (records, has_other_library(), not _has_rdma())
    recorders, libraries, no_rdma = (
        set(ranks.nonzero()[0].tolist()) for ranks in exchange.tell(facts).T
    )
    backend = config.backend
    if backend == "auto":
        backend = "zmq" if no_rdma else "jaccl"
    if recorders:
        if config.backend not in ("auto", "zmq"):
            raise SettingError("backend", f"is {backend}: expected auto, as routing is recorded")
        return None, ()
    if backend == "zmq" and libraries:
        ranks = ", ".join(map(str, sorted(libraries)))
        return None, (
            f"MLX_MPI_LIBNAME is set on node {ranks}: MoE layers are evaluated one by one",
        )
    groups = Door(exchange) if backend == "zmq" else join_backend(backend, exchange)
    dtype = exchange.sum_dtype(DTYPES[info.dtype])
    return Graph(groups, len(sites), dtype), ()


def _what_speaks_against(
    info: ModelInfo, placement: Placement, sites: Sequence[Site], config: EngineConfig
) -> str:
    """Why this run cannot have a graph, the same on every node; "" for nothing."""
    everything = tuple(range(info.experts))
    if config.schedule != "decentralized" or config.policy != "selected":
        return "the schedule or the policy needs the routing on the host"
    if not placement.slices or any(ids != everything for layer in placement.owned for ids in layer):
        return "the nodes hold whole experts (--placement slices)"
    if len(set(placement.slices)) < placement.nodes:
        return "slices have copies"
    if not all(gathers(site.switch, DTYPES[info.dtype]) for site in sites):
        return f"MLX gathers no {info.dtype} on this device"
    return ""


def _has_rdma() -> bool:
    return _RDMA_DEVICES in os.environ and mx.distributed.is_available("jaccl")
