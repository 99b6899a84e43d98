"""Exchanges as others use them: of a cluster, of a single node, on their own.

`Exchange` (allreduce.py) is the Reducer of a run with peers, `SingleNode` that
of a run without; `join` and `local_group` are for numpy alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.errors import InputError, ZmoeError
from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.base import Call, Partial, nothing
from zmoe.exchange.buffers import DTYPES, wire_of
from zmoe.exchange.keys import KeyPair, is_loopback, read_key, user_key
from zmoe.exchange.sockets import Endpoint

__all__ = ["Endpoint", "Exchange", "SingleNode", "join", "local_group", "payload_bytes"]


class SingleNode:
    """The Reducer of a run with one node: no peers, no sockets."""

    rank = 0
    nodes = 1
    step = 0
    plan = 0

    def dispatch(
        self,
        call: Call,
        x: Any,
        x_dtype: mx.Dtype,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> None:
        """Does nothing: there are no other ranks."""

    def sum_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """`dtype`: nothing travels."""
        return dtype

    def takes_whole(self, call: Call) -> bool:
        """Yes: there is nothing to overlap with."""
        return True

    def all_reduce(
        self, call: Call, partial: Partial[mx.array], overlap: Callable[[], None] = nothing
    ) -> mx.array:
        """`partial` itself, (rows, width) of `call.dtype`; zeros for None."""
        mine = partial(0, call.rows) if callable(partial) else partial
        overlap()
        shape = (call.rows, call.width)
        if mine is None:
            return mx.zeros(shape, call.dtype)
        return mine.reshape(shape).astype(call.dtype)

    def all_reduce_host(
        self,
        call: Call,
        partial: Partial[npt.NDArray[np.float32]],
        out: npt.NDArray[np.float32],
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """Copies `partial`, unrounded, into `out`; both are (rows, width) float32."""
        mine = partial(0, call.rows) if callable(partial) else partial
        overlap()
        out[...] = 0 if mine is None else mine


def payload_bytes(rows: int, width: int, dtype: str, wire_dtype: str) -> int:
    """Bytes on the wire of (rows, width) partial sums in a model of `dtype`.

    `dtype` is MLX's name ("bfloat16"), `wire_dtype` that of the exchange. Raises
    InputError for a `wire_dtype` that is unknown.
    """
    wire = wire_of(wire_dtype)
    own = DTYPES[getattr(mx, dtype)]
    return (own if wire is None else wire).payload_bytes(rows, width)


# ---- on its own: numpy in, numpy out ---------------------------------------------


def join(
    rank: int,
    addresses: Sequence[str],
    *,
    key: KeyPair | str | os.PathLike[str] | None = None,
    insecure: bool = False,
    max_payload_bytes: int = 1 << 22,
    deadline_s: float = 30.0,
    tick: Callable[[], None] = nothing,
) -> Exchange:
    """Rank `rank` of a group at `addresses` ("host:port" by rank), connected.

    Each rank takes its port and the one after it. All must give the same list:
    it makes the session, so that groups do not mix. Blocks until all are there
    or raises LaunchError after `deadline_s`; `tick` is Exchange.connect's.

    `key`, or a file of zmoe-keys that holds it, is the same for all ranks and encrypts their
    links. Without it, ranks on this machine have to be of the same user; beyond it, only the
    addresses say who may connect. Raises InputError for a file that is none, and where an address
    is not of this machine and there is no key, unless `insecure` says so.
    """
    keys = key if key is None or isinstance(key, KeyPair) else read_key(os.fspath(key))
    endpoints = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise InputError(f'address "{address}": expected host:port')
        if keys is None and not insecure and not is_loopback(host):
            raise InputError(f'address "{address}": beyond this machine links need a key')
        endpoints.append(Endpoint(host, int(port), int(port) + 1, keys.public if keys else ""))
    if not 0 <= rank < len(endpoints):
        raise InputError(f"rank {rank} is not one of the {len(endpoints)} addresses")
    own = endpoints[rank]
    hosts = {endpoint.host for endpoint in endpoints}
    local = keys is None and all(map(is_loopback, hosts))
    secret = [user_key().secret] if local else []  # unlike addresses no stranger can know it
    session = hashlib.sha256("\n".join([*addresses, *secret]).encode()).digest()
    exchange = Exchange(
        rank,
        len(endpoints),
        session=int.from_bytes(session[:8], "little"),
        max_payload_bytes=max_payload_bytes,
        small_payload_bytes=1 << 16,
        bind_host=own.host,
        data_port=own.data_port,
        control_port=own.control_port,
        deadline_s=deadline_s,
        keys=keys,
        addresses=None if local or keys is not None else hosts,
    )
    try:
        exchange.connect(endpoints, deadline_s, tick)
        exchange.calibrate()
    except ZmoeError:
        exchange.close()
        raise
    return exchange


def local_group(
    nodes: int,
    *,
    max_payload_bytes: int = 1 << 22,
    deadline_s: float = 30.0,
    wire_dtype: str = "auto",
    algorithm: str = "auto",
    parts: int = 0,
) -> list[Exchange]:
    """`nodes` connected exchanges of this process, on loopback, one for each of its threads.

    They are not calibrated: each thread may call `calibrate`, all at the same time.
    Raises InputError for values out of range, LaunchError after `deadline_s`.
    """
    session = int.from_bytes(os.urandom(8), "little")
    group: list[Exchange] = []
    try:
        for rank in range(nodes):
            group.append(
                Exchange(
                    rank,
                    nodes,
                    session=session,
                    max_payload_bytes=max_payload_bytes,
                    small_payload_bytes=1 << 16,
                    deadline_s=deadline_s,
                    wire_dtype=wire_dtype,
                    algorithm=algorithm,
                    parts=parts,
                )
            )
        connect_group(group, [[exchange.endpoint for exchange in group]] * nodes, deadline_s)
    except ZmoeError:
        for exchange in group:
            exchange.close()
        raise
    return group


def connect_group(
    group: Sequence[Exchange], endpoints: Sequence[Sequence[Endpoint]], deadline_s: float
) -> None:
    """Connect exchanges that one thread has made: `endpoints[rank]` is how `rank` sees all ranks.

    Raises LaunchError, as Exchange.connect does.
    """
    for exchange, seen in zip(group, endpoints):
        exchange.start_connect(seen)

    def let_all_proceed() -> None:
        for exchange in group:
            exchange.native.links()

    for exchange, seen in zip(group, endpoints):
        exchange.finish_connect(seen, deadline_s, let_all_proceed)
