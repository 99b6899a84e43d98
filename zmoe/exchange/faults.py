"""From a failed call of the C exchange to the exception that names the peer."""

from __future__ import annotations

import os

from zmoe.errors import DivergenceError, PeerError, ZmoeError
from zmoe.exchange.native import Fault
from zmoe.native import Status


def error_of(
    status: int, fault: Fault, rank: int, step: int, layer: int | None, deadline_s: float
) -> ZmoeError:
    """The exception for a `status` other than OK.

    `rank` is ours, at `step` and `layer` (None: between layers); `deadline_s` is how
    long it has waited. Returns PeerError, DivergenceError or ZmoeError.
    """
    if status == Status.PEER:
        return PeerError(fault.lost[0], layer, step, "was lost", fault.lost[1:])
    if status == Status.TIMEOUT:
        others = ", ".join(str(r) for r in fault.missing[1:])
        others = f" (nor did {others})" if others else ""
        reason = f"sent nothing within {deadline_s:g} s{others}"
        return PeerError(fault.missing[0], layer, step, reason)
    if status == Status.DIVERGED:
        return _divergence(fault, rank)
    if status == Status.FORK:
        return ZmoeError(
            "this process was forked from the one that opened the exchange, and cannot use it"
        )
    where = "between layers" if layer is None else f"at layer {layer}, step {step}"
    if status == Status.POOL and fault.missing:
        reason = f"has not taken our frames for {deadline_s:g} s"
        return PeerError(fault.missing[0], layer, step, reason)
    if status == Status.POOL:
        return ZmoeError(f"no send buffer became free within {deadline_s:g} s {where}")
    if status == Status.ZMQ:
        return ZmoeError(f"ZeroMQ failed {where}: {os.strerror(fault.zmq_errno)}")
    return ZmoeError(f"the exchange failed {where}: {Status(status).name}")


def _divergence(fault: Fault, rank: int) -> DivergenceError:
    theirs = fault.theirs
    same = (theirs.step, theirs.layer) == (fault.step, fault.layer)
    what = "has another plan, routing, shape, dtype or algorithm" if same else "is elsewhere"
    return DivergenceError(
        f"rank {fault.diverged[0]} {what}: layer {theirs.layer}, step {theirs.step}; "
        f"rank {rank} is at layer {fault.layer}, step {fault.step}"
    )
