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

import hmac
import math
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from zmoe.cluster.channel import Channel, ChannelError, Frame, Kind, is_framed, parse
from zmoe.cluster.messages import (
    MAX_MESSAGE_BYTES,
    MAX_REPORT_BYTES,
    Failed,
    Join,
    Message,
    Program,
    Setup,
    Stop,
    decode,
    encode,
)
from zmoe.codec import MessageError
from zmoe.config import PROTOCOL_VERSION
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.exchange.keys import (
    CURVE_BYTES,
    Pinned,
    connect_with,
    connect_with_token,
    listen_with,
    mechanism_of,
)
from zmoe.exchange.sockets import (
    HANDSHAKE_MS,
    HEARTBEAT_TIMEOUT_MS,
    Context,
    Ports,
    bind,
    heartbeat,
)

FAREWELL_S = 3.0  # how long an end waits for the other to acknowledge its last words
_LINGER_MS = 500
_MOST_AT_ONCE = 100  # frames: a flood of them must not hold the leader up
_FAILED_HANDSHAKES = 3  # in a row: no longer by chance
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_IDENTITY = re.compile(rb"zmoe-([0-9]{1,2})(-[0-9a-f]{16})?")  # without: protocol 3 and before


def _configure(socket: zmq.Socket[bytes], message_bytes: int, keys: Pinned | None) -> None:
    message_bytes += CURVE_BYTES if keys is not None else 0
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 100)
    socket.setsockopt(zmq.MAXMSGSIZE, message_bytes)
    socket.setsockopt(zmq.IPV6, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def _readable(socket: zmq.Socket[Any]) -> bool:
    """Like socket.poll(0), at a fifth of the time."""
    events = socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)


@dataclass
class _Peer:
    """A worker that has joined."""

    identity: bytes
    host: str
    channel: Channel
    down_since: float | None = None  # when a message could not be written


class LeaderBus:
    """The leader's end. What is not from a worker is counted in `dropped`, then forgotten."""

    def __init__(
        self,
        context: zmq.Context[Any],
        host: str,
        port: int,
        *,
        session: int,
        nodes: int,
        grace: float,
        tokens: Mapping[int, str] = MappingProxyType({}),
        keys: Pinned | None = None,
        addresses: Collection[str] | None = None,
        ports: Ports | None = None,
    ) -> None:
        """Bind to `host` (an IPv4 address) and `port` (0: any, of `ports` where given).

        Raises InputError where that is taken.

        Workers 1 to `nodes` - 1 may join, each with its token of `tokens`; a rank
        without one there is a worker that is started by hand. `grace`: seconds that
        a broken link may take to come back. With `keys` all is encrypted. With them, a token
        for each worker, or the IPv4 `addresses` of all nodes, nobody else gets in; the context is
        a zmoe.exchange.sockets.Context then.
        """
        self.session = session
        self.dropped = 0
        self.step = 0  # the last one begun, for error messages
        self._nodes, self._tokens, self._grace = nodes, tokens, grace
        self._peers: dict[int, _Peer] = {}
        self._given_up: dict[bytes, bytes] = {}  # by identity, what it is told
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        _configure(self.socket, MAX_REPORT_BYTES, keys)
        has_tokens = len(tokens) == nodes - 1
        if keys is not None or has_tokens or addresses is not None:
            assert isinstance(context, Context)
            domain = f"bus {session}"
            shown = keys.others if keys else tuple(tokens.values()) if has_tokens else ("",)
            context.authenticator.allow(domain, shown, addresses)
            own = keys.own if keys else None
            listen_with(self.socket, own, domain, asks_tokens=has_tokens)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A worker that reconnects takes over from its own dead connection.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # A machine that falls silent is missed by the workers' heartbeats, but only if one of these
        # was the last that came: libzmq forgets them at any other message.
        self.socket.setsockopt(zmq.TCP_MAXRT, HEARTBEAT_TIMEOUT_MS)
        self.host = host
        try:
            self.port = bind(self.socket, host, port, ports)
        except InputError:
            self.socket.close()
            raise

    def broadcast(self, message: Message, ranks: Collection[int] | None = None) -> None:
        """Send `message` to every worker that has joined, or to those of `ranks` that have.

        It is sent again after a broken link. Raises PeerError, once the others have
        it, for a worker that has long acknowledged nothing.
        """
        body = encode(message)
        lost: PeerError | None = None
        for rank, peer in self._peers.items():
            if ranks is not None and rank not in ranks:
                continue
            try:
                peer.channel.push(body)
            except ChannelError as error:
                lost = PeerError(rank, None, self.step, str(error))
            self._flush(peer)
        if lost is not None:
            raise lost

    def give_up(self, rank: int, why: str) -> None:
        """Forget worker `rank`: whoever still speaks for it is told `why`, until it joins anew."""
        peer = self._peers.pop(rank, None)
        if peer is not None:
            words = self._given_up[peer.identity] = peer.channel.note(encode(Stop(why)))
            self._write(peer.identity, words)

    def probe(self) -> None:
        """Write to every worker, so that hear() notices a link that breaks while nobody speaks."""
        for peer in self._peers.values():
            peer.channel.acknowledge()
            self._flush(peer)

    def doubt(self, rank: int) -> None:
        """Grant no grace to worker `rank`, which others have lost, if its link is broken, too."""
        peer = self._peers.get(rank)
        if peer is not None:
            peer.channel.acknowledge()
            self._flush(peer)
            if peer.down_since is not None:
                peer.down_since = -math.inf

    def wait(self, timeout: float) -> None:
        """Sleep until something has come, at most `timeout` seconds."""
        self.socket.poll(max(0, int(timeout * 1000)))

    def hear(self) -> list[tuple[int, Message]]:
        """What workers have sent by now, with their ranks; bounded, and never blocks.

        Raises PeerError for a worker whose link has been broken for too long, ZmoeError
        for one that sends what no worker can.
        """
        heard: list[tuple[int, Message]] = []
        for _ in range(_MOST_AT_ONCE):
            if not _readable(self.socket):
                break
            parts = self.socket.recv_multipart(zmq.DONTWAIT)
            try:
                got = self._read(parts)
            except (MessageError, ChannelError):
                self.dropped += 1
                continue
            if got is not None:
                heard.append(got)
        if not heard:  # words that came before a loss are not lost with it, and may say why
            self._check_links()
        return heard

    def finish(self, timeout: float) -> list[int]:
        """Wait until all that was sent is acknowledged; the ranks that did not in `timeout` s."""
        deadline = time.monotonic() + timeout
        while True:
            with suppress(ZmoeError):  # of one that is lost: the others may still answer
                self.hear()
            missing = [rank for rank, p in self._peers.items() if p.channel.unacknowledged]
            left = deadline - time.monotonic()
            if not missing or left <= 0:
                return missing
            self.wait(left)

    def close(self) -> None:
        """What is written still goes out, for half a second at most. Idempotent."""
        self.socket.close(linger=_LINGER_MS)

    # ---- reading ----------------------------------------------------------------

    def _read(self, parts: list[bytes]) -> tuple[int, Message] | None:
        """A worker's message. Raises MessageError, ChannelError for what is a stranger's."""
        identity = _IDENTITY.fullmatch(parts[0])
        if identity is None or len(parts) != 2:
            raise MessageError("not from a node")
        rank = int(identity.group(1))
        peer = self._peers.get(rank)
        if peer is not None and peer.identity != parts[0]:
            peer = None
        if not is_framed(parts[1]):
            return self._greet(rank, parts[0], peer, decode(parts[1]))
        frame = parse(parts[1])
        if peer is None or frame.session != self.session:
            # A worker of another run, which sees by this that its session is none here. Strangers
            # get this as well, and are not told ours; who was given up is told why.
            none_here = Channel(0).note(encode(Stop("another run's leader")))
            self._write(parts[0], self._given_up.get(parts[0], none_here))
            raise MessageError("of another session")
        body = peer.channel.take(frame)
        peer.down_since = None
        message = None if body is None else self._decode(rank, peer, body)
        self._flush(peer)
        return None if message is None else (rank, message)

    def _decode(self, rank: int, peer: _Peer, body: bytes) -> Message:
        try:
            message = decode(body)
        except MessageError as error:
            raise ZmoeError(f"node {rank} ({peer.host}) sent bad control data: {error}") from error
        if isinstance(message, Failed):
            peer.channel.acknowledge()
        return message

    def _greet(
        self, rank: int, identity: bytes, peer: _Peer | None, message: Message
    ) -> tuple[int, Message] | None:
        """Admit who joins, or say why not."""
        if not isinstance(message, Join):
            raise MessageError("outside of a session")
        if peer is not None:  # its link broke before it knew our session
            peer.channel.rewind()
            self._flush(peer)
            return None
        if why := self._objection(rank, message):
            self._write(identity, encode(Stop(why)))
            self.dropped += 1
            return None
        self._peers[rank] = _Peer(identity, message.host, Channel(self.session))
        if message.protocol != PROTOCOL_VERSION:  # it understands nothing else
            self._write(identity, encode(Stop(f"the leader speaks protocol {PROTOCOL_VERSION}")))
        return rank, message

    def _objection(self, rank: int, join: Join) -> str:
        """Why `join` is refused; "" if it is not."""
        if rank != join.rank or not 1 <= rank < self._nodes:
            return f"rank {join.rank} is none of the workers 1 to {self._nodes - 1} of this run"
        if not hmac.compare_digest(self._tokens.get(rank, "").encode(), join.token.encode()):
            return f"rank {rank} of this run is a worker that its leader starts"
        peer = self._peers.get(rank)
        if peer is not None and (peer.channel.has_begun or self._reaches(peer)):
            return f"rank {rank} is taken by a worker on {peer.host}"
        return ""

    # ---- writing ------------------------------------------------------------------

    def _flush(self, peer: _Peer) -> None:
        while (frame := peer.channel.outgoing()) is not None:
            if not self._write(peer.identity, frame):
                if peer.down_since is None:
                    peer.down_since = time.monotonic()
                return
            peer.channel.wrote()

    def _write(self, identity: bytes, frame: bytes) -> bool:
        """Whether libzmq took it: there is a connection, and its queue is not full."""
        try:
            self.socket.send_multipart([identity, frame], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _reaches(self, peer: _Peer) -> bool:
        peer.channel.acknowledge()
        frame = peer.channel.outgoing()
        return frame is not None and self._write(peer.identity, frame)

    def _check_links(self) -> None:
        for rank, peer in self._peers.items():
            if peer.down_since is None:
                continue
            self._flush(peer)  # its queue may only have been full
            if peer.channel.outgoing() is None:
                peer.down_since = None
            elif time.monotonic() - peer.down_since > self._grace:
                raise PeerError(rank, None, self.step, f"({peer.host}) cannot be reached")


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
        _configure(self.socket, MAX_MESSAGE_BYTES, keys)
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
        while _readable(self.socket):
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
        self.socket.close(linger=_LINGER_MS)

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
        while _readable(self._monitor):
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
