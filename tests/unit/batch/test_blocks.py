"""Blocks and prefixes: what is shared, what goes first, and what a hash alone may not decide."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from zmoe.batch import blocks as module
from zmoe.batch.blocks import Blocks
from zmoe.batch.plan import BLOCK
from zmoe.batch.sequence import Sequence


def sequence(tokens: Iterable[int], salt: bytes = b"", number: int = 0) -> Sequence:
    tokens = list(tokens)
    return Sequence(
        id=number,
        tokens=tokens,
        prompt=len(tokens),
        limit=10**6,
        salt=salt,
        submitted=0.0,
        borders=[],
        drafts=None,
    )


def computed(blocks: Blocks, one: Sequence) -> Sequence:
    """Begin `one`, compute and end it."""
    assert blocks.begin(one, blocks.find(one), 0)
    blocks.keep(one, len(one.tokens))
    blocks.end(one)
    return one


def test_never_used_blocks_come_lowest_first_and_before_cached_ones_go() -> None:
    blocks = Blocks(6)
    computed(blocks, sequence(range(2 * BLOCK + 1)))  # two cached, one spare
    other = sequence(range(1000, 1000 + 3 * BLOCK))
    assert blocks.begin(other, blocks.find(other), 0)
    assert other.blocks == [2, 3, 4]
    assert blocks.find(sequence(range(2 * BLOCK + 1))).blocks == (0, 1)


def test_the_last_token_is_always_computed() -> None:
    blocks = Blocks(8)
    computed(blocks, sequence(range(2 * BLOCK)))
    assert blocks.find(sequence(range(2 * BLOCK))).length == BLOCK
    assert blocks.find(sequence(range(2 * BLOCK + 1))).length == 2 * BLOCK


def test_another_salt_shares_nothing() -> None:
    blocks = Blocks(8)
    computed(blocks, sequence(range(100), b"mine"))
    assert blocks.find(sequence(range(100), b"mine")).length == BLOCK
    assert blocks.find(sequence(range(100), b"other")).length == 0
    assert blocks.find(sequence(range(100))).length == 0


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    blocks = Blocks(4)
    computed(blocks, sequence(range(2 * BLOCK)))
    computed(blocks, sequence(range(500, 500 + 2 * BLOCK)))
    again = sequence(range(2 * BLOCK + 1))
    found = blocks.find(again)
    assert found.length == 2 * BLOCK
    assert blocks.begin(again, found, 0)  # takes the end of the other one
    assert blocks.find(sequence(range(500, 500 + 2 * BLOCK + 1))).length == BLOCK


def test_running_sequences_share_and_the_last_one_frees() -> None:
    blocks = Blocks(4)
    first, second = sequence(range(100)), sequence([*range(64), 7], number=1)
    assert blocks.begin(first, blocks.find(first), 0)
    blocks.keep(first, 100)
    assert blocks.begin(second, blocks.find(second), 0)
    assert first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]
    blocks.end(first)
    assert blocks.available == 2
    blocks.end(second)
    assert blocks.available == 4


def test_a_reserve_is_left_and_cached_hits_are_not_counted_twice() -> None:
    blocks = Blocks(3)
    computed(blocks, sequence(range(BLOCK)))
    again = sequence(range(BLOCK + 1))
    assert not blocks.begin(again, blocks.find(again), 2)
    assert blocks.begin(again, blocks.find(again), 1)


def test_the_same_text_twice_keeps_the_chain() -> None:
    """Two sequences compute the same block; what the second one adds is found behind it."""
    blocks = Blocks(8)
    first, second = sequence(range(BLOCK)), sequence(range(2 * BLOCK), number=1)
    for one in (first, second):
        assert blocks.begin(one, blocks.find(one), 0)
    blocks.keep(first, BLOCK)
    blocks.keep(second, 2 * BLOCK)
    found = blocks.find(sequence(range(2 * BLOCK + 1)))
    assert found.blocks == (first.blocks[0], second.blocks[1])


class _SameForAll:
    def __init__(self, *_: object, **__: object) -> None: ...

    def digest(self) -> bytes:
        return b"same"


def test_equal_hashes_of_different_texts_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "blake2b", _SameForAll)
    blocks = Blocks(16)
    computed(blocks, sequence(range(2 * BLOCK)))
    assert blocks.find(sequence(range(1, 2 * BLOCK))).length == 0
    assert blocks.find(sequence([*range(BLOCK), *range(BLOCK + 1)])).length == BLOCK
    assert blocks.find(sequence(range(2 * BLOCK + 1), b"salt")).length == 0
    assert blocks.find(sequence(range(2 * BLOCK + 1))).length == 2 * BLOCK


def test_what_lost_its_beginning_is_not_found_behind_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second block stays while the first one goes and another text gets its hash."""
    monkeypatch.setattr(module, "blake2b", _SameForAll)
    blocks = Blocks(16)
    first, double = sequence(range(BLOCK)), sequence(range(2 * BLOCK), number=1)
    for one in (first, double):
        assert blocks.begin(one, blocks.find(one), 0)
    blocks.keep(first, BLOCK)
    blocks.keep(double, 2 * BLOCK)  # its second block, behind the block of `first`
    blocks.end(first)
    while first_is_cached := blocks.find(sequence(range(BLOCK + 1))).length:
        taken = sequence([0] * BLOCK, number=2)
        assert first_is_cached == BLOCK and blocks.begin(taken, blocks.find(taken), 0)
    other = [5] * BLOCK
    blocks.end(taken)
    computed(blocks, sequence(other, number=3))
    assert blocks.find(sequence([*other, *range(BLOCK, 2 * BLOCK), 0])).length == BLOCK
