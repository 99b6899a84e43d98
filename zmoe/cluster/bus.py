"""The control links: a ROUTER at the leader, a DEALER at each worker.

Every message of a session goes through a Channel, so a link that breaks and comes
back loses nothing. libzmq's own heartbeats run beside compute, on its I/O threads,
so a host that hangs or vanishes breaks the link within seconds even while Python
is busy.

Strangers are refused in the handshake, for which they have HANDSHAKE_MS, by zmoe.exchange.keys:
workers show a key, or the token of one that the leader starts, or come from the address of a node.
That has to be, as libzmq bounds nothing behind it: its high-water marks count whole messages, and
it has no limit on a message's parts. Who gets that far can also end the process, by the assertion
that zmoe.exchange.sockets tells of.
"""

from __future__ import annotations

from typing import Any

import zmq

from zmoe.exchange.keys import CURVE_BYTES, Pinned
from zmoe.exchange.sockets import HANDSHAKE_MS

FAREWELL_S = 3.0  # how long an end waits for the other to acknowledge its last words
LINGER_MS = 500


def configure(socket: zmq.Socket[bytes], message_bytes: int, keys: Pinned | None) -> None:
    """Bound what a socket holds, and how long strangers have; which is encrypted with `keys`."""
    message_bytes += CURVE_BYTES if keys is not None else 0
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 100)
    socket.setsockopt(zmq.MAXMSGSIZE, message_bytes)
    socket.setsockopt(zmq.IPV6, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def readable(socket: zmq.Socket[Any]) -> bool:
    """Like socket.poll(0), at a fifth of the time."""
    events = socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)
