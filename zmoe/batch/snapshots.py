"""Which caches of MLX are kept after their sequences, so that others may begin with a copy.

The nodes hold a snapshot as a sequence that does not run. Memory is counted in blocks of
positions, as if each running sequence were as long as the longest: a batch is padded to that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from zmoe.batch.blocks import Found
from zmoe.batch.plan import BLOCK, UNBOUNDED, Fork, blocks_of

if TYPE_CHECKING:
    from zmoe.batch.sequence import Sequence

_Text = tuple[bytes, list[int]]  # a salt, and tokens under it


class Snapshots:
    """Snapshots and running sequences within `count` blocks; `ids` numbers new snapshots.

    `exact` caches, the recurrent ones, cannot be cut: a prompt must begin with all of a snapshot,
    so they are kept at the request's borders and before the prompt's last token. Of others
    the common part is taken, and one after the prompt serves all. A sequence that ends
    stays as a snapshot too. What would save less than a block is left alone. With `most`, no
    sequence takes more blocks than that, however long it is.
    """

    def __init__(
        self, count: int, exact: bool, ids: Iterator[int], most: int | None = None
    ) -> None:
        self._most = UNBOUNDED if most is None else most
        self.count, self.exact, self._ids = count, exact, ids
        self.free: list[int] = []  # the sequences and snapshots that ended since the last plan
        self.forks: list[Fork] = []  # those of the next plan
        self._texts: OrderedDict[int, _Text] = OrderedDict()  # the least recently used first
        self._kept = 0  # blocks of all snapshots
        self._running: dict[Sequence, int] = {}  # blocks of each running sequence
        self._longest = 0  # the most of them

    @property
    def available(self) -> int:
        """Blocks that no running sequence takes, padding included."""
        return self.count - len(self._running) * self._longest

    def borders(self, prompt: int, wanted: tuple[int, ...]) -> list[int]:
        """The numbers of tokens after which a prompt's cache is kept, in order."""
        inside = {border for border in wanted if border < prompt} | {prompt - 1}
        return sorted(inside) if self.exact else [prompt]

    def find(self, sequence: Sequence) -> Found:
        """The snapshot that spares it most tokens, all but the last one at most."""
        tokens, best = sequence.tokens, Found(0)
        for number, (salt, text) in self._texts.items():
            most = min(len(text), len(tokens) - 1) if salt == sequence.salt else 0
            if most <= best.length or (self.exact and most < len(text)):
                continue
            length = _common(text, tokens, most)
            whole = length == len(text) or not self.exact
            if whole and length > best.length and length >= BLOCK:
                best = Found(length, snapshot=number)
        return best

    def begin(self, sequence: Sequence, found: Found, reserve: int) -> bool:
        """Count a running sequence of its length if `reserve` blocks are left beyond it."""
        needed = self._needed(len(sequence.tokens))
        if found.snapshot is not None:
            self._texts.move_to_end(found.snapshot)
        if not self._fits(len(self._running) + 1, max(needed, self._longest), reserve):
            return False
        self._count(sequence, needed)
        sequence.position = 0
        if found.snapshot is not None and found.snapshot in self._texts:
            self.forks.append(Fork(sequence.id, found.snapshot, found.length))
            sequence.position, sequence.sent = found.length, blocks_of(found.length)
        return True

    def grow(self, sequence: Sequence, end: int) -> bool:
        """Count `end` positions for it; False, and no change, where there is no room."""
        needed = self._needed(end)
        if needed > self._longest and not self._fits(len(self._running), needed, 0):
            return False
        self._count(sequence, needed)
        return True

    def keep(self, sequence: Sequence, length: int) -> None:
        """Its first `length` tokens are computed, which means nothing here."""
        sequence.kept = length // BLOCK

    def snapshot(self, sequence: Sequence) -> int:
        """Keep the cache if it is at a border; returns the number of tokens to stop at next."""
        borders, position = sequence.borders, sequence.position
        while borders and borders[0] <= position:
            if borders.pop(0) == position >= BLOCK:
                new = next(self._ids)
                if self._add(new, (sequence.salt, sequence.tokens[:position])):
                    self.forks.append(Fork(new, sequence.id, position))
        return borders[0] if borders else len(sequence.tokens)

    def end(self, sequence: Sequence, keep: bool = True) -> None:
        """It no longer runs; its cache stays as a snapshot if `keep`."""
        del self._running[sequence]
        self._longest = max(self._running.values(), default=0)
        length = min(sequence.position, len(sequence.tokens))
        whole = sequence.position <= len(sequence.tokens) and not sequence.verifying
        keep = keep and length >= BLOCK and (whole or not self.exact)
        text = (sequence.salt, sequence.tokens[:length])
        if sequence.sent and not (keep and self._add(sequence.id, text)):
            self.free.append(sequence.id)
        sequence.room = sequence.sent = 0

    def known(self, text: Sequence) -> Found:
        """As find(), or among the running sequences unless caches cannot be cut."""
        best = self.find(text)
        for running in self._running if not self.exact else ():
            most = min(running.position, len(running.tokens), len(text.tokens) - 1)
            length = _common(running.tokens, text.tokens, most)
            if running.salt == text.salt and length > best.length and length >= BLOCK:
                best = Found(length, snapshot=running.id)
        return best

    def adopt(self, text: Sequence, fill: Callable[[list[int]], None]) -> int:
        """Have `fill` make the snapshot of that number if there is room and none has the text.

        Returns how many of its tokens others find then; `fill` may raise.
        """
        new = next(self._ids)
        if self._add(new, (text.salt, [*text.tokens])):
            fill([new])
        text.tokens.append(0)  # all before the last token can be found
        return self.known(text).length

    def forget(self) -> None:
        """No snapshot is there any more, on any node; no sequence is running."""
        self._texts.clear()
        self._kept = 0
        self.free.clear()
        self.forks.clear()

    def _count(self, sequence: Sequence, blocks: int) -> None:
        self._running[sequence] = blocks
        self._longest = max(self._longest, blocks)
        sequence.room = UNBOUNDED if blocks == self._most else blocks * BLOCK

    def _needed(self, positions: int) -> int:
        """The blocks of a cache of that many positions."""
        return min(blocks_of(positions), self._most)

    def _add(self, number: int, new: _Text) -> bool:
        """Keep a snapshot of `new`, and drop those that it makes superfluous."""
        salt, text = new
        for other, (their_salt, known) in list(self._texts.items()):
            if salt != their_salt:
                continue
            if text == (known if self.exact else known[: len(text)]):
                self._texts.move_to_end(other)
                return False
            if not self.exact and known == text[: len(known)] and other not in self._pinned():
                self._drop(other)
        if not self._fits(len(self._running), self._longest, self._needed(len(text))):
            return False
        self._texts[number] = new
        self._kept += self._needed(len(text))
        return True

    def _fits(self, sequences: int, longest: int, more: int) -> bool:
        """Whether all that has room, once the least recently used snapshots have gone."""
        spare = self.count - sequences * longest - more
        pinned = self._pinned()
        if spare < sum(self._needed(len(self._texts[n][1])) for n in pinned if n in self._texts):
            return False
        for number in list(self._texts):
            if self._kept <= spare:
                break
            if number not in pinned:
                self._drop(number)
        return True

    def _pinned(self) -> set[int]:
        """The snapshots that the next plan reads or makes: it ends sequences before that."""
        return {number for fork in self.forks for number in (fork.old, fork.new)}

    def _drop(self, number: int) -> None:
        self._kept -= self._needed(len(self._texts.pop(number)[1]))
        self.free.append(number)


def _common(one: list[int], other: list[int], most: int) -> int:
    """How many of their first `most` tokens agree."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
