"""The ZeroMQ sockets under an exchange: created, bound and connected here, used in C.

What is for all goes over XPUB and SUB; what is for one rank, such as requests for
lost frames, over DEALER and ROUTER, whose monitors tell of broken links. All
limits are explicit: what a stranger can make a socket hold is bounded by its
high-water mark and message size. A stranger gets as far as the handshake, in which it would have
to show a key or the token of the session (zmoe.exchange.keys).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import zmq

from zmoe import native
from zmoe.errors import InputError
from zmoe.exchange.keys import (
    CURVE_BYTES,
    Authenticator,
    KeyPair,
    connect_with,
    connect_with_token,
    listen_with,
)

_SUBSCRIPTION_BYTES = 256  # most that a message to an XPUB may have
HANDSHAKE_MS = 5000
HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 5000  # and what the frames under way take
SLOWEST_BYTES_PER_MS = 10_000  # of a link, as in csrc/exchange/resend.c
_LINGER_MS = 500  # and what the frames under way take
_LONGEST_TTL_MS = 65_000  # libzmq has 16 bits for it
Ports = tuple[int, int]  # the first and the last of a range
_TRIES = 20  # two that are given any port at once may be given the same: one cannot listen then
_LINK_EVENTS = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


@dataclass(frozen=True)
class Endpoint:
    """Where a node listens: XPUB on `data_port`, ROUTER on `control_port`.

    `key` is its public key (Z85), "" where links are not encrypted.
    """

    host: str
    data_port: int
    control_port: int
    key: str = ""


def _limit(socket: zmq.Socket[bytes], send: int, receive: int, message_bytes: int) -> None:
    """Options common to all: bounds, no linger, quick reconnection."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, send)
    socket.setsockopt(zmq.RCVHWM, receive)
    socket.setsockopt(zmq.MAXMSGSIZE, message_bytes)
    socket.setsockopt(zmq.IPV6, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)


def heartbeat(socket: zmq.Socket[bytes], queued_bytes: int) -> None:
    """Let a socket that connects, and its peer, notice each other's death.

    I/O threads send and answer the heartbeats, also while Python computes. An answer
    waits behind the frames that are under way, `queued_bytes` at most, and only
    whole messages count as signs of life: so the link may be silent for
    HEARTBEAT_TIMEOUT_MS and for as long as these bytes take. The peer learns the
    limit from each heartbeat. It must send none itself: when its high-water mark
    has stopped a connection that then breaks, the next heartbeat on it would abort
    the process (libzmq's assertion "!_io_error"). Who floods a socket and ends that with a
    heartbeat of its own can still bring that about, once it is past the handshake.
    """
    limit_ms = HEARTBEAT_TIMEOUT_MS + queued_bytes // SLOWEST_BYTES_PER_MS
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, limit_ms)
    socket.setsockopt(zmq.HEARTBEAT_TTL, limit_ms if limit_ms <= _LONGEST_TTL_MS else 0)


class Context(zmq.Context["zmq.Socket[bytes]"]):
    """A context that the garbage collector leaves alone; term() ends it.

    pyzmq's ends itself there, and so waits for ever where its sockets are
    garbage too, to be closed after it.
    """

    _authenticator: Authenticator | None = None

    @property
    def authenticator(self) -> Authenticator:
        """What lets keys in; there is none before it is asked for."""
        if self._authenticator is None:
            self._authenticator = Authenticator(self)
        return self._authenticator

    def __del__(self) -> None:
        pass


_domains = itertools.count()


class Sockets:
    """All sockets of one rank; `connect` adds those that lead to the peers.

    With `keys` everything is encrypted, and only who has the key of a peer gets in; without,
    only who knows the session, and comes from one of these IPv4 `addresses`, where given.
    """

    def __init__(
        self,
        context: Context,
        rank: int,
        nodes: int,
        session: int,
        frame_bytes: int,
        keys: KeyPair | None = None,
        addresses: Collection[str] | None = None,
    ) -> None:
        self._addresses = addresses
        self._context, self._rank, self._session, self._keys = context, rank, session, keys
        self._domain, self._token = f"exchange {next(_domains)}", f"{session:016x}"
        more = CURVE_BYTES if keys is not None else 0
        self._frame_bytes = frame_bytes = frame_bytes + more
        self.dealers: list[zmq.Socket[bytes] | None] = []
        self.monitors: list[zmq.Socket[bytes] | None] = []
        # Lock-step and the pool's slots bound what is under way. The high-water
        # marks are far above that, since libzmq learns only now and then what has
        # been read: a low mark of XPUB drops frames, of a DEALER refuses them, of SUB
        # costs extra wake-ups.
        self.xpub = context.socket(zmq.XPUB)
        _limit(self.xpub, 1024, 256, _SUBSCRIPTION_BYTES + more)
        self.xpub.setsockopt(zmq.XPUB_MANUAL, 1)
        self.sub = context.socket(zmq.SUB)
        _limit(self.sub, 64, 64, frame_bytes)
        heartbeat(self.sub, nodes * frame_bytes)
        self.router = context.socket(zmq.ROUTER)
        _limit(self.router, 8, 128, frame_bytes)  # requests of 2 minutes (csrc/exchange/resend.c)
        # A peer that reconnects takes over from its own dead connection.
        self.router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None:
            context.authenticator.open(self._domain)
        else:
            context.authenticator.allow(self._domain, [self._token], addresses)
        for listener in (self.xpub, self.router):
            listen_with(listener, keys, self._domain)

    def bind(
        self, host: str, data_port: int, control_port: int, ports: Ports | None = None
    ) -> Endpoint:
        """Listen; port 0 picks a free one, of `ports` where they are given.

        Raises InputError naming what is in use.
        """
        data_port = bind(self.xpub, host, data_port, ports)
        control_port = bind(self.router, host, control_port, ports)
        return Endpoint(host, data_port, control_port, self._keys.public if self._keys else "")

    def connect(self, endpoints: Sequence[Endpoint]) -> None:
        """Start connecting to every other rank; returns at once.

        Raises InputError for a rank that has a key where this one has none, or the reverse.
        """
        for rank, peer in enumerate(endpoints):
            if bool(peer.key) != (self._keys is not None):
                has = "has a key, and this node none" if peer.key else "has no key"
                raise InputError(f"rank {rank} at {peer.host}:{peer.data_port} {has}")
        source = f"{endpoints[self._rank].host}:0;" if self._addresses is not None else ""
        if self._keys is not None:
            allowed = {peer.key for rank, peer in enumerate(endpoints) if rank != self._rank}
            self._context.authenticator.allow(self._domain, allowed)
        for rank, peer in enumerate(endpoints):
            if rank == self._rank:
                self.dealers.append(None)
                self.monitors.append(None)
                continue
            dealer = self._context.socket(zmq.DEALER)
            self.dealers.append(dealer)
            _limit(dealer, 1024, 8, self._frame_bytes)
            heartbeat(dealer, len(endpoints) * self._frame_bytes)
            dealer.setsockopt(zmq.ROUTING_ID, native.presence(self._session, self._rank))
            # Tells the peer's ROUTER of us: until then it drops what it has for us.
            dealer.setsockopt(zmq.PROBE_ROUTER, 1)
            dealer.setsockopt(zmq.IMMEDIATE, 1)  # no request waits for a link to come back
            self.monitors.append(dealer.get_monitor_socket(_LINK_EVENTS))
            for socket, port in ((self.sub, peer.data_port), (dealer, peer.control_port)):
                address = f"tcp://{source}{peer.host}:{port}"
                if self._keys is not None:
                    connect_with(socket, self._keys, peer.key)
                else:
                    connect_with_token(socket, self._token)
                try:
                    socket.connect(address)
                except zmq.ZMQError as problem:
                    raise InputError(
                        f"cannot connect to rank {rank} at {address}: {problem.strerror}"
                    ) from problem

    def close(self) -> None:
        """Close them all; idempotent, never blocks.

        What is under way still goes out: a peer may need it though we have our sum. The context's
        term() waits for that.
        """
        linger_ms = _LINGER_MS + len(self.dealers) * self._frame_bytes // SLOWEST_BYTES_PER_MS
        for dealer in self.dealers:
            if dealer is not None and not dealer.closed:
                dealer.disable_monitor()
        self._context.authenticator.close(self._domain)
        self.sub.close(linger=0)  # which would wait for those that are gone
        for socket in (self.xpub, self.router, *self.dealers, *self.monitors):
            if socket is not None:
                socket.close(linger_ms)


def bind(socket: zmq.Socket[bytes], host: str, port: int, ports: Ports | None = None) -> int:
    """Let `socket` listen at `port`, 0 for any free one of `ports`; returns the port.

    Raises InputError naming what is in use.
    """
    tried: Sequence[int] = (port,) if port else (0,) * _TRIES
    if ports is not None and port == 0:
        tried = range(ports[0], ports[1] + 1)
    for each in tried:
        try:
            socket.bind(f"tcp://{host}:{each or '*'}")
        except zmq.ZMQError as problem:
            if problem.errno != zmq.EADDRINUSE:
                raise InputError(f"cannot listen on {host}:{each}: {problem.strerror}") from problem
            continue
        bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return int(bound.rsplit(":", 1)[1])
    if port:
        raise InputError(f"cannot listen: port in use: {host}:{port} is taken by another process")
    if ports is None:
        raise InputError(f"cannot listen: {host} has no port free")
    raise InputError(f"cannot listen: {host} has no port free from {tried[0]} to {tried[-1]}")
