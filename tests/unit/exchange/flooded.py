"""A process whose listening sockets a stranger floods; says "alive" at the end."""

from __future__ import annotations

import os
import socket
import struct
import time

import zmq

from zmoe.cluster.leader_bus import LeaderBus
from zmoe.exchange import sockets
from zmoe.exchange.local import Exchange

PATIENCE_S = 60.0
SESSION = 1


def command(name: bytes, body: bytes) -> bytes:
    """A command of ZMTP 3.1."""
    content = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(content)]) + content


def flood_and_reset(port: int, kind: bytes, message: bytes, mechanism: bytes) -> None:
    """A peer that sends more than the high-water mark lets in, and dies."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)
    about = b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as end:
        end.sendall(greeting)
        end.recv(len(greeting), socket.MSG_WAITALL)
        if mechanism == b"PLAIN":
            end.sendall(command(b"HELLO", b"\x04zmoe\x10%016x" % SESSION))
            assert b"WELCOME" in end.recv(100)
            end.sendall(command(b"INITIATE", about))
        else:
            end.sendall(command(b"READY", about))
        assert b"READY" in end.recv(1000)  # the handshake is over
        end.sendall((bytes([0, len(message)]) + message) * 2000)
        time.sleep(0.2)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


if __name__ == "__main__":
    sockets.HEARTBEAT_MS = 50
    exchange = Exchange(0, 2, session=SESSION, max_payload_bytes=1000, small_payload_bytes=100)
    bus = LeaderBus(zmq.Context(), "127.0.0.1", 0, session=SESSION, nodes=2, grace=60.0)
    flood_and_reset(exchange.endpoint.control_port, b"DEALER", b"a", b"PLAIN")
    flood_and_reset(exchange.endpoint.data_port, b"SUB", b"\1a", b"PLAIN")
    flood_and_reset(bus.port, b"DEALER", b"a", b"NULL")
    time.sleep(1)  # several heartbeats
    print("alive", flush=True)
    os._exit(0)
