"""In which form MLX computes the MoE layers of a run, and which backend carries exchanges."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import mlx.core as mx

from zmoe.config import EngineConfig
from zmoe.errors import SettingError
from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.groups import Door, backend_joined, can_open_door, join_backend
from zmoe.families.sites import Site
from zmoe.loading.load import DTYPES
from zmoe.moe.experts import gathers
from zmoe.moe.graph import Form, Graph
from zmoe.perf.cost import may_be_in_graph
from zmoe.placement.types import ModelInfo, Placement

RECORDED = "the routing is recorded"  # as a reason
_RDMA_DEVICES = "MLX_IBV_DEVICES"  # the file that says which of them lead to which rank


def form_of(
    info: ModelInfo,
    placement: Placement,
    sites: Sequence[Site],
    exchange: Exchange | None,
    config: EngineConfig,
    *,
    on_mlx: bool,
    records: bool,
) -> Form:
    """How a node computes its MoE layers, of which `sites` are the blocks.

    In a graph if all nodes compute slices `on_mlx` and none `records` the routing or has
    another MPI library. All nodes decide alike: they call this at the same time, once they are
    connected. Raises SettingError where `config` asks for a backend that cannot be had.
    """
    reason = why_evaluated(info, sites, config, on_mlx=on_mlx)
    if exchange is None:
        _refuse(config, reason or "there is one node")
        return Form(as_it_is=not (reason or records))
    reason = reason or placement.unsliced
    if reason:
        _refuse(config, reason)
        return Form()
    told = exchange.tell((records, not can_open_door(), _has_rdma())).astype(bool)
    recorders, without_door, rdma = told.T
    if recorders.any():
        _refuse(config, RECORDED)
        return Form()
    backend = config.backend
    if backend == "auto":
        must_zmq = exchange.is_encrypted or exchange.ports is not None
        may_rdma = rdma.all() and exchange.wire is None and not must_zmq
        backend = "jaccl" if may_rdma else "zmq"
    if backend == "zmq" and without_door.any():
        nodes = ", ".join(map(str, without_door.nonzero()[0]))
        reason = (
            f"on node {nodes} MLX_MPI_LIBNAME is set, or another run of the same process "
            "exchanges in MLX's graph"
        )
        _refuse(config, reason)
        return Form(notices=(f"MoE layers are evaluated one by one: {reason}",))
    groups = Door(exchange, _patience_s()) if backend == "zmq" else join_backend(backend, exchange)
    dtype = exchange.sum_dtype(DTYPES[info.dtype])
    graph = Graph(groups, len(sites), info.vocabulary, dtype)
    return Form(graph, cuts_attention=config.attention == "sharded")


def _patience_s() -> float:
    """How long a pass may wait within a graph: macOS ends what keeps a GPU waiting for 5 s."""
    return 3.0 if mx.metal.is_available() else math.inf


def _refuse(config: EngineConfig, reason: str) -> None:
    """Raise SettingError for what only exchanges in MLX's graph have."""
    if config.attention != "replicated":
        raise SettingError("attention", f"is {config.attention}: expected replicated, as {reason}")
    if config.backend not in ("auto", "zmq"):
        raise SettingError("backend", f"is {config.backend}: expected auto, as {reason}")


def why_evaluated(
    info: ModelInfo, sites: Sequence[Site], config: EngineConfig, *, on_mlx: bool
) -> str:
    """Why no placement has the layers, of which `sites` are the blocks, computed in MLX's graph;
    "" if one may. It is the same on all nodes.
    """
    if not on_mlx:
        return "MLX does not compute"
    if not may_be_in_graph(config.schedule, config.policy):
        return "the schedule or the policy needs the routing on the host"
    if not all(gathers(site.switch, DTYPES[info.dtype]) for site in sites):
        return f"MLX's gathering matmuls take no {info.dtype} on this device"
    return ""


def _has_rdma() -> bool:
    is_there = _RDMA_DEVICES in os.environ and mx.distributed.is_available("jaccl")
    return is_there and not backend_joined()
