"""The control links: a ROUTER at the leader, a DEALER at each worker.

libzmq's own heartbeats run beside compute, on its I/O threads, so a host that
hangs or vanishes breaks the link within seconds even while Python is busy.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from zmoe.cluster.messages import MAX_MESSAGE_BYTES, Message, MessageError, decode, encode
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.moe.sockets import heartbeat

_MOST_BAD = 1000  # messages dropped in a row: a flood of them must not hold us up
_IDENTITY = re.compile(rb"zmoe-([0-9]{1,3})")


def _configure(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 1000)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


class LeaderBus:
    """The leader's end. Bytes that are no message are counted in `dropped`, then forgotten."""

    def __init__(self, context: zmq.Context[Any], host: str, port: int) -> None:
        """Bind to `host` (an IPv4 address) and `port` (0: any). InputError when taken."""
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        _configure(self.socket)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self.socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.socket.close()
            raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        bound = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.host, self.port = host, int(bound.rsplit(":", 1)[1])
        self.dropped = 0
        self.step = 0  # the last one begun, for error messages

    def send(self, rank: int, message: Message) -> None:
        """Queue `message` for `rank`; a worker that is gone raises PeerError."""
        try:
            self.socket.send_multipart([b"zmoe-%d" % rank, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            raise PeerError(
                rank, None, self.step, f"cannot be reached ({error.strerror})"
            ) from error

    def receive(self, timeout: float) -> tuple[int, Message] | None:
        """The next (rank, message), or None after `timeout` seconds without one."""
        deadline = time.monotonic() + timeout
        for _ in range(_MOST_BAD):
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            if not self.socket.poll(left_ms):
                return None
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
            try:
                identity = _IDENTITY.fullmatch(parts[0])
                if identity is None or len(parts) != 2:
                    raise MessageError("not from a node")
                return int(identity.group(1)), decode(parts[1])
            except MessageError:
                self.dropped += 1
        return None

    def close(self) -> None:
        self.socket.close()


class WorkerBus:
    """A worker's end; connects to a leader that need not be there yet."""

    def __init__(self, context: zmq.Context[Any], leader: str, rank: int, grace: float) -> None:
        self.leader, self.grace = leader, grace
        self.handshakes = 0  # how often the link came up
        self.step = 0  # the last one begun, for error messages
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        _configure(self.socket)
        heartbeat(self.socket, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.ROUTING_ID, b"zmoe-%d" % rank)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 100)
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        self._monitor = self.socket.get_monitor_socket(events)
        self._broken_since: float | None = None
        try:
            self.socket.connect(f"tcp://{leader}")
        except zmq.ZMQError as error:
            self.close()
            raise InputError(f"--leader {leader}: {error.strerror}") from error

    def send(self, message: Message) -> None:
        """Queue `message` for the leader."""
        try:
            self.socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again as error:
            raise PeerError(0, None, self.step, "does not take messages") from error

    def wait(self, others: Sequence[zmq.Socket[Any]], timeout: float) -> None:
        """Sleep until this bus or one of `others` has something, at most `timeout` seconds."""
        poller = zmq.Poller()
        for socket in (self.socket, self._monitor, *others):
            poller.register(socket, zmq.POLLIN)
        poller.poll(max(0, int(timeout * 1000)))

    def take(self) -> Message | None:
        """The next message if one is there; PeerError when the leader's link is gone."""
        self._watch_link()
        while self.socket.poll(0):
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
            if len(parts) == 1:
                try:
                    return decode(parts[0])
                except MessageError as error:
                    raise ZmoeError(
                        f"leader {self.leader} sent bad control data: {error}"
                    ) from error
        if self._broken_since is not None and time.monotonic() - self._broken_since > self.grace:
            raise PeerError(0, None, self.step, f"(leader {self.leader}) is gone")
        return None

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after `timeout` seconds without one."""
        deadline = time.monotonic() + timeout
        while True:
            message = self.take()
            left = deadline - time.monotonic()
            if message is not None or left <= 0:
                return message
            self.wait((), min(left, self.grace))

    def _watch_link(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._broken_since = None
                self.handshakes += 1
            elif event == zmq.EVENT_DISCONNECTED and self._broken_since is None:
                self._broken_since = time.monotonic()

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
