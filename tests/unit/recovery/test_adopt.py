"""Who adopts what."""

from __future__ import annotations

import pytest

from zmoe.errors import ZmoeError
from zmoe.recovery.adopt import Holding, Stock, adopt

ALL = (0, 1, 2, 3)


def stock(
    free: tuple[int, ...], held: dict[int, dict[int, int]] | None = None, mapped: bool = True
) -> Stock:
    """Four nodes with a shard of 100 bytes each, and what they hold of others' shards."""
    holdings = {
        node: Holding(room, {node: 100, **(held or {}).get(node, {})}, ALL)
        for node, room in enumerate(free)
    }
    return Stock((100,) * 4, holdings, mapped)


def test_whoever_holds_most_adopts() -> None:
    have = stock((500, 400, 300, 0), {1: {3: 10}, 2: {3: 60}})
    assert adopt(ALL, (0, 1, 2), have) == ((0, 1, 2, 2), ())


def test_room_comes_before_what_is_held() -> None:
    have = stock((100, 90, 30, 0), {2: {3: 60}})
    assert adopt(ALL, (0, 1, 2), have)[0] == (0, 1, 2, 0)
    assert adopt(ALL, (0, 1, 2), stock((0, 0, 0, 0), {2: {3: 100}})) == ((0, 1, 2, 2), ())


def test_then_whoever_has_most_room_and_the_lowest_rank() -> None:
    assert adopt(ALL, (0, 1, 2), stock((200, 300, 200, 0)))[0] == (0, 1, 2, 1)
    assert adopt(ALL, (0, 1, 2), stock((200, 200, 200, 0)))[0] == (0, 1, 2, 0)


def test_several_shards_are_spread() -> None:
    assert adopt(ALL, (0, 1), stock((10**6, 10**5, 0, 0)))[0] == (0, 1, 0, 1)
    assert adopt(ALL, (0,), stock((300, 0, 0, 0))) == ((0, 0, 0, 0), ())
    # What was adopted before takes room.
    assert adopt((0, 1, 1, 3), (0, 1), stock((100, 150, 0, 0)))[0] == (0, 1, 1, 0)


def test_larger_shards_are_given_first() -> None:
    holdings = {0: Holding(100, {}, ALL), 1: Holding(60, {}, ALL)}
    assert adopt((0, 1, 2, 3), (0, 1), Stock((0, 0, 50, 90), holdings, False))[0] == (0, 1, 1, 0)


def test_without_room_weights_are_mapped_or_it_ends() -> None:
    placed, notices = adopt(ALL, (0, 1, 2), stock((20, 30, 10, 0)))
    assert placed == (0, 1, 2, 1)
    assert len(notices) == 1 and "node 1 adopts shard 3 with 70 bytes too little" in notices[0]
    with pytest.raises(ZmoeError, match="no node has room for shard 3.*: node 1 lacks 70 bytes"):
        adopt(ALL, (0, 1, 2), stock((20, 30, 10, 0), mapped=False))


def test_a_shard_that_no_disk_has() -> None:
    holdings = {0: Holding(500, {}, (0, 1)), 1: Holding(500, {2: 99}, (0, 1))}
    have = Stock((100,) * 3, holdings, True)
    assert adopt((0, 1, 0), (0, 1), have)[0] == (0, 1, 0)
    with pytest.raises(ZmoeError, match="shard 2, which node 2 hosted, is on no other node's disk"):
        adopt((0, 1, 2), (0, 1), have)
    whole = {**holdings, 1: Holding(0, {2: 100}, (0, 1))}  # it needs no disk
    assert adopt((0, 1, 2), (0, 1), Stock((100,) * 3, whole, True))[0] == (0, 1, 1)
