"""Views that are none are refused."""

from __future__ import annotations

import pytest

from tests.changed import changed
from zmoe.errors import SettingError
from zmoe.recovery.leader import Patience
from zmoe.recovery.view import ClusterView, first_view

VIEW = ClusterView(epoch=3, session=9, hosts=(0, 2, 2, 0), nodes=(0, 2), base=7)


def test_shards_of_a_node() -> None:
    assert VIEW.shards_of(2) == (1, 2)
    assert VIEW.shards_of(1) == ()
    assert first_view(3, 5) == ClusterView(0, 5, (0, 1, 2), (0, 1, 2), 0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"epoch": -1}, "epoch is -1"),
        ({"session": 2**63}, "session is 9223372036854775808"),
        ({"nodes": ()}, "nodes has 0"),
        ({"nodes": (1, 2)}, r"nodes is \(1, 2\)"),
        ({"nodes": (0, 2, 2)}, "nodes is"),
        ({"hosts": ()}, "hosts has 0 shards"),
        ({"hosts": (0, 1, 2, 0)}, "gives shard 1 to node 1, which is gone"),
        ({"hosts": (0,) * 65}, "hosts has 65 shards"),
        ({"base": -1}, "base is -1"),
    ],
)
def test_refused(changes: dict[str, object], fault: str) -> None:
    bad = changed(VIEW, changes)
    with pytest.raises(SettingError, match=fault):
        ClusterView(bad.epoch, bad.session, bad.hosts, bad.nodes, bad.base)


def test_the_next_view() -> None:
    made = VIEW.next(10, (0,) * 4, (0,), 8, fresh=True)
    assert made == ClusterView(4, 10, (0,) * 4, (0,), 8, True)
    with pytest.raises(SettingError, match="hosts has 3 shards: expected 4"):
        VIEW.next(10, (0,) * 3, (0,), 8, fresh=False)
    with pytest.raises(SettingError, match="session is that of the view before"):
        VIEW.next(9, (0,) * 4, (0,), 8, fresh=False)


def test_a_view_whose_nodes_divide_the_weights() -> None:
    made = VIEW.divided(10, [0, 2], 8, ((0, 5), (5, 8)))
    assert made == ClusterView(4, 10, (0, 2), (0, 2), 8, True, ((0, 5), (5, 8)))
    assert made.shards_of(2) == (1,)
    with pytest.raises(SettingError, match="slices has 1 of 2 nodes"):
        VIEW.divided(10, [0, 2], 8, ((0, 8),))
    with pytest.raises(SettingError, match=r"hosts is \(0, 2, 2, 0\): expected the nodes \(0, 2\)"):
        ClusterView(4, 10, VIEW.hosts, (0, 2), 8, True, made.slices)


def test_a_node_waits_longest() -> None:
    with pytest.raises(SettingError, match="silence is 5 s: expected more than the leader's 5 s"):
        Patience(1.0, 2.0, 5.0, 5.0)
