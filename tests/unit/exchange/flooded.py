"""A process whose listening sockets a stranger floods; says "alive" at the end."""

from __future__ import annotations

import os
import socket
import struct
import time

import zmq

from zmoe.cluster.bus import LeaderBus
from zmoe.exchange import sockets
from zmoe.exchange.local import Exchange

PATIENCE_S = 60.0
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def flood_and_reset(port: int, kind: bytes, message: bytes) -> None:
    """A peer that sends more than the high-water mark lets in, and dies."""
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as end:
        end.sendall(GREETING + b"\x04" + bytes([len(body)]) + body)
        end.recv(len(GREETING) + 2, socket.MSG_WAITALL)  # the handshake is over
        end.sendall((bytes([0, len(message)]) + message) * 2000)
        time.sleep(0.2)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


if __name__ == "__main__":
    sockets.HEARTBEAT_MS = 50
    exchange = Exchange(0, 2, session=1, max_payload_bytes=1000, small_payload_bytes=100)
    bus = LeaderBus(zmq.Context(), "127.0.0.1", 0, session=1, nodes=2, grace=60.0)
    flood_and_reset(exchange.endpoint.control_port, b"DEALER", b"a")
    flood_and_reset(exchange.endpoint.data_port, b"SUB", b"\1a")
    flood_and_reset(bus.port, b"DEALER", b"a")
    time.sleep(1)  # several heartbeats
    print("alive", flush=True)
    os._exit(0)
