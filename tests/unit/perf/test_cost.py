"""One step's time: its terms, and what each answers to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.perf.busiest import Cost
from zmoe.perf.cost import Cluster, Step, StepTime, busiest_node, step_time
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link, all_reduce, round_latency, scatter_gather
from zmoe.perf.owners import Slices, Whole
from zmoe.perf.places import Place
from zmoe.perf.routing import distinct_experts
from zmoe.perf.shape import BF16, GroupedAttention, ModelShape, affine
from zmoe.placement.spread import proportional

ROUND = Machine(  # round figures to reckon with
    "round",
    2**40,
    bandwidth=1e12,
    rate=1e15,
    source="a test",
    bandwidth_efficiency=1.0,
    rate_efficiency=1.0,
    sync_s=1e-4,
    layer_s=1e-5,
)
WIRE = Link("wire", latency_s=1e-4, bandwidth=1e9, source="a test", per_peer_s=1e-5)
DBRX = MODELS["dbrx"]
DECODE = Step(rows=1, sequences=1, context=1, heads=1)


def timed(
    shape: ModelShape = DBRX,
    nodes: int = 2,
    step: Step = DECODE,
    machines: tuple[Machine, ...] | None = None,
    slices: bool = False,
    **how: object,
) -> StepTime:
    cluster = Cluster(machines or (ROUND,) * nodes, how.pop("link", WIRE), **how)  # type: ignore[arg-type]
    drawn = distinct_experts(shape.experts, shape.top_k, step.rows)
    experts = (
        Slices((1 / cluster.nodes,) * cluster.nodes)
        if slices
        else Whole(proportional(shape.experts, [1] * cluster.nodes), drawn)
    )
    return step_time(shape, cluster, step, experts)[0]


def test_the_terms_by_hand() -> None:
    """DBRX on two nodes, each term as the paper's model has it."""
    time = timed()
    attention = 2 * DBRX.attention_parameters + 2 * 2 * 8 * 128  # weights, one cached token
    router, experts = 2 * 6144 * 16, 2.646153846 * DBRX.expert_bytes
    head = 2 * 100352 * 6144
    assert time.load == pytest.approx((40 * (attention + router + experts) + head) / 1e12)
    assert time.compute == 0
    assert time.latency == pytest.approx(41 * 1e-4)  # a layer each, and the token to all
    assert time.transfer == pytest.approx(40 * 6144 * 2 / 1e9)
    assert time.overhead == pytest.approx(81 * 1e-4 + 40 * 1e-5)


def test_bytes_per_token_of_the_field() -> None:
    """FIELD.md, section 4: a model of 6.8B parameters in 4 bit, MB per token and node."""
    shape = ModelShape("6.8b", 2048, 16, GroupedAttention(16, 16, 128), 64, 8, 1024, 16384)
    shape = shape.with_format(affine(4))
    assert shape.parameters == pytest.approx(6.8e9, rel=0.01)
    loads = [timed(shape, nodes=1), timed(shape), timed(shape, slices=True)]
    megabytes = [time.load * ROUND.bandwidth / 1e6 for time in loads]
    assert megabytes == pytest.approx([623, 454, 396], rel=0.005)


def test_load_and_compute_overlap_or_add() -> None:
    loading, computing = 1e12, 3e15  # 2 TB in bfloat16
    both = Place(ROUND).matmul(BF16, loading, computing)
    assert (both.load, both.compute) == (2, 1)
    added = Place(replace(ROUND, overlap=0.0)).matmul(BF16, loading, computing)
    assert (added.load, added.compute) == (2, 3)
    assert Place(ROUND).matmul(BF16, loading, 1e15).compute == 0


def test_one_node_sends_nothing() -> None:
    alone = timed(nodes=1)
    assert alone.latency == alone.transfer == alone.communication_share == 0


def test_centralized_takes_two_rounds_a_layer() -> None:
    central = timed(schedule="centralized")
    assert central.latency == pytest.approx(80 * 1e-4)
    assert central.transfer == pytest.approx(2 * timed().transfer)
    assert central.load == pytest.approx(timed().load)


def test_policies() -> None:
    selected, aided, full = (
        timed(nodes=4, policy=policy) for policy in ("selected", "router-aided", "busy-full")
    )
    assert aided.total == pytest.approx(selected.total)
    more = (4 - 1.96923077) * DBRX.expert_bytes * 40 / 1e12
    assert full.load - selected.load == pytest.approx(more)


def test_the_drivers_wiring_falls_on_selected_only() -> None:
    cold = (replace(ROUND, wiring=1e11),) * 2
    wired = timed(machines=cold)
    assert wired.overhead > timed().overhead
    assert wired.load == timed().load
    for policy in ("busy-full", "router-aided"):
        warm = timed(machines=cold, policy=policy)
        assert warm.overhead == pytest.approx(timed(policy=policy).overhead)


def test_the_shared_expert_hides_messages() -> None:
    shape = replace(DBRX, shared_hidden=1)
    hidden = timed(shape)
    one = 2 * shape.shared_parameters / 1e12
    without = timed()
    assert hidden.latency + hidden.transfer == pytest.approx(
        without.latency + without.transfer - 40 * one
    )
    assert hidden.load == pytest.approx(without.load + 40 * one)
    assert timed(replace(DBRX, shared_hidden=10**6)).transfer == 0


def test_layers_without_experts_send_nothing() -> None:
    shape = replace(DBRX, dense_layers=10, dense_hidden=100)
    assert timed(shape).transfer == pytest.approx(timed().transfer * 30 / 40)


def test_slices_share_every_expert() -> None:
    whole, sliced = timed(nodes=4), timed(nodes=4, slices=True)
    fewer = (1.96923077 - 1) * DBRX.expert_bytes * 40 / 1e12
    assert whole.load - sliced.load == pytest.approx(fewer)


def test_everybody_waits_for_the_slowest_machine() -> None:
    slow = replace(ROUND, bandwidth=1e11)
    mixed = timed(machines=(ROUND, slow)).total
    assert timed(machines=(ROUND, ROUND)).total < mixed < timed(machines=(slow, slow)).total


def test_a_row_more_computes_no_expert_twice() -> None:
    """With one row, as many pairs as experts; with many, all pairs are shared out."""
    slow = replace(ROUND, rate=1e9, overlap=0.0)
    one = timed(nodes=1, machines=(slow,)).compute
    many = timed(nodes=1, machines=(slow,), step=Step(100, 100, 1, 100)).compute
    assert many == pytest.approx(100 * one)


def test_one_row_computes_what_was_selected_not_the_mean() -> None:
    """Two of four experts on a fast node and one ten times slower: by hand over all draws."""
    shape = replace(DBRX, experts=4, top_k=2)
    one = 2 * shape.expert_parameters / 1e12
    fast = replace(ROUND, rate=1e12, bandwidth=1e30)
    cluster = Cluster((fast, replace(fast, rate=1e11)), WIRE)
    owners = Whole((2, 2), distinct_experts(4, 2, 1))
    busiest = busiest_node(shape, cluster, DECODE, owners, [Cost(), Cost()])
    assert busiest.cost.compute == pytest.approx((1 * 2 + 4 * 10 + 1 * 20) / 6 * one)


@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(LINKS)),
    st.sampled_from(("decentralized", "centralized")),
    st.sampled_from(("selected", "busy-full", "router-aided")),
    st.integers(1, 8),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=60)
def test_better_parts_are_never_slower(
    model: str, link: str, schedule: str, policy: str, nodes: int, rows: int
) -> None:
    shape, machine, step = MODELS[model], MACHINES["m4-max"], Step(rows, rows, 1000, rows)
    how = {"schedule": schedule, "policy": policy}
    base = timed(shape, step=step, machines=(machine,) * nodes, link=LINKS[link], **how)
    assert min(base.load, base.compute, base.latency, base.transfer, base.overhead) >= 0
    assert 0 <= base.communication_share < 1
    for better in (
        replace(machine, bandwidth=machine.bandwidth * 2),
        replace(machine, rate=machine.rate * 2),
        replace(machine, sync_s=machine.sync_s / 2),
    ):
        time = timed(shape, step=step, machines=(better,) * nodes, link=LINKS[link], **how)
        assert time.total <= base.total + 1e-12
    faster = replace(LINKS[link], latency_s=1e-6, bandwidth=1e11)
    time = timed(shape, step=step, machines=(machine,) * nodes, link=faster, **how)
    assert time.total <= base.total + 1e-12


def test_messages() -> None:
    assert round_latency(WIRE, 1) == 0
    assert round_latency(WIRE, 4) == pytest.approx(1.2e-4)
    small, large = all_reduce(WIRE, 4, 1e3), all_reduce(WIRE, 4, 1e8)
    assert small.latency == pytest.approx(1.2e-4)
    assert small.transfer == pytest.approx(3e-6)
    assert large.latency == pytest.approx(2.4e-4)  # adding up in parts pays for a second round
    assert large.transfer == pytest.approx(0.15)
    gathered = scatter_gather(WIRE, 4, 1e3)
    assert gathered.latency == pytest.approx(2.4e-4)
    assert gathered.transfer == pytest.approx(6e-6)
