"""Which blocks of keys and values each sequence has, and which sequences share them.

After vLLM's block pool and automatic prefix caching; here a hit compares tokens too.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from zmoe.batch.plan import BLOCK, UNBOUNDED, Fork, blocks_of

if TYPE_CHECKING:
    from zmoe.batch.sequence import Sequence


class Prefix:
    """A text: that of `parent`, and the tokens of one more block. Equal where the texts are.

    The first one of a chain has no parent and stands for a salt. Its hash covers all
    of the text; where hashes agree, the tokens are compared.
    """

    __slots__ = ("digest", "parent", "tokens")

    def __init__(self, parent: Prefix | None, tokens: bytes) -> None:
        self.parent, self.tokens = parent, tokens
        before = parent.digest if parent else b""
        self.digest: bytes = blake2b(before + tokens, digest_size=16).digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        """Compares back to the first parent that both share, usually the nearest one."""
        mine: object = self
        while mine is not other:
            if not isinstance(mine, Prefix) or not isinstance(other, Prefix):
                return False
            if mine.tokens != other.tokens:
                return False
            mine, other = mine.parent, other.parent
        return True

    def then(self, tokens: Iterable[int]) -> Prefix:
        """This text and 64 more `tokens`."""
        return Prefix(self, array("Q", tokens).tobytes())


@dataclass(frozen=True)
class Found:
    """The first `length` positions of a text that need no computing, and where they are.

    They are in `blocks`, which hold the text of `prefix`, or in the snapshot of that number.
    """

    length: int
    blocks: tuple[int, ...] = ()
    prefix: Prefix | None = None
    snapshot: int | None = None


class Blocks:
    """The allocator of `count` blocks, numbered from 0, for all nodes alike.

    A block belongs to any number of sequences. One that belongs to none and whose text is
    known stays cached until no other block is left; the least recently used goes first.
    Numbers never used come lowest first, so that the memory behind the others stays untouched.

    With `most`, a sequence has no more blocks than that: all but its first one take turns as
    its positions go on, and nobody else can find what they hold.
    """

    def __init__(self, count: int, most: int | None = None) -> None:
        self.count = count
        self._most = UNBOUNDED if most is None else most
        self._rings = most is not None
        self.free: list[int] = []  # the sequences that ended since the last plan
        self.forks: list[Fork] = []  # there are none with blocks
        self._owners = [0] * count
        self._unused = 0  # the first block that was never used
        self._spare: list[int] = []  # blocks that were used and hold nothing of worth
        self._cached: OrderedDict[int, None] = OrderedDict()  # without owners, text known
        self._blocks: dict[Prefix, int] = {}
        self._prefixes: dict[int, Prefix] = {}

    @property
    def available(self) -> int:
        """Blocks that belong to no sequence."""
        return self.count - self._unused + len(self._spare) + len(self._cached)

    def borders(self, prompt: int, wanted: tuple[int, ...]) -> list[int]:
        """Where the cache must be kept as it is: nowhere, since blocks are shared anywhere."""
        return []

    def find(self, sequence: Sequence) -> Found:
        """The longest cached beginning of its tokens, in full blocks and without the last token."""
        tokens, blocks = sequence.tokens, []
        prefix = Prefix(None, sequence.salt)
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            block = self._blocks.get(prefix.then(tokens[start : start + BLOCK]))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefixes[block]  # not an equal one: the next comparison is short
        return Found(len(blocks) * BLOCK, tuple(blocks), prefix)

    def begin(self, sequence: Sequence, found: Found, reserve: int) -> bool:
        """Give it blocks for all its tokens if `reserve` blocks are left beyond them."""
        lacking = self._lacking(len(found.blocks), len(sequence.tokens))
        idle = sum(not self._owners[block] for block in found.blocks)
        if self.available - idle < lacking + reserve:
            return False
        for block in found.blocks:
            if not self._owners[block]:
                del self._cached[block]
            self._owners[block] += 1
        sequence.blocks = [*found.blocks]
        self._extend(sequence, len(sequence.tokens))
        sequence.position = found.length
        sequence.prefix, sequence.kept = found.prefix, len(found.blocks)
        return True

    def grow(self, sequence: Sequence, end: int) -> bool:
        """Make room for `end` positions; False, and no change, where blocks are lacking."""
        if self._lacking(len(sequence.blocks), end) > self.available:
            return False
        self._extend(sequence, end)
        return True

    def keep(self, sequence: Sequence, length: int) -> None:
        """From now on others may find the blocks of its first `length` tokens."""
        if self._rings:
            sequence.kept = length // BLOCK
            return
        for index in range(sequence.kept, length // BLOCK):
            assert sequence.prefix is not None
            tokens = sequence.tokens[index * BLOCK : (index + 1) * BLOCK]
            prefix, block = sequence.prefix.then(tokens), sequence.blocks[index]
            known = self._blocks.setdefault(prefix, block)
            if known == block:
                self._prefixes[block] = prefix
            sequence.prefix = self._prefixes[known]
            sequence.kept = index + 1

    def known(self, text: Sequence) -> Found:
        """As find(): the blocks of running sequences are found, too."""
        return self.find(text)

    def adopt(self, text: Sequence, fill: Callable[[list[int]], None]) -> int:
        """Have `fill` write the full blocks of `text`, as many as there are free ones.

        Returns the number of tokens in them; `fill` may raise.
        """
        blocks = min(len(text.tokens) // BLOCK, self.available)
        del text.tokens[blocks * BLOCK :]
        if blocks and self.begin(text, Found(0, prefix=Prefix(None, text.salt)), 0):
            try:
                fill(text.blocks)
                self.keep(text, len(text.tokens))
            finally:
                self.end(text)
        return len(text.tokens)

    def snapshot(self, sequence: Sequence) -> int:
        """The number of tokens after which a chunk must end: any will do."""
        return len(sequence.tokens)

    def end(self, sequence: Sequence, keep: bool = True) -> None:
        """Take its blocks back; those whose text is known stay cached, its first ones longest."""
        for block in reversed(sequence.blocks[: self._most]):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._prefixes:
                self._cached[block] = None
            else:
                self._spare.append(block)
        if sequence.sent:
            self.free.append(sequence.id)
        sequence.blocks, sequence.room, sequence.sent = [], 0, 0

    def forget(self) -> None:
        """No block has a text any more, on any node; no sequence is running."""
        self._spare += self._cached
        self._cached.clear()
        self._blocks.clear()
        self._prefixes.clear()
        self.free.clear()

    def _lacking(self, held: int, end: int) -> int:
        """How many blocks a sequence that has `held` ones needs for `end` positions."""
        return min(blocks_of(end), self._most) - min(held, self._most)

    def _extend(self, sequence: Sequence, end: int) -> None:
        """Take blocks for `end` positions, or go round those that it has."""
        blocks = sequence.blocks
        for index in range(len(blocks), blocks_of(end)):
            again = index - (self._most - 1)
            blocks.append(blocks[again] if again > 0 else self._take())
        sequence.room = len(blocks) * BLOCK

    def _take(self) -> int:
        if self._spare:
            block = self._spare.pop()
        elif self._unused < self.count:
            block, self._unused = self._unused, self._unused + 1
        else:
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._prefixes.pop(block)]
        self._owners[block] = 1
        return block
