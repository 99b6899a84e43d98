"""The plan of a step: which rows of which sequences the whole cluster runs next."""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from zmoe.errors import ZmoeError

BLOCK = 64  # positions of a block of keys and values
UNBOUNDED = 2**31 - 1  # positions of a sequence that its caches do not limit
PREVIOUS = -1  # as a token: what the step before draws on the device, for the same sequence


class Span(NamedTuple):
    """Consecutive rows of one sequence.

    `position` is that of the first row; what the sequence holds from there on is dropped.
    Logits are wanted after the last `logits` of the `rows`.
    """

    sequence: int
    position: int
    rows: int
    logits: int

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.position + self.rows


class Fork(NamedTuple):
    """Sequence `new` begins with the first `length` positions of `old`, on MLX's caches."""

    new: int
    old: int
    length: int


class Copy(NamedTuple):
    """Block `to` becomes a copy of block `source`, in all layers."""

    to: int
    source: int


@dataclass(frozen=True)
class Plan:
    """One step; equal on every node.

    In this order the nodes end the sequences of `free`, make `forks` and `copies`, append
    `blocks` to the tables of the spans' sequences, and run the rows. `tokens` are those of all
    rows, in the order of `spans`, at most one span per sequence. A span takes as many of
    `blocks` as its sequence's table lacks up to the span's end; on MLX's caches there are none.
    `step` is the number of the first pass, which the frames of the exchange carry.
    """

    step: int
    spans: tuple[Span, ...]
    tokens: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    forks: tuple[Fork, ...] = ()
    copies: tuple[Copy, ...] = ()

    @functools.cached_property
    def digest(self) -> int:
        """A hash of 64 bits; equal plans have the same one on every machine."""
        parts = (self.spans, self.tokens, self.blocks, self.free, self.forks, self.copies)
        numbers = [self.step, *map(len, parts)]
        numbers += chain(*self.spans, *parts[1:4], *self.forks, *self.copies)
        packed = struct.pack(f"<{len(numbers)}q", *numbers)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def check(plan: Plan, max_rows: int, vocabulary: int, ahead: bool = False) -> None:
    """Raise ZmoeError for a plan whose parts do not go together, or of more than `max_rows` rows.

    A token outside of the vocabulary would be read beyond the embedding; `ahead`: PREVIOUS is
    none of these.
    """
    rows, sequences, sound = 0, set[int](), True
    for sequence, position, count, logits in plan.spans:
        sound = sound and count >= 1 and position >= 0 and 0 <= logits <= count
        sequences.add(sequence)
        rows += count
    if not 1 <= rows <= max_rows or len(plan.tokens) != rows:
        raise ZmoeError(
            f"step {plan.step} has {rows} rows and {len(plan.tokens)} tokens: "
            f"expected as many, from 1 to {max_rows}"
        )
    if not sound or len(sequences) != len(plan.spans):
        raise ZmoeError(
            f"step {plan.step} runs a sequence twice, or a span of no rows or before position 0"
        )
    if PREVIOUS in plan.tokens and not ahead:
        raise ZmoeError(f"step {plan.step} refers to sampled tokens, which this node never sees")
    if not -int(ahead) <= min(plan.tokens) <= max(plan.tokens) < vocabulary:
        raise ZmoeError(f"step {plan.step} has a token outside of 0 to {vocabulary - 1}")


def blocks_of(positions: int) -> int:
    """How many blocks hold that many positions."""
    return -(-positions // BLOCK)


def blocks_of_window(window: int, max_rows: int) -> int:
    """The most blocks of a sequence whose rows, `max_rows` in a step, see the first keys and the
    latest, `window` in all.

    The first block stays, and the others are used again, in turn, when no row sees them any more.
    """
    return 1 + blocks_of(window + max_rows)


def passes(spans: Sequence[Span], paged: bool) -> list[tuple[Span, ...]]:
    """The spans as a node runs them, one exchange per MoE layer in each pass.

    With paged caches that is all of them in one pass; on MLX's caches the sequences
    that run one row in one pass, and every other one by itself.
    """
    if paged or len(spans) < 2:
        return [tuple(spans)] if spans else []
    single = tuple(span for span in spans if span.rows == 1)
    return ([single] if single else []) + [(span,) for span in spans if span.rows > 1]
