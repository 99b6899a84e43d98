"""The leader's end of the control links: a ROUTER, see zmoe.cluster.bus."""

from __future__ import annotations

import hmac
import math
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import zmq

from zmoe.cluster.bus import LINGER_MS, configure, readable
from zmoe.cluster.channel import Channel, ChannelError, is_framed, parse
from zmoe.cluster.messages import MAX_REPORT_BYTES, Failed, Join, Message, Stop, decode, encode
from zmoe.codec import MessageError
from zmoe.config import PROTOCOL_VERSION
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.exchange.keys import Pinned, listen_with
from zmoe.exchange.sockets import HEARTBEAT_TIMEOUT_MS, Context, Ports, bind

_MOST_AT_ONCE = 100  # frames: a flood of them must not hold the leader up
_IDENTITY = re.compile(rb"zmoe-([0-9]{1,2})(-[0-9a-f]{16})?")  # without: protocol 3 and before


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
        configure(self.socket, MAX_REPORT_BYTES, keys)
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
            if not readable(self.socket):
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
        self.socket.close(linger=LINGER_MS)

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
