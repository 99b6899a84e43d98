"""When a node is called slow, and when no longer."""

from __future__ import annotations

import random

from zmoe.cluster.stragglers import Stragglers

HERE = (0, 1, 2)
USUAL = {0: 0.03, 1: 0.02, 2: 0.02}


def test_a_node_becomes_slow_and_recovers() -> None:
    nodes = Stragglers()
    told = [nodes.add({**USUAL, 1: 0.2}, HERE) for _ in range(8)]
    line = "node 1 is slow: it computes 200 ms in a step, and others 20 ms"
    assert told == [[]] * 4 + [[line]] + [[]] * 3
    assert nodes.slow == {1: "it computes 200 ms in a step, and others 20 ms"}
    assert nodes.seconds == {**USUAL, 1: 0.2}
    told = [nodes.add({**USUAL, 1: 0.06}, HERE) for _ in range(8)]  # three times is still slow
    assert told == [[]] * 8 and 1 in nodes.slow
    told = [nodes.add(USUAL, HERE) for _ in range(8)]
    assert told == [[]] * 2 + [["node 1 is no longer slow"]] + [[]] * 5
    assert nodes.slow == {}


def test_the_leader_and_several_nodes_can_be_slow() -> None:
    nodes = Stragglers()
    for _ in range(5):
        nodes.add({0: 0.3, 1: 0.02}, (0, 1))
    assert set(nodes.slow) == {0}
    for _ in range(5):
        nodes.add({0: 0.02, 1: 0.3, 2: 0.5}, HERE)
    assert set(nodes.slow) == {1, 2}


def test_noise_names_nobody() -> None:
    draw, nodes = random.Random(1), Stragglers()
    for number in range(500):  # now and then one takes 20 times as long, or everything does
        seconds = {rank: draw.uniform(0.02, 0.04) for rank in range(4)}
        if number % 3 == 0:
            seconds[draw.randrange(4)] *= 20
        if number % 7 == 0:
            seconds = {rank: 30 * spent for rank, spent in seconds.items()}
        assert nodes.add(seconds, (0, 1, 2, 3)) == []


def test_what_costs_nobody_anything_is_not_slow() -> None:
    nodes = Stragglers()
    for _ in range(20):  # many times as long, but the others wait for 9 ms
        assert nodes.add({0: 0.0, 1: 0.009}, (0, 1)) == []
        assert nodes.add({0: 1.0}, (0, 1)) == []  # nobody to be compared with


def test_whoever_computes_several_shares_may_take_longer() -> None:
    alone, hosting = Stragglers(), Stragglers()
    for _ in range(5):
        alone.add({0: 0.02, 1: 0.1}, (0, 1, 2))
        hosting.add({0: 0.02, 1: 0.1}, (0, 1, 1))
    assert set(alone.slow) == {1} and hosting.slow == {}


def test_another_view_begins_anew() -> None:
    nodes = Stragglers()
    for _ in range(5):
        nodes.add({**USUAL, 1: 0.2}, HERE)
    assert nodes.add({0: 0.02, 2: 0.02}, (0, 2, 2)) == [] and nodes.slow == {}
    assert nodes.add({**USUAL, 1: 0.2}, HERE) == [] and nodes.slow == {}
