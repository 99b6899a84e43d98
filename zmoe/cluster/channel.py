"""One end of a control link on which every message arrives once and in order.

TCP keeps this promise for as long as one connection stands. When it breaks, what was
under way is lost, in either direction. So every message carries a number, and its
sender keeps it until the other side has acknowledged it. The side that connects
says RESUME on each new connection; both sides then write again what they still keep,
and each drops what it has already received. This file does no input or output.
"""

from __future__ import annotations

import struct
from collections import deque
from enum import IntEnum
from typing import NamedTuple

WINDOW = 256  # messages kept at most; a peer that acknowledges nothing for so long is lost
ACKNOWLEDGE_EVERY = 32
_MAGIC = b"zmoe"
_HEADER = struct.Struct("<4sBxxxIQQQ")


class Kind(IntEnum):
    """What a frame is."""

    ACKNOWLEDGE = 0  # nothing but the header
    MESSAGE = 1  # numbered, kept until acknowledged
    NOTE = 2  # a message without a number: it is lost with its connection
    RESUME = 3  # nothing but the header: write again what this frame does not acknowledge


class Frame(NamedTuple):
    """A frame as it was read. `acknowledged`: the last message that its sender has received."""

    kind: Kind
    epoch: int
    session: int
    number: int
    acknowledged: int
    body: bytes


class ChannelError(ValueError):
    """What the other side sent cannot be, or it acknowledges nothing any more."""


def is_framed(data: bytes) -> bool:
    """Whether `data` claims to be a frame: no bare message begins like this."""
    return data.startswith(_MAGIC)


def parse(data: bytes) -> Frame:
    """The frame in `data`. Raises ChannelError."""
    if len(data) < _HEADER.size or not is_framed(data):
        raise ChannelError("a frame without a header")
    _, kind, epoch, session, number, acknowledged = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    try:
        frame = Frame(Kind(kind), epoch, session, number, acknowledged, body)
    except ValueError as error:
        raise ChannelError(f"a frame of unknown kind {kind}") from error
    if (frame.kind is Kind.MESSAGE) != (number > 0):
        raise ChannelError(f"a {frame.kind.name} frame with number {number}")
    if bool(body) != (frame.kind in (Kind.MESSAGE, Kind.NOTE)):
        raise ChannelError(f"a {frame.kind.name} frame with {len(body)} bytes")
    return frame


class Channel:
    """The state of one end in one session.

    Whoever owns the socket writes `outgoing()` and calls `wrote()`, as long as
    there is something, and gives what arrives to `take`.
    """

    def __init__(self, session: int, epoch: int = 0) -> None:
        self.session, self.epoch = session, epoch
        self._kept: deque[bytes] = deque()  # bodies of the last messages up to number _sent
        self._sent = 0
        self._written = 0  # up to here the standing connection has got them
        self._received = 0
        self._told = 0  # the last number that we acknowledged
        self._resume = False  # a RESUME is due
        self._gap = False  # we have asked for what is missing

    @property
    def unacknowledged(self) -> int:
        """How many messages the other side has not acknowledged."""
        return len(self._kept)

    @property
    def has_begun(self) -> bool:
        """Whether a message was ever sent."""
        return self._sent > 0

    def push(self, body: bytes) -> None:
        """Send a message. Raises ChannelError when too many are unacknowledged."""
        if len(self._kept) >= WINDOW:
            raise ChannelError(f"has not acknowledged {WINDOW} messages")
        self._sent += 1
        self._kept.append(body)

    def note(self, body: bytes) -> bytes:
        """The frame of a message that may be lost; to be written at once or never."""
        return self._frame(Kind.NOTE, 0) + body

    def acknowledge(self) -> None:
        """Let an acknowledgement go out without waiting for more messages."""
        self._told = -ACKNOWLEDGE_EVERY

    def outgoing(self) -> bytes | None:
        """The frame to write next, if any."""
        if self._resume:
            return self._frame(Kind.RESUME, 0)
        if self._written < self._sent:
            body = self._kept[self._written - self._sent]  # counted from the last one
            return self._frame(Kind.MESSAGE, self._written + 1) + body
        if self._received - self._told >= ACKNOWLEDGE_EVERY:
            return self._frame(Kind.ACKNOWLEDGE, 0)
        return None

    def wrote(self) -> None:
        """`outgoing()` has been given to the connection."""
        self._told = self._received
        if self._resume:
            self._resume = False
        elif self._written < self._sent:
            self._written += 1

    def reconnected(self) -> None:
        """The connection is a new one."""
        self.rewind()
        self._resume = True

    def rewind(self) -> None:
        """Write again everything that is not acknowledged."""
        self._written = self._sent - len(self._kept)
        self._gap = False

    def take(self, frame: Frame) -> bytes | None:
        """The body of `frame` if it is the next message, or a note.

        Raises ChannelError for what the other side cannot have sent.
        """
        if (frame.session, frame.epoch) != (self.session, self.epoch):
            raise ChannelError(f"session {frame.session:x}, epoch {frame.epoch} are not ours")
        if frame.acknowledged > self._sent:
            raise ChannelError(f"message {frame.acknowledged} is acknowledged, but was never sent")
        while self._sent - len(self._kept) < frame.acknowledged:
            self._kept.popleft()
        self._written = max(self._written, frame.acknowledged)
        if frame.kind is Kind.RESUME:
            self.rewind()
        elif frame.kind is Kind.NOTE:
            return frame.body
        elif frame.kind is Kind.MESSAGE:
            if frame.number == self._received + 1:
                self._received += 1
                self._gap = False
                return frame.body
            if frame.number > self._received and not self._gap:
                self._gap = self._resume = True
        return None

    def _frame(self, kind: Kind, number: int) -> bytes:
        return _HEADER.pack(_MAGIC, kind, self.epoch, self.session, number, self._received)
