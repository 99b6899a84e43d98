"""Who may come in on a link: pairs of keys, files that hold one, tokens and addresses on plain
links.

libzmq encrypts with CURVE (RFC 26). The side that connects pins the key of the side that
listens; that side asks an Authenticator for each connection (ZAP, RFC 27), without which libzmq
would take in any key. On links that are not encrypted, the side that connects shows a token
instead (PLAIN, RFC 24), or comes from an address that is let in: all others are refused in the
handshake, before they can send a message.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from zmoe.errors import InputError

KEY_CHARACTERS = 40  # of a key in Z85, as libzmq and its tools write keys
CURVE_BYTES = 512  # more than encryption adds to a message, or a message of the handshake has
_ZAP = "inproc://zeromq.zap.01"
_PAUSE_S = 0.05  # after a refusal
_ASKING_S = 1.0
_MOST_REFUSED = 16  # keys that are named; who refuses more has told enough
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyPair:
    """A node's two keys, in Z85."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def fresh(cls) -> KeyPair:
        """A new pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def of(cls, secret: str) -> KeyPair:
        """The pair of a secret key. Raises ValueError for what is none."""
        if len(secret) != KEY_CHARACTERS:
            raise ValueError(f"{len(secret)} characters instead of {KEY_CHARACTERS}")
        if not is_key(secret):
            raise ValueError("characters that no key has")
        return cls(zmq.curve_public(secret.encode()).decode(), secret)


def is_key(text: str) -> bool:
    """Whether `text` has the form of a key, public or secret."""
    try:
        zmq.curve_public(text.encode("ascii"))
    except (zmq.ZMQError, ValueError):  # other characters, or not as many
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address`, an IP address or a name."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


# ---- the file ------------------------------------------------------------------------


def read_key(path: str | Path) -> KeyPair:
    """The pair of the secret key in a file, its only line.

    Raises InputError that names the file, also for one that others than its owner and group may
    read or write.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(200) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise InputError(f"key file {path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise InputError(f"key file {path} is open to everyone: chmod o-rw {path}")
    try:
        return KeyPair.of(content.decode("ascii", "replace").strip())
    except ValueError as error:
        raise InputError(
            f"key file {path} holds no key but {error}: zmoe-keys new makes one"
        ) from None


def write_new_key(path: Path) -> KeyPair:
    """Make a pair, and a file of it that only its owner can read. Raises InputError."""
    pair = KeyPair.fresh()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{pair.secret}\n")
    except OSError as error:
        raise InputError(f"key file {path} cannot be written: {error.strerror}") from None
    return pair


def user_key() -> KeyPair:
    """The pair that this user's processes on this machine have in common.

    It is in a file that only the user can read, which the first of them makes. Raises InputError.
    """
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as error:
        raise InputError(f"no folder for a key file of this user: {error}") from None
    path = state / "zmoe" / "user.key"
    if not path.exists():
        new = path.with_name(f"user.key.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_new_key(new)
            with suppress(FileExistsError):  # another process was faster
                os.link(new, path)
            new.unlink()
        except OSError as error:
            raise InputError(f"key file {path} cannot be written: {error.strerror}") from None
    return read_key(path)


@dataclass(frozen=True)
class Pinned:
    """What one end of a link needs: its own keys, and the public keys that it talks with.

    `is_users`: they come from user_key(), for which nobody had to ask.
    """

    own: KeyPair
    others: tuple[str, ...]
    is_users: bool = False

    @classmethod
    def shared(cls, pair: KeyPair) -> Pinned:
        """Of those who all have the same pair."""
        return cls(pair, (pair.public,))

    @classmethod
    def of_user(cls) -> Pinned:
        """Of the processes of this user on this machine. Raises InputError."""
        pair = user_key()
        return cls(pair, (pair.public,), is_users=True)


# ---- sockets ---------------------------------------------------------------------------


def listen_with(
    socket: zmq.Socket[bytes], pair: KeyPair | None, domain: str, *, asks_tokens: bool = True
) -> None:
    """Let `socket`, not bound yet, take in only what is allowed in `domain`: keys, of links that
    are encrypted by `pair`; without a pair, tokens, or only addresses.
    """
    if pair is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)
    elif asks_tokens:
        socket.setsockopt(zmq.PLAIN_SERVER, 1)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def connect_with(socket: zmq.Socket[bytes], pair: KeyPair, peer: str) -> None:
    """Encrypt the next connections of `socket`, which the owner of the public key `peer` takes."""
    socket.setsockopt_string(zmq.CURVE_SERVERKEY, peer)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)


def connect_with_token(socket: zmq.Socket[bytes], token: str) -> None:
    """Show `token` on the next connections of `socket`, which are not encrypted."""
    socket.setsockopt_string(zmq.PLAIN_USERNAME, "zmoe")
    socket.setsockopt_string(zmq.PLAIN_PASSWORD, token)


def mechanism_of(listener: str) -> bytes:
    """What ZMTP calls the way in at `listener` (HOST:PORT): b"NULL", b"PLAIN" or b"CURVE".

    b"" where nobody says one of these in time. libzmq knows it only if the other side's whole
    greeting is here before that side has ours and closes the connection, which on a busy machine it
    often is not. So this says no more of a greeting than what makes the other side say all of its
    own.
    """
    host, _, port = listener.rpartition(":")
    greeting = b""
    with suppress(OSError), socket.create_connection((host, int(port)), _ASKING_S) as end:
        end.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
        while len(greeting) < 32 and (more := end.recv(32 - len(greeting))):
            greeting += more
    mechanism = greeting[12:].rstrip(b"\0")
    return mechanism if mechanism in (b"NULL", b"PLAIN", b"CURVE") else b""


class Authenticator:
    """Says for each new connection of a context's sockets whether its key, or its token and
    address, may come in.

    A thread does; it ends with the context. If it fails, libzmq lets nobody in any more, and the
    connections that stand go on. Once it has refused somebody it pauses, and then answers all who
    have come meanwhile: strangers wake it less often, and those who knock again and again wait.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        """One for each context."""
        self.refused: list[str] = []  # who, in words; the first ones
        self._allowed: dict[str, frozenset[str] | None] = {}
        self._addresses: dict[str, frozenset[str]] = {}  # where not all are let in
        socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP)
        threading.Thread(target=self._run, args=(socket,), daemon=True).start()

    def open(self, domain: str) -> None:
        """Let those who come to `domain` try again until allow() says who may."""
        self._allowed[domain] = None

    def allow(
        self, domain: str, shown: Collection[str], addresses: Collection[str] | None = None
    ) -> None:
        """Let in who shows one of these public keys, or tokens ("" where none is asked for), and
        comes from one of these IPv4 addresses, where given; and no one else.
        """
        if addresses is not None:
            self._addresses[domain] = frozenset(addresses)
        self._allowed[domain] = frozenset(shown)

    def close(self, domain: str) -> None:
        """Forget `domain`, whose sockets are closed."""
        self._allowed.pop(domain, None)
        self._addresses.pop(domain, None)

    def _run(self, socket: zmq.Socket[bytes]) -> None:
        try:
            while True:
                answer = self._answer(socket.recv_multipart())
                socket.send_multipart(answer)
                if answer[2] == b"400" and not socket.poll(0):
                    time.sleep(_PAUSE_S)
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            _LOG.warning("zmoe: nobody can connect any more: the check of keys failed: %r", error)
        finally:
            socket.close()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        version, request, name, source, _, mechanism, *credentials = question
        domain, address = name.decode(), source.decode()
        allowed, addresses = self._allowed.get(domain), self._addresses.get(domain)
        is_encrypted = mechanism == b"CURVE"
        shown = z85.encode(credentials[0]) if is_encrypted else b"".join(credentials[1:])
        if allowed is None:
            status = b"300"  # libzmq closes the connection, and the other side tries again
        elif addresses is not None and address not in addresses:
            status = b"400"
            self._note(f"{address}, an address of no node")
        elif shown.decode("ascii", "replace") in allowed:
            status = b"200"
        else:
            status = b"400"
            who = f"whose public key is {shown.decode()}" if is_encrypted else "who has no token"
            self._note(f"{address}, {who}")
        return [version, request, status, b"", b"", b""]

    def _note(self, words: str) -> None:
        if words not in self.refused and len(self.refused) < _MOST_REFUSED:
            self.refused.append(words)
            _LOG.warning("zmoe: refused %s: it is none of this run's", words)
