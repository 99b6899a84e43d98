"""A worker's end of the control links: a DEALER, see zmoe.cluster.bus."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from zmoe.cluster.bus import LINGER_MS, configure, readable
from zmoe.cluster.channel import Channel, ChannelError, Frame, Kind, is_framed, parse
from zmoe.cluster.messages import (
    MAX_MESSAGE_BYTES,
    Join,
    Message,
    Program,
    Setup,
    Stop,
    decode,
    encode,
)
from zmoe.codec import MessageError
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.exchange.keys import Pinned, connect_with, connect_with_token, mechanism_of
from zmoe.exchange.sockets import heartbeat

_FAILED_HANDSHAKES = 3  # in a row: no longer by chance
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class WorkerBus:
    """A worker's end; connects to a leader that need not be there yet, and joins it."""

    def __init__(
        self,
        context: zmq.Context[Any],
        leader: str,
        join: Join,
        grace: float,
        keys: Pinned | None = None,
        source: str = "",
    ) -> None:
        """`grace`: seconds that a broken link may take to come back. `keys`: this worker's and
        the leader's; without, the link is not encrypted. It comes from the IPv4 address `source`,
        "" for any of this machine's.
        """
        self.leader, self.grace, self._keys = leader, grace, keys
        self._has_token = bool(join.token)
        self._failed_handshakes = 0
        self.step = 0  # the last one begun, for error messages
        self._join = encode(join)
        self._channel: Channel | None = None  # from the leader's first message on
        self._down_since: float | None = None
        self.is_connected = False  # to a leader that has let us in
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        configure(self.socket, MAX_MESSAGE_BYTES, keys)
        if keys is not None:
            connect_with(self.socket, keys.own, keys.others[0])
        elif join.token:
            connect_with_token(self.socket, join.token)
        heartbeat(self.socket, MAX_MESSAGE_BYTES)
        # Another worker of this rank has another identity, and cannot take our place.
        identity = b"zmoe-%d-%s" % (join.rank, secrets.token_hex(8).encode())
        self.socket.setsockopt(zmq.ROUTING_ID, identity)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._monitor = self.socket.get_monitor_socket(_EVENTS)
        try:
            self.socket.connect(f"tcp://{source}:0;{leader}" if source else f"tcp://{leader}")
        except zmq.ZMQError as error:
            self.close()
            raise InputError(f"--leader {leader}: {error.strerror}") from error

    @property
    def has_session(self) -> bool:
        """Whether the leader has begun a run with us."""
        return self._channel is not None

    @property
    def session(self) -> int:
        """The leader's, once its first message is here."""
        assert self._channel is not None
        return self._channel.session

    def send(self, message: Message) -> None:
        """Send `message` to the leader, again after a broken link.

        Raises PeerError when the leader has long acknowledged nothing.
        """
        assert self._channel is not None
        try:
            self._channel.push(encode(message))
        except ChannelError as error:
            raise PeerError(0, None, self.step, str(error)) from error
        self._flush()

    def note(self, message: Message) -> None:
        """Send `message`, which is lost if the link breaks or is busy."""
        assert self._channel is not None
        self._write(self._channel.note(encode(message)))

    def wait(self, others: Sequence[zmq.Socket[Any]], timeout: float) -> None:
        """Sleep until this bus or one of `others` has something, at most `timeout` seconds."""
        poller = zmq.Poller()
        for socket in (self.socket, self._monitor, *others):
            poller.register(socket, zmq.POLLIN)
        poller.poll(max(0, int(timeout * 1000)))

    def take(self) -> Message | None:
        """The next message if one is there.

        Raises PeerError when the leader's link is gone, or another leader answers in
        its place; ZmoeError for what no leader can send.
        """
        self._watch_link()
        while readable(self.socket):
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
            try:
                message = self._read(parts[0]) if len(parts) == 1 else None
            except (MessageError, ChannelError) as error:
                raise ZmoeError(f"leader {self.leader} sent bad control data: {error}") from error
            if message is not None:
                return message
        if self._channel is not None:
            if self._down_since is not None and time.monotonic() - self._down_since > self.grace:
                raise self._lost("is gone")
            self._flush()
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

    def finish(self, timeout: float) -> None:
        """Wait until the leader has acknowledged all, or is gone; at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._channel is not None and self._channel.unacknowledged:
            left = deadline - time.monotonic()
            if left <= 0 or self._down_since is not None:
                return
            self.wait((), left)
            try:
                self.take()
            except ZmoeError:
                return

    def close(self) -> None:
        """Idempotent."""
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close(linger=LINGER_MS)

    def _read(self, data: bytes) -> Message | None:
        if not is_framed(data):
            refusal = decode(data)
            if not isinstance(refusal, Stop):
                raise MessageError(f"{type(refusal).__name__} outside of a session")
            if self._channel is not None:
                raise self._lost("is gone: another leader listens there")
            return refusal
        frame = parse(data)
        if self._channel is None:
            return self._begin(frame)
        if frame.session != self._channel.session:
            raise self._lost("is gone: the leader of another run listens there")
        body = self._channel.take(frame)
        message = None if body is None else decode(body)
        if isinstance(message, Stop):
            self._channel.acknowledge()
        self._flush()
        return message

    def _begin(self, frame: Frame) -> Message | None:
        """Take up the session of the leader's first message, Setup or Program."""
        if frame.kind is not Kind.MESSAGE or frame.number != 1:
            return None  # written before our link broke; all will be written again
        # Before the message is looked at: by this channel we say what is wrong with it.
        self._channel = Channel(frame.session, frame.epoch)
        self._channel.take(frame)
        self._channel.acknowledge()
        self._flush()
        message = decode(frame.body)
        if not isinstance(message, (Setup, Program, Stop)):
            raise MessageError(f"{type(message).__name__} before Setup")
        return message

    def _lost(self, why: str) -> PeerError:
        return PeerError(0, None, self.step, f"(leader {self.leader}) {why}")

    def _flush(self) -> None:
        assert self._channel is not None
        while (frame := self._channel.outgoing()) is not None and self._write(frame):
            self._channel.wrote()

    def _write(self, frame: bytes) -> bool:
        """Whether libzmq took it: its queue, which outlives connections, is not full."""
        try:
            self.socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def _watch_link(self) -> None:
        while readable(self._monitor):
            told = recv_monitor_message(self._monitor)
            event = told["event"]
            self.is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event == zmq.EVENT_DISCONNECTED:
                if self._down_since is None:
                    self._down_since = time.monotonic()
                continue
            if event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._check_handshake(event, told["value"])
                continue
            self._failed_handshakes = 0
            if self._channel is None:
                self._write(self._join)
            else:
                self._channel.reconnected()
            self._down_since = None

    def _check_handshake(self, event: int, value: int) -> None:
        """Raise InputError where a failed handshake, told by libzmq, means that keys or tokens
        differ.
        """
        keys = self._keys
        is_mismatch = value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self.has_session:
            ours = b"CURVE" if keys is not None else b"PLAIN" if self._has_token else b"NULL"
            is_mismatch = mechanism_of(self.leader) not in (b"", ours)
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and keys is not None:
            why = f"has refused this node, whose public key is {keys.own.public}"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and not self._has_token:
            why = "has refused this node, whose address is none of the run's"
        elif is_mismatch and keys is not None and not keys.is_users:
            why = "has no key, while this node has one"
        elif self._has_token and (is_mismatch or event == zmq.EVENT_HANDSHAKE_FAILED_AUTH):
            why = "is not the one that has started this node"
        elif is_mismatch:
            why = "takes only nodes with a key, or that it starts itself"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and keys is not None:
            self._failed_handshakes += 1  # or the leader has ended meanwhile
            if self._failed_handshakes < _FAILED_HANDSHAKES or self.has_session:
                return
            why = f"does not answer by the public key that this node expects, {keys.others[0]}"
            if keys.is_users:
                why = "has a key that this node lacks, or is another user's"
        else:
            return
        if self.has_session:
            raise self._lost(f"is gone: who listens there {why}")
        raise InputError(f"leader {self.leader} {why}")
