"""Blocks of models some of whose layers are recurrent: they keep a state of a text, not its keys.

A prompt can go on only where the state is kept, too. The nodes hold such a snapshot as a sequence
that does not run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from zmoe.batch.blocks import Blocks, Found, Prefix
from zmoe.batch.plan import BLOCK, Fork

if TYPE_CHECKING:
    from zmoe.batch.sequence import Sequence


def most_snapshots(parallel: int) -> int:
    """How many are kept where `parallel` sequences run: the latest of each, and those of texts
    with which many begin.
    """
    return parallel + 4


class StatefulBlocks(Blocks):
    """Blocks, and at most `most` snapshots of states at the ends of blocks; `ids` numbers them.

    A snapshot is made at the last end of a block before each border of a prompt and before its last
    token; and while a text is generated at each end of a block, in place of the one before. The
    least recently used goes first.
    """

    def __init__(self, count: int, ids: Iterator[int], most: int) -> None:
        super().__init__(count)
        self._ids, self._most_snapshots = ids, most
        self._snapshots: OrderedDict[Prefix, int] = OrderedDict()  # the least recently used first
        self._latest: dict[Sequence, Prefix] = {}  # of those that generate

    def borders(self, prompt: int, wanted: tuple[int, ...]) -> list[int]:
        """The numbers of tokens after which a prompt's state is kept, in order."""
        inside = {min(border, prompt - 1) // BLOCK * BLOCK for border in (*wanted, prompt)}
        return sorted(inside - {0})

    def find(self, sequence: Sequence) -> Found:
        """The longest cached beginning of its tokens after which there is a snapshot."""
        found = super().find(sequence)
        prefix, count = found.prefix, len(found.blocks)
        while count and prefix is not None and prefix not in self._snapshots:
            prefix, count = prefix.parent, count - 1
        if not count or prefix is None:
            return Found(0, prefix=Prefix(None, sequence.salt))
        return Found(count * BLOCK, found.blocks[:count], prefix, self._snapshots[prefix])

    def begin(self, sequence: Sequence, found: Found, reserve: int) -> bool:
        """See Blocks; it begins with the snapshot that was found."""
        if not super().begin(sequence, found, reserve):
            return False
        if found.snapshot is not None and found.prefix is not None:
            self._snapshots.move_to_end(found.prefix)
            self.forks.append(Fork(sequence.id, found.snapshot, found.length))
        return True

    def snapshot(self, sequence: Sequence) -> int:
        """Keep the state if it is to be kept where the sequence is now; returns the number of
        tokens to stop at next.
        """
        borders, position = sequence.borders, sequence.position
        is_wanted = False
        while borders and borders[0] <= position:
            is_wanted = borders.pop(0) == position
        generates = position >= sequence.prompt and position % BLOCK == 0
        # The text is known up to here, unless results are yet to come.
        if (is_wanted or generates) and sequence.kept * BLOCK == position:
            if generates and self._latest.get(sequence) != sequence.prefix:
                self._drop(self._latest.pop(sequence, None))
            self._add(sequence, generates)
        return borders[0] if borders else len(sequence.tokens)

    def adopt(self, text: Sequence, fill: Callable[[list[int]], None]) -> int:
        """As Blocks: all of `text` or nothing. `fill` gets the number of the snapshot first."""
        number = next(self._ids)
        if len(text.tokens) // BLOCK > self.available or not self._has_room():
            return 0
        length = super().adopt(text, lambda blocks: fill([number, *blocks]))
        if length and text.prefix is not None:
            self._drop(text.prefix)
            self._snapshots[text.prefix] = number
        return length

    def end(self, sequence: Sequence, keep: bool = True) -> None:
        """See Blocks; the nodes know of one that began with a snapshot before it has blocks."""
        self._latest.pop(sequence, None)
        is_forked = not sequence.sent and sequence.position > 0
        super().end(sequence, keep)
        if is_forked:
            self.free.append(sequence.id)

    def forget(self) -> None:
        """See Blocks; no snapshot is there either."""
        super().forget()
        self._snapshots.clear()
        self.forks.clear()

    def _add(self, sequence: Sequence, generates: bool) -> None:
        prefix = sequence.prefix
        assert prefix is not None
        if prefix in self._snapshots:
            self._snapshots.move_to_end(prefix)
        elif self._has_room():
            self._snapshots[prefix] = next(self._ids)
            self.forks.append(Fork(self._snapshots[prefix], sequence.id, sequence.position))
            if generates:
                self._latest[sequence] = prefix

    def _has_room(self) -> bool:
        """Whether there is room for one more, once the least recently used ones have gone."""
        for prefix in list(self._snapshots):
            if len(self._snapshots) < self._most_snapshots:
                break
            self._drop(prefix)
        return len(self._snapshots) < self._most_snapshots

    def _drop(self, prefix: Prefix | None) -> None:
        """Unless the next plan makes it, or begins with it: it ends sequences before that."""
        number = None if prefix is None else self._snapshots.get(prefix)
        if prefix is None or number is None:
            return
        if not any(number in (fork.old, fork.new) for fork in self.forks):
            del self._snapshots[prefix]
            self.free.append(number)
