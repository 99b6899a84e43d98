"""The messages of a recovery one by one, and those that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import pytest

from tests.unit.recovery.test_log import Plan
from zmoe.errors import PeerError, ZmoeError
from zmoe.recovery.actions import (
    Connect,
    End,
    Evict,
    GiveUp,
    Halt,
    Open,
    Repeat,
    Resume,
    Send,
    Tell,
)
from zmoe.recovery.adopt import Holding, Stock
from zmoe.recovery.leader import LeaderRecovery, Patience, Phase
from zmoe.recovery.messages import (
    Adopted,
    Evicted,
    FromLeader,
    FromNode,
    Halted,
    Mesh,
    Opened,
    Quiesce,
    Suspect,
    View,
)
from zmoe.recovery.node import NodeRecovery
from zmoe.recovery.view import ClusterView, Slices, first_view

PATIENCE = Patience(quiesce=2.0, open=3.0, adopt=4.0, silence=10.0)


def leader(nodes: int = 3, disk: tuple[int, ...] = (0, 1, 2, 3)) -> LeaderRecovery:
    """In step 2."""
    sessions = count(100)
    holdings = {node: Holding(1000, {node: 10}, disk) for node in range(nodes)}
    stock = Stock((10,) * nodes, holdings, mapped=True)
    made = LeaderRecovery(
        first_view(nodes, 1), stock, PATIENCE, lambda: next(sessions), rewinds=True
    )
    made.begin(Plan(1))
    made.finish(1)
    made.begin(Plan(2))
    return made


def test_a_loss_from_its_first_sign_to_the_end() -> None:
    """Node 2 is lost in step 2, which node 1 had not finished, nor step 1."""
    it = leader()
    actions = it.receive(1, Suspect(0, 0, 2), 5.0)
    assert actions == [Send(1, Quiesce(1)), Send(2, Quiesce(1)), Halt()]
    assert it.receive(1, Halted(1, 0), 5.1) == []
    assert it.tick(6.9) == []
    actions = it.tick(7.0)
    view = ClusterView(1, 100, (0, 1, 0), (0, 1), 0)
    reason = "did not halt in time"
    assert actions[:2] == [Send(2, Evicted(reason)), Evict(2, reason)]
    assert actions[2:] == [Send(1, View(view)), Open(view)]
    assert it.receive(2, Halted(1, 2), 7.1) == []  # it is out
    assert it.opened(1, "a", 7.1) == []
    assert it.receive(1, Opened(1, "b"), 7.2) == [
        Send(1, Mesh(1, ("a", "b"))),
        Connect(view, ("a", "b")),
    ]
    assert it.receive(1, Adopted(1), 7.3) == []
    assert it.adopted(1, 7.4) == [Repeat((Plan(1), Plan(2)), known=1)]
    assert it.phase is Phase.REPEAT
    with pytest.raises(ZmoeError, match="plan 3 in a recovery"):
        it.begin(Plan(3))
    assert it.finish(1) == []
    assert it.finish(2) == [Resume(view)]
    it.begin(Plan(3))


@pytest.mark.parametrize(
    ("signs", "gone"),
    [
        ([(1, 2)], 2),
        ([(2, 1)], 1),
        ([(1, 2), (2, 1)], 2),
        ([(2, 1), (3, 1), (1, 3)], 1),
        ([(3, 0)], 3),
        ([(0, 1)], 1),
        ([(1, 2), (2, 0)], 2),
    ],
)
def test_who_is_more_accused_goes(signs: list[tuple[int, int]], gone: int) -> None:
    it = leader(4)
    for rank, lost in signs:
        if rank:
            it.receive(rank, Suspect(0, 1, lost), 0.0)
        else:
            it.lost(lost, 0.0)
    actions = [it.receive(rank, Halted(1, 1), 0.1) for rank in (1, 2, 3)][-1]
    assert [action.rank for action in actions if isinstance(action, Evict)] == [gone]
    assert it.view.nodes == tuple(node for node in range(4) if node != gone)


def test_who_is_silent_in_the_exchange_need_not_answer() -> None:
    """The link with node 1 is gone, which ends the wait; that with node 2 stands: it computes."""
    it = leader()
    assert it.receive(2, Suspect(0, 1, 1), 5.0) == [
        Send(1, Quiesce(1)),
        Send(2, Quiesce(1)),
        Halt(),
    ]
    reason = "does not answer"
    assert it.lost(1, 5.1) == [Send(1, Evicted(reason)), Evict(1, reason)]
    assert it.lost(1, 5.2) == it.tick(6.9) == []
    actions = it.receive(2, Halted(1, 1), 6.9)
    assert isinstance(actions[-1], Open) and actions[-1].view.nodes == (0, 2)
    assert it.lost(1, 7.0) == []


def test_the_leader_alone_has_lost_a_node() -> None:
    it = leader(2)
    assert it.lost(1, 5.0)[1:] == [Send(1, Quiesce(1)), Halt()]
    assert it.lost(1, 5.1)[:2] == [Send(1, Evicted("does not answer")), Evict(1, "does not answer")]
    assert it.view.nodes == (0,)


def test_who_has_answered_is_not_lost_by_that() -> None:
    it = leader()
    it.receive(2, Suspect(0, 1, 1), 5.0)
    it.receive(2, Halted(1, 1), 5.1)
    assert it.lost(2, 5.2) == []
    it.receive(1, Halted(1, 1), 5.3)
    assert it.view.nodes == (0, 2)  # as its suspicion says


def test_a_death_explains_what_else_was_suspected() -> None:
    it = leader(4)
    it.receive(1, Suspect(0, 1, 2), 0.0)
    it.ended(3, "was killed by signal 9", 0.1)
    it.receive(1, Halted(1, 1), 0.2)
    it.receive(2, Halted(1, 1), 0.2)
    assert it.view.nodes == (0, 1, 2)


def test_down_to_the_leader_alone() -> None:
    it = leader(2)
    actions = it.ended(1, "was killed by signal 9", 0.0)
    view = ClusterView(1, 100, (0, 0), (0,), 1)
    assert actions[2:] == [Halt(), Open(view)]
    assert it.opened(1, "a", 0.1) == [Connect(view, ("a",))]
    assert it.adopted(1, 0.2) == [Repeat((Plan(2),), known=1)]
    assert it.finish(2) == [Resume(view)]


def test_it_gives_up_where_a_shard_is_lost() -> None:
    it = leader(2, disk=())
    (halt, give_up) = it.ended(1, "was killed by signal 9", 0.0)[-2:]
    assert halt == Halt() and isinstance(give_up, GiveUp)
    assert "shard 1" in str(give_up.error)
    assert it.ended(1, "again", 0.1) == it.receive(1, Adopted(1), 0.1) == it.tick(99.0) == []


def test_a_node_returns() -> None:
    it = leader(2)
    with pytest.raises(ZmoeError, match="node 1 cannot return"):
        it.returned(1, Holding(5, {1: 10}, ()))
    it.ended(1, "was killed by signal 9", 0.0)
    it.opened(1, "a", 0.1)
    it.adopted(1, 0.2)
    with pytest.raises(ZmoeError, match="node 7 cannot return"):
        it.returned(7, Holding(5, {1: 10}, ()))
    it.returned(1, Holding(5, {1: 10}, ()))
    with pytest.raises(ZmoeError, match="node 1 cannot return"):
        it.returned(1, Holding(5, {1: 10}, ()))
    assert it.admit(0.3) == []  # after the recovery
    it.finish(2)
    assert it.waiting_to_enter == (1,)
    actions = it.admit(0.4)
    view = ClusterView(2, 101, (0, 1), (0, 1), 2, fresh=True)
    assert actions == [Halt(), Send(1, View(view)), Open(view)]


def test_nodes_that_divide_the_weights_anew() -> None:
    """Nobody adopts; what is lost is a new share, in a view of as many shards as nodes."""

    def divide(nodes: Sequence[int]) -> Slices:
        if len(nodes) == 1:
            raise ZmoeError("one node has no room")
        return ((0, 4), (4, 8))

    stock = Stock((10,) * 3, {}, mapped=False)
    it = LeaderRecovery(first_view(3, 1), stock, PATIENCE, lambda: 5, rewinds=False, divide=divide)
    it.begin(Plan(1))
    it.begin(Plan(2))  # before the end of the one before
    it.finish(1)
    it.ended(1, "was killed by signal 9", 0.0)
    view = ClusterView(1, 5, (0, 2), (0, 2), 2, True, ((0, 4), (4, 8)))
    assert it.receive(2, Halted(1, 1), 0.1) == [Send(2, View(view)), Open(view)]
    it.opened(1, "a", 0.2)
    it.receive(2, Opened(1, "b"), 0.2)
    it.adopted(1, 0.3)
    assert it.receive(2, Adopted(1), 0.3) == [Resume(view)]
    it.begin(Plan(3))
    actions = it.ended(2, "was killed by signal 9", 0.4)
    assert isinstance(actions[-1], GiveUp) and str(actions[-1].error) == "one node has no room"


def in_quiesce() -> LeaderRecovery:
    it = leader()
    it.lost(2, 0.0)
    return it


def in_open() -> LeaderRecovery:
    it = in_quiesce()
    it.ended(2, "has ended", 0.1)
    it.receive(1, Halted(1, 1), 0.2)
    assert it.phase is Phase.OPEN
    return it


@pytest.mark.parametrize(
    ("make", "message", "fault"),
    [
        (leader, Halted(0, 1), "node 1 sent Halted of epoch 0; in epoch 0 .* to run"),
        (leader, Suspect(1, 1, 2), "Suspect of epoch 1; in epoch 0"),
        (leader, Suspect(0, 1, 1), "node 1 has lost node 1, which it never had"),
        (leader, Suspect(0, 1, 9), "node 1 has lost node 9, which it never had"),
        (in_quiesce, Opened(1, "b"), "Opened of epoch 1; in epoch 1 it was expected to halt"),
        (in_quiesce, Suspect(1, 1, 2), "Suspect of epoch 1; in epoch 1"),
        (in_open, Halted(1, 1), "Halted of epoch 1; in epoch 1 it was expected to open"),
        (in_open, Adopted(1), "Adopted of epoch 1"),
    ],
)
def test_messages_out_of_turn(
    make: Callable[[], LeaderRecovery], message: FromNode, fault: str
) -> None:
    with pytest.raises(ZmoeError, match=fault):
        make().receive(1, message, 0.3)


def test_stale_messages() -> None:
    assert in_open().receive(1, Suspect(0, 1, 2), 0.3) == []
    node = halted()
    assert node.receive(Quiesce(0), 0.3) == []


def halted() -> NodeRecovery:
    node = NodeRecovery(1, first_view(3, 1), 10.0)
    assert node.takes(1)
    node.finish(1)
    assert node.lost(2, 0.0) == [Halt(), Tell(Suspect(0, 1, 2))]
    assert node.lost(0, 0.0) == []
    assert not node.takes(2)
    assert node.receive(Quiesce(1), 0.0) == [Halt(), Tell(Halted(1, 1))]
    return node


def test_a_node_goes_along() -> None:
    node = halted()
    view = ClusterView(1, 7, (0, 1, 1), (0, 1), 0)
    assert node.receive(View(view), 0.1) == [Open(view)]
    assert node.done == 0
    assert node.opened(0, "late", 0.2) == []
    assert node.opened(1, "b", 0.2) == [Tell(Opened(1, "b"))]
    assert node.receive(Mesh(1, ("a", "b")), 0.3) == [Connect(view, ("a", "b"))]
    assert node.adopted(1) == [Tell(Adopted(1))]
    assert node.takes(1) and node.tick(99.0) == []
    assert node.receive(Evicted("is late"), 1.0)[0] == Halt()
    assert node.receive(Quiesce(2), 1.0) == node.tick(99.0) == []


def test_a_leader_that_falls_silent() -> None:
    node = halted()
    assert node.tick(9.9) == []
    (_, end) = node.tick(10.0)
    assert isinstance(end, End) and isinstance(end.error, PeerError)
    assert "rank 0 said nothing for 10 s in a recovery" in str(end.error)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (Quiesce(3), "Quiesce of epoch 3 when node 1 was halted in epoch 1"),
        (Mesh(1, ()), "Mesh of epoch 1 when node 1 was halted"),
        (View(ClusterView(2, 7, (0, 1), (0, 1), 0)), "View of epoch 2 when"),
        (View(ClusterView(1, 7, (0, 0), (0,), 0)), "a view without it"),
        (View(ClusterView(1, 7, (0, 1), (0, 1), 2)), "keep step 2, node 1 has finished step 1"),
    ],
)
def test_what_no_leader_sends(message: FromLeader, fault: str) -> None:
    with pytest.raises(ZmoeError, match=fault):
        halted().receive(message, 0.1)


def test_steps_out_of_turn() -> None:
    node = NodeRecovery(1, first_view(2, 1), 10.0)
    node.finish(4)
    with pytest.raises(ZmoeError, match="step 4 came after step 4, when node 1 was running"):
        node.takes(4)
    with pytest.raises(ZmoeError, match="step 3 ended after step 4"):
        node.finish(3)
    with pytest.raises(ZmoeError, match="step 2 came after step 1, when node 1 was halted"):
        halted().takes(2)
    entering = NodeRecovery(1, None, 10.0)
    with pytest.raises(ZmoeError, match="Quiesce of epoch 0 when node 1 was entering"):
        entering.receive(Quiesce(0), 0.0)
