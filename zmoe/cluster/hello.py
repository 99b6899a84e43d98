"""What nodes tell of themselves before a run, and whether they can share one."""

from __future__ import annotations

import os

from zmoe.cluster.messages import Hello
from zmoe.config import Timing
from zmoe.errors import MismatchError
from zmoe.exchange.keys import is_loopback
from zmoe.exchange.local import Endpoint
from zmoe.kernels.arithmetic import Arithmetic
from zmoe.kernels.threads import best_isa_name
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import ModelInfo


def hello_of(
    info: ModelInfo, arithmetic: Arithmetic, offer: NodeResources, endpoint: Endpoint
) -> Hello:
    """What a node tells the leader about itself."""
    return Hello(
        fingerprint=info.fingerprint,
        dtype=info.dtype,
        quantization=info.quantization,
        isa=best_isa_name(),
        arithmetic=arithmetic,
        resources=offer,
        endpoint=endpoint,
    )


def hello_patience(model: str, timing: Timing) -> float:
    """Seconds for all nodes to say hello: they may first have to download a model's files."""
    return timing.join if os.path.isabs(model) else timing.load


def check_hello(mine: Hello, theirs: Hello, name: str, schedule: str) -> None:
    """Raise MismatchError, naming both sides, for the first thing that differs."""
    for field, what in (
        ("dtype", "dtype"),
        ("quantization", "quantisation"),
        ("fingerprint", "another model: fingerprint"),
    ):
        ours, other = getattr(mine, field), getattr(theirs, field)
        if ours != other:
            raise MismatchError(f"{name} has {what} {other}, the leader {ours}")
    if schedule == "decentralized":
        _check_rounding(mine.arithmetic, theirs.arithmetic, name)
    if is_loopback(theirs.endpoint.host) and not is_loopback(mine.endpoint.host):
        raise MismatchError(
            f"{name} listens on {theirs.endpoint.host} only, the leader on {mine.endpoint.host}: "
            "start that zmoe-node with --bind ADDRESS"
        )


def _check_rounding(mine: Arithmetic, theirs: Arithmetic, name: str) -> None:
    """Nodes that each route for themselves must round alike, or part in mid-text.

    Instruction sets may differ: the kernels round alike on the best that all have.
    Two CPUs are compared by what they compute, since MLX is the same code on both.
    """
    both_cpus = mine.device.startswith("cpu") and theirs.device.startswith("cpu")
    device = [] if both_cpus else [("device", "computes on")]
    for field, what in (
        *device,
        ("compute", "multiplies matrices with --compute"),
        ("mlx", "runs mlx"),
        ("mlx_lm", "runs mlx-lm"),
        ("probe", f"rounds otherwise on {theirs.device}: digest"),
    ):
        ours, other = getattr(mine, field), getattr(theirs, field)
        if ours != other:
            raise MismatchError(
                f"{name} {what} {other}, the leader {ours}: nodes that round differently "
                "cannot share a run, unless with --schedule centralized"
            )
