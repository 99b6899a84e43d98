"""Any faults at any event: one view an epoch, the undisturbed run's text, and always an end."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.recovery.network import PEER_S, Fault, Network, undisturbed
from zmoe.recovery.leader import Phase
from zmoe.recovery.node import NodeRecovery, State

KINDS = ["kill", "kill", "kill", "cut", "half", "stall", "unlink", "come back"]


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[int, list[Fault]]:
    nodes = draw(st.integers(2, 5))
    ranks = st.integers(0, nodes - 1)
    workers = st.integers(1, nodes - 1)
    faults = []
    for _ in range(draw(st.integers(1, 5))):
        kind, event = draw(st.sampled_from(KINDS)), draw(st.integers(0, 250))
        # The leader is killed now and then only, since that is the end.
        node = draw(st.sampled_from([0, *([1] * 9)])) and draw(workers)
        other = draw(ranks.filter(lambda rank, node=node: rank != node))
        seconds, silent = draw(st.sampled_from([1.0, 3.0, 9.0, 40.0])), draw(st.booleans())
        faults.append(Fault(event, kind, node, other, seconds, silent))
    return nodes, faults


def check(network: Network) -> None:
    """What holds after any run."""
    leader = network.leader
    shards = network.shards
    assert leader.out == undisturbed(shards, len(leader.out))
    if leader.gave_up:
        assert not network.room and "no node has room for shard" in str(leader.error)
        return
    if not leader.alive:
        assert not any(host.alive for host in network.hosts.values())
        return
    assert leader.machine.phase is Phase.RUNNING
    view = leader.machine.view
    for rank in view.nodes:
        host = network.hosts[rank]
        assert host.alive and host not in network.evicted
        assert host.opened == view
        assert host.cache and host.text == leader.text
        assert [step for step, _ in host.cache] == [step for step, _ in leader.cache]
        if isinstance(host.machine, NodeRecovery):
            assert host.machine.state is State.RUNNING and host.machine.done == leader.step
    assert leader.text == leader.out[:-1]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scenario=scenarios(),
    seed=st.integers(0, 2**32),
    form=st.sampled_from(["rewinds", "forgets", "divides"]),
    room=st.sampled_from([True, True, True, False]),
)
def test_any_faults(scenario: tuple[int, list[Fault]], seed: int, form: str, room: bool) -> None:
    nodes, faults = scenario
    network = Network(nodes, seed, faults, form, room)
    network.run()
    check(network)
    if network.leader.gave_up or not network.leader.alive:
        return
    left, kinds = network.leader.machine.view.nodes, [fault.kind for fault in faults]
    if set(kinds) == {"kill"}:
        assert set(left) == set(range(nodes)) - {fault.node for fault in faults}, "who lives stays"
    if kinds == ["stall"] and faults[0].seconds < PEER_S:
        assert len(left) == nodes, "a short stop costs nobody"
    if kinds in (["cut"], ["half"]):
        gone = {faults[0].node, faults[0].other} - set(left)
        assert len(left) == nodes - 1 and len(gone) == 1, "one of two goes"


@pytest.mark.parametrize("silent", [False, True])
def test_a_loss_at_every_event(silent: bool) -> None:
    """Of one worker, and of another one in the recovery, down to the leader alone."""
    ends = 0
    for event in range(0, 120):
        for second in (None, 3, 25, 60):
            faults = [Fault(event, "kill", 1, silent=silent)]
            if second is not None:
                faults.append(Fault(event + second, "kill", 2, silent=silent))
            network = Network(3, event, faults)
            network.run()
            check(network)
            ends += len(network.leader.machine.view.nodes) == 3 - len(faults)
    assert ends == 480
