"""Fuzzes what both ends of a control link read, behind a right session and number.

`python -m tests.unit.cluster.control_fuzz COUNT SEED` prints how many messages were taken.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import msgpack

from tests.unit.cluster.test_messages import EXAMPLES
from zmoe.cluster.channel import _HEADER, _MAGIC, Channel, ChannelError, Kind
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.messages import Join, encode
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.codec import MessageError
from zmoe.config import PROTOCOL_VERSION
from zmoe.errors import ZmoeError
from zmoe.exchange.sockets import Context

SESSION, IDENTITY = 0x5EED, b"zmoe-1-0123456789abcdef"
JOIN = Join(PROTOCOL_VERSION, 1, "1", "here", "")
_NUMBERS = [-1, 0, 1, 2, 63, 64, 2**16, 2**31, 2**32 - 1, 2**32, 2**60, 2**64 - 1]
_TEXTS = ["", "x", "x" * 300, "a\nb", "\0", "\ud7ff", "127.0.0.1", "\u2028"]
ODD: list[Any] = [None, True, 1.5, float("nan"), -0.0, b"", [], {}, [[]], *_NUMBERS, *_TEXTS]


class Fuzz:
    """The two ends, each of which believes that it is within a run."""

    def __init__(self, context: Context, seed: int) -> None:
        self._random = random.Random(seed)
        self.leader = LeaderBus(context, "127.0.0.1", 0, session=SESSION, nodes=3, grace=60.0)
        self.worker = WorkerBus(context, "127.0.0.1:9", JOIN, 60.0)
        self.told: Counter[str] = Counter()  # how many, by how they ended

    def run(self, count: int) -> None:
        """Reads `count` messages. Raises what neither end may raise."""
        for _ in range(count):
            self._begin()
            for name, read, given in (
                ("leader", self.leader._read, self._parts()),
                ("worker", self.worker._read, self._frame()),
            ):
                try:
                    read(given)  # type: ignore[operator]
                    self.told[f"{name} took"] += 1
                except (MessageError, ChannelError):
                    self.told[f"{name} dropped"] += 1
                except ZmoeError:  # this ends a run
                    self.told[f"{name} ended"] += 1
                    self.leader._peers.clear()
                    self.worker._channel = None

    def close(self) -> None:
        self.leader.close()
        self.worker.close()

    def _begin(self) -> None:
        if not self.leader._peers:
            self.leader._read([IDENTITY, encode(JOIN)])
        if self.worker._channel is None and self._random.random() < 0.9:
            self.worker._channel = Channel(SESSION)

    def _parts(self) -> list[bytes]:
        odd = [b"", b"zmoe-1", b"zmoe-2-0123456789abcdef", b"zmoe-99", IDENTITY]
        identity = self._random.choice(odd) if self._random.random() < 0.1 else IDENTITY
        return [identity] + [self._frame()] * (2 if self._random.random() < 0.01 else 1)

    def _frame(self) -> bytes:
        body, chance = self._body(), self._random.random
        if chance() < 0.1:
            return body
        kind = Kind.MESSAGE if chance() < 0.8 else self._random.randrange(5)
        channel = self.worker._channel
        received = channel._received if channel is not None else 0
        peer = self.leader._peers.get(1)
        due = 1 + self._random.choice([received, peer.channel._received if peer else 0])
        number = due if chance() < 0.9 else self._random.choice(_NUMBERS[1:])
        if kind != Kind.MESSAGE and chance() < 0.9:
            number = 0
        if kind in (Kind.ACKNOWLEDGE, Kind.RESUME) and chance() < 0.9:
            body = b""
        acknowledged = 0 if chance() < 0.95 else self._random.choice(_NUMBERS[1:])
        session = SESSION if chance() < 0.98 else 3
        return _HEADER.pack(_MAGIC, kind, chance() < 0.01, session, number, acknowledged) + body

    def _body(self) -> bytes:
        body = encode(self._random.choice(EXAMPLES))
        how = self._random.randrange(4)
        if how > 0:
            body = msgpack.packb(self._bent(msgpack.unpackb(body)))
        if how == 1:
            damaged = bytearray(body)
            damaged[self._random.randrange(len(body))] = self._random.randrange(256)
            body = bytes(damaged[: self._random.choice([len(body), len(body) // 2])])
        return body

    def _bent(self, value: Any) -> Any:
        """`value` with something in it changed."""
        if not isinstance(value, list) or not value or self._random.random() < 0.02:
            return self._random.choice(ODD)
        at, how = self._random.randrange(len(value)), self._random.randrange(8)
        if how == 0:
            return value[:at] + value[at + 1 :]
        changed = self._random.choice(ODD) if how == 1 else self._bent(value[at])
        return [*value[:at], changed, *value[at + (how != 1) :]]


if __name__ == "__main__":
    context = Context()
    fuzz = Fuzz(context, int(sys.argv[2]))
    fuzz.run(int(sys.argv[1]) // 2)
    print(dict(fuzz.told))
    fuzz.close()
    context.term()
