"""Predictions from what calibration measured, reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.measured import MatmulRate, StepRate, rates_of, step_rate
from zmoe.perf.shape import BF16, GroupedAttention, ModelShape, affine
from zmoe.placement.predict import Setup, Workload, predict

LAYERS, HIDDEN, EXPERTS, TOP_K, INNER, VOCABULARY = 10, 1000, 4, 2, 512, 8000
SHAPE = ModelShape(
    "s", HIDDEN, LAYERS, GroupedAttention(10, 10, 100), EXPERTS, TOP_K, INNER, VOCABULARY
)
ALONE2 = MatmulRate("bf16", 1, 2, dense=50e9, experts=40e9, expert_s=2e-6, many=1e15)
ALONE1 = MatmulRate("bf16", 1, 1, dense=30e9, experts=25e9, expert_s=3e-6, many=1e15)
BOTH = MatmulRate("bf16", 2, 1, dense=20e9, experts=15e9, expert_s=4e-6, many=1e15)
CACHES = tuple(replace(rate, format="cache") for rate in (ALONE2, ALONE1, BOTH))
STEPS = (
    StepRate(1, "decentralized", "selected", 10e-6, 100e-6),
    StepRate(1, "decentralized", "busy-full", 15e-6, 100e-6),
    StepRate(2, "decentralized", "selected", 60e-6, 130e-6),
    StepRate(2, "centralized", "selected", 90e-6, 120e-6),
    StepRate(2, "centralized", "busy-full", 190e-6, 120e-6),
    StepRate(4, "decentralized", "selected", 160e-6, 500e-6),
)
MACHINE = Machine(
    "here",
    2**40,
    bandwidth=1e9,  # nobody should look at these
    rate=1e9,
    source="a test",
    sync_s=0.0,
    layer_s=1.0,
    step_s=1.0,
    cores=2,
    rates=(ALONE2, ALONE1, BOTH, *CACHES),
    steps=STEPS,
)
NO_LINK = Link("none", 0.0, float("inf"), "a test", per_peer_s=0.0)

ATTENTION = 2 * (4 * HIDDEN * HIDDEN)  # bytes of a layer
CACHE = 2 * 2 * HIDDEN * 100  # of 100 tokens
ROUTER, HEAD = 2 * HIDDEN * EXPERTS, 2 * VOCABULARY * HIDDEN
EXPERT = 2 * 3 * HIDDEN * INNER


def step_s(nodes: int, machine: Machine = MACHINE, **how: str) -> float:
    workload = Workload(context=100)
    setup = Setup(SHAPE, (machine,), NO_LINK, workload, one_machine=True, **how)  # type: ignore[arg-type]
    return predict(setup, nodes).decode.total


def test_one_node_has_all_cores() -> None:
    dense = (ATTENTION + CACHE + ROUTER) / ALONE2.dense
    experts = 2 * (EXPERT / ALONE2.experts + ALONE2.expert_s)
    layer = dense + experts + 10e-6
    assert step_s(1) == pytest.approx(LAYERS * layer + HEAD / ALONE2.dense + 100e-6)


def test_two_nodes_share_memory_while_both_compute() -> None:
    """The router picks two of the four: on one node (1/3), or one on each (2/3)."""
    dense = (ATTENTION + CACHE + ROUTER) / BOTH.dense
    split = EXPERT / BOTH.experts + BOTH.expert_s
    # The other place is taken to compute what is left in the mean: nothing.
    same = 2 * (EXPERT / ALONE1.experts + BOTH.expert_s)
    layer = dense + split * 2 / 3 + same / 3 + 60e-6
    assert step_s(2) == pytest.approx(LAYERS * layer + HEAD / ALONE1.dense + 130e-6)


def test_the_leader_of_the_centralized_schedule_is_alone_with_the_dense_weights() -> None:
    dense = (ATTENTION + CACHE + ROUTER) / ALONE1.dense
    all_local = 2 * (EXPERT / BOTH.experts + BOTH.expert_s)
    layer = dense + all_local + 190e-6
    expected = LAYERS * layer + HEAD / ALONE1.dense + 120e-6
    assert step_s(2, schedule="centralized", policy="busy-full") == pytest.approx(expected)


def test_nodes_that_share_a_core_take_turns() -> None:
    """Four nodes with an expert each, on two cores."""
    dense = 2 * (ATTENTION + CACHE + ROUTER) / BOTH.dense
    split = EXPERT / BOTH.experts + BOTH.expert_s
    same = 2 * (EXPERT / ALONE1.experts + BOTH.expert_s)
    layer = dense + split * 2 / 3 + same / 3 + 160e-6
    assert step_s(4) == pytest.approx(LAYERS * layer + HEAD / ALONE1.dense + 500e-6)


def test_a_slice_of_an_expert_takes_as_long_to_begin_as_a_whole_one() -> None:
    dense = (ATTENTION + CACHE + ROUTER) / BOTH.dense
    halves = 2 * (EXPERT / 2 / BOTH.experts + BOTH.expert_s)
    layer = dense + halves + 60e-6
    expected = LAYERS * layer + HEAD / ALONE1.dense + 130e-6
    assert step_s(2, placement="slices") == pytest.approx(expected)


def test_without_measured_steps_the_machines_own_count() -> None:
    bare = replace(MACHINE, steps=(), layer_s=1e-3, step_s=1e-2)
    assert step_s(1, bare) - step_s(1) == pytest.approx(LAYERS * 990e-6 + 9.9e-3)


def test_rates_of_the_nearest_threads_and_nodes() -> None:
    rates = (ALONE2, ALONE1, BOTH)
    assert rates_of(rates, "bf16", 2, 1) == (ALONE2, ALONE2)
    assert rates_of(rates, "bf16", 1, 2) == (ALONE1, BOTH)
    assert rates_of(rates, "bf16", 1, 9) == (ALONE1, BOTH)
    assert rates_of(rates, "bf16", 16, 1) == (ALONE2, ALONE2)
    assert rates_of(rates, affine(4).name, 1, 1) is None
    assert BF16.name == "bf16"


def test_steps_of_other_numbers_of_nodes_lie_on_a_line() -> None:
    three = step_rate(STEPS, "decentralized", "selected", 3)
    assert three is not None
    assert (three.layer_s, three.step_s) == pytest.approx((110e-6, 315e-6))
    eight = step_rate(STEPS, "decentralized", "selected", 8)
    assert eight is not None and eight.layer_s == pytest.approx(360e-6)
    assert step_rate(STEPS, "centralized", "router-aided", 2) is None
    assert step_rate(STEPS, "centralized", "selected", 1) == STEPS[0]
