"""The placement that a run takes: it fits, every node would choose it, and why it is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.conftest import described
from zmoe.cli.plan.forms import compare
from zmoe.errors import PlacementError
from zmoe.perf.hardware import GIB, METAL, METAL_CROSSING_S
from zmoe.perf.memory import PROGRAM_BYTES
from zmoe.placement.build import place_by_speed, place_evenly, place_replicas, place_slices
from zmoe.placement.check import check_placement
from zmoe.placement.choose import Alternative, Choice, Chooser, fastest
from zmoe.placement.estimate import NodeResources, capacity_for, speeds_of
from zmoe.placement.placed import placed_of
from zmoe.placement.predict import MARGIN, predict
from zmoe.placement.types import ModelInfo, Placement
from zmoe.placement.usage import Usage

# 64 experts, 8 chosen, 4 bits: 3456 MiB of them, as in bench/make_model.py's medium.
MEDIUM = described(
    64,
    16,
    hidden=1024,
    top_k=8,
    expert_parameters=3 * 2048 * 1024,
    expert_bytes=3 * 2048 * 1024 * 9 // 16,
    dense_bytes=400 << 20,
)
BY_LAYERS: dict[str, Any] = {"device": METAL, "evaluated": "the routing is recorded"}
IN_GRAPH: dict[str, Any] = {"device": METAL}
TINY = described(16, 4, hidden=128, expert_bytes=98304, dense_bytes=2 << 20)
WEIGHTS = 64 * 16 * MEDIUM.expert_bytes


def here(nodes: int, gib: float = 20) -> list[NodeResources]:
    """Processes of one machine, of which the first has measured."""
    return [NodeResources("here", int(gib * GIB), None, 0 if node else 25) for node in range(nodes)]


def apart(*machines: tuple[int, float]) -> list[NodeResources]:
    """(speed, GiB) each."""
    return [
        NodeResources(str(n), int(gib * GIB), None, speed)
        for n, (speed, gib) in enumerate(machines)
    ]


def choose(info: ModelInfo, offers: list[NodeResources], way: str = "auto", **how: Any) -> Choice:
    return Chooser(info, offers, **how).choose(way)


# ---- what nodes bring ----------------------------------------------------------------


def test_speeds() -> None:
    assert speeds_of(here(3)) == (25, 25, 25)
    assert speeds_of([replace(offer, speed=0) for offer in here(2)]) == (20, 20)
    assert speeds_of(apart((25, 1), (40, 1))) == (25, 40)
    mixed = [
        NodeResources("a", 1, None, 20),
        NodeResources("b", 1, None, 50),
        NodeResources("a", 1, None, 30),
    ]
    assert speeds_of(mixed) == (25, 50, 25)


def test_room_on_one_machine_is_shared() -> None:
    dense, everything = 400 << 20, WEIGHTS
    roomy, tight = here(2, 20), here(2, 4)
    assert capacity_for(MEDIUM, roomy, [dense] * 2, True) == [everything] * 2
    left = 4 * GIB - 2 * PROGRAM_BYTES
    assert capacity_for(MEDIUM, tight, [dense] * 2, True) == [(left - dense) // 2] * 2
    assert capacity_for(MEDIUM, tight, [dense] * 2, False) == [(left - 2 * dense) // 2] * 2
    limited = [replace(tight[0], limit=GIB), tight[1]]
    assert capacity_for(MEDIUM, limited, [dense] * 2, True) == [
        GIB - PROGRAM_BYTES - dense,
        min(everything, 4 * GIB - PROGRAM_BYTES - dense),
    ]


def test_the_shape_has_as_many_bytes() -> None:
    shape = MEDIUM.shape
    assert shape.expert_bytes * shape.experts * shape.moe_layers == pytest.approx(WEIGHTS)
    assert shape.dense_bytes == pytest.approx(400 << 20, rel=1e-3)
    assert shape.expert_format.bits_per_weight == 4.5


# ---- auto ----------------------------------------------------------------------------


def test_one_node_has_no_choice() -> None:
    choice = choose(MEDIUM, here(1))
    assert choice.placement == place_evenly(MEDIUM.shape, 1)
    assert choice.why == "there is one node"


def test_slices_even_out_the_nodes_of_one_machine() -> None:
    choice = choose(MEDIUM, here(2))
    assert choice.label == "slices"
    assert choice.placement.slices == ((0, 512), (512, 1024))
    by_label = {each.label: each for each in choice.considered}
    assert by_label["replicas"].remark == "the nodes share one machine's memory"
    assert by_label["experts by speed"].remark == "the same as experts"
    even, slices = by_label["experts"], by_label["slices"]
    assert even.prediction and even.prediction.busiest.count == pytest.approx(5.0225, abs=1e-4)
    assert slices.prediction and slices.prediction.busiest.count == 4
    assert even.seconds and slices.seconds and slices.seconds < (1 - MARGIN) * even.seconds


def test_slices_leave_a_machine_half_of_its_memory() -> None:
    """They are copies: the system cannot take them back, as it can what is mapped."""
    choice = choose(MEDIUM, here(2, 6))
    assert choice.label == "experts"
    assert "more than half of a machine's memory" in choice.considered[-1].remark
    limited = [replace(offer, limit=3 * GIB) for offer in here(2, 6)]  # as the user says
    assert choose(MEDIUM, limited).label == "slices"
    assert choose(MEDIUM, here(2, 6), "slices").label == "slices"


def test_without_the_kernels_slices_are_not_tried() -> None:
    choice = choose(MEDIUM, here(2), **BY_LAYERS)
    assert choice.label == "experts"
    assert choice.considered[-1].remark == "no figures for MLX's matmuls on slices"


def test_a_small_gain_is_not_worth_it() -> None:
    choice = choose(TINY, here(2))
    assert choice.placement == place_evenly(TINY.shape, 2)
    assert choice.why == "no other is predicted to be 3% faster"


def test_unequal_machines() -> None:
    fast_and_slow = apart((50, 20), (25, 20))
    considered = {each.label: each for each in choose(MEDIUM, fast_and_slow).considered}
    sliced = considered["slices"].placement
    assert sliced and sliced.slices == ((0, 960), (960, 1024))  # dense weights take their time
    for label in ("experts by speed", "replicas", "slices"):
        assert (considered[label].seconds or 0) < 0.8 * (considered["experts"].seconds or 0)
    # Where memory is short the fast machine takes what it has room for.
    short = choose(MEDIUM, apart((50, 1.5), (25, 20)), **BY_LAYERS)
    assert short.resident[0] <= short.capacity[0] < WEIGHTS / 2


def test_replicas_across_machines() -> None:
    choice = choose(MEDIUM, apart((25, 20), (25, 20), (25, 20)), **BY_LAYERS)
    assert choice.label == "replicas"
    assert choice.placement == place_replicas(MEDIUM.shape, [25] * 3, [64 * 16] * 3)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_what_is_chosen_fits_or_is_refused(data: st.DataObject) -> None:
    info = described(8, 3, top_k=2, expert_bytes=100 << 20)
    sizes = st.floats(0.3, 4).map(lambda gib: int(gib * GIB))
    machines = {name: data.draw(sizes) for name in "abc"}
    nodes = st.tuples(st.sampled_from("abc"), st.none() | sizes, st.integers(1, 40))
    offers = [
        NodeResources(name, machines[name], limit, speed)
        for name, limit, speed in data.draw(st.lists(nodes, min_size=1, max_size=4))
    ]
    way = data.draw(st.sampled_from(("auto", "experts", "replicas", "slices")))
    how = data.draw(st.sampled_from(({}, BY_LAYERS, IN_GRAPH)))
    mapped = not how
    try:
        choice = choose(info, offers, way, **how)
    except PlacementError as error:
        assert "are missing per node" in str(error) or "slices" in str(error)
        return
    assert choose(info, offers, way, **how).placement == choice.placement
    check_placement(choice.placement, info.shape)
    assert choice.placement.nodes == len(offers)
    assert all(held <= max(0, room) for held, room in zip(choice.resident, choice.capacity))
    own = sum(o.limit or 0 for o in offers)
    shared = {o.machine: o.memory for o in offers if o.limit is None}
    assert sum(choice.resident) <= (own + sum(shared.values())) * (len(offers) if mapped else 1)


# ---- what was asked for --------------------------------------------------------------


def test_ways() -> None:
    offers, everything = apart((20, 9), (30, 9)), [64 * 16] * 2
    assert choose(MEDIUM, offers, "experts").placement == place_evenly(MEDIUM.shape, 2)
    beside = MEDIUM.dense_bytes / (16 * 8 * MEDIUM.expert_bytes)
    sliced = place_slices(MEDIUM.shape, [20, 30], everything, beside)
    assert choose(MEDIUM, offers, "slices").placement == sliced
    copied = place_replicas(MEDIUM.shape, [20, 30], everything, None, beside)
    assert choose(MEDIUM, offers, "replicas").placement == copied


def test_usage_steers_the_copies() -> None:
    counts = tuple(tuple(1000 if e < 4 else 1 for e in range(64)) for _ in range(16))
    tight = apart((25, 3), (25, 3))
    choice = choose(MEDIUM, tight, "replicas", usage=Usage("f00d", counts))
    for first, second in choice.placement.owned:
        assert {0, 1, 2, 3} <= set(first) & set(second)


def test_a_given_placement_is_taken_unless_a_node_lacks_room() -> None:
    given_one = place_by_speed(MEDIUM.shape, [3, 1], [64 * 16] * 2)
    chooser = Chooser(MEDIUM, apart((25, 4), (25, 2)))
    choice = chooser.choose("my.json", given_one)
    assert choice.placement is given_one and choice.why == "as the file says"
    chooser = Chooser(MEDIUM, apart((25, 2), (25, 4)))
    with pytest.raises(PlacementError) as caught:
        chooser.choose("my.json", given_one)
    room = (2 * GIB - PROGRAM_BYTES - (400 << 20)) // MEDIUM.expert_bytes
    layer, expert = divmod(room, 48)  # the node has experts 0 to 47 of each layer
    assert (
        f"placement my.json: node 0 has no room for expert {expert} of layer {layer}: 2.53 GiB"
        in str(caught.value)
    )


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(PlacementError) as caught:
        choose(MEDIUM, apart((25, 2), (25, 2)), "auto")
    assert str(caught.value) == (
        "model does not fit 2 nodes: 336 MiB are missing per node; 3 nodes or 3 bits on 2 nodes "
        "would do (--memory-limit sets what a node may take)"
    )
    with pytest.raises(PlacementError, match="does not fit this machine: .* 2 machines or 3 bits"):
        choose(MEDIUM, here(2, 3.5))
    with pytest.raises(PlacementError, match="336 MiB are missing per node"):
        choose(MEDIUM, apart((25, 2), (25, 9)), "experts")
    choose(MEDIUM, apart((25, 2), (25, 9)), "auto")
    # All nodes together have room, but whole experts and what they share come out uneven.
    info = described(8, 3, top_k=2, expert_bytes=100 << 20)
    crowded = [NodeResources("a", 1792 << 20, None, 1)] * 3 + [
        NodeResources("b", 1728 << 20, None, 1)
    ]
    with pytest.raises(PlacementError, match="does not fit 4 nodes: 269 MiB are missing per node"):
        choose(info, crowded, "auto", **BY_LAYERS)


# ---- what the planner can say of a placement -----------------------------------------


@pytest.mark.parametrize("info", [MEDIUM, TINY])
@pytest.mark.parametrize("speeds", [(25, 25), (27, 25), (50, 25), (25, 25, 25)])
def test_the_planner_prefers_what_a_run_does(info: ModelInfo, speeds: tuple[int, ...]) -> None:
    """The small model's slices and replicas are 1 to 2% faster than whole experts."""
    choice = choose(info, apart(*((speed, 20) for speed in speeds)))
    first = choice.considered[0].prediction
    assert first
    planned = predict(replace(first.setup, placement="auto"), len(speeds))
    assert planned.placed == placed_of(choice.placement, info.moe_intermediate_size, choice.label)


@pytest.mark.parametrize("way", ["experts", "replicas", "slices"])
@pytest.mark.parametrize("schedule", ["decentralized", "centralized"])
def test_the_planner_predicts_what_a_run_builds(way: str, schedule: str) -> None:
    offers = apart((50, 2.5), (25, 20), (25, 1.9))
    chosen = choose(MEDIUM, offers, way, schedule=schedule).considered[0].prediction
    assert chosen
    planned = predict(replace(chosen.setup, placement=way), 3)
    assert planned.placed == chosen.placed
    assert planned.decode == chosen.decode


def test_placements_as_the_planner_sees_them() -> None:
    even = placed_of(place_evenly(MEDIUM.shape, 3), 1024, "x")
    assert even and sum(even.resident) == pytest.approx(64) and len(even.owners) == 64
    everything = [64 * 16] * 2
    sliced = placed_of(place_slices(MEDIUM.shape, [3, 1], everything), 1024, "x")
    assert sliced and sliced.shares == (0.75, 0.25) and sliced.resident == (48, 16)
    copied = placed_of(place_replicas(MEDIUM.shape, [1, 1], everything), 1024, "x")
    assert copied and copied.resident == (64, 64) and set(copied.owners) == {(0, 1)}
    every = (tuple(range(64)),) * 4
    both = Placement(4, 64, (every,) * 16, ((0, 512), (0, 512), (512, 1024), (512, 1024)))
    assert placed_of(both, 1024, "x") is None


def test_fastest_of_none_that_is_predicted() -> None:
    placement = place_evenly(MEDIUM.shape, 2)
    blind = [Alternative("experts", remark="no room"), Alternative("replicas", placement)]
    assert fastest(blind)[0].label == "replicas"


# ---- MLX's graph ---------------------------------------------------------------------

HEADS = 16 << 20  # of the dense weights, in MLX's graph


def names(choice: Choice) -> list[str]:
    return [each.name for each in choice.considered]


def test_slices_in_the_graph_of_mlx() -> None:
    """They cross to the host once a layer and wait once a step; else it is two waits a layer."""
    choice = choose(MEDIUM, here(2), **IN_GRAPH)
    assert choice.placement == place_slices(MEDIUM.shape, [1, 1], [10**6] * 2)
    assert choice.why.startswith("MLX computes them in one graph per step, predicted to be ")
    assert choice.evaluated == "" and choice.assumed.endswith("an exchange, 180 us a crossing")
    assert names(choice)[0] == "experts, evaluated"
    assert names(choice)[-3:] == [
        "slices, in MLX's graph",
        "slices, in MLX's graph with sharded attention",
        "slices, evaluated",
    ]
    graph, sharded, evaluated = (each.prediction for each in choice.considered[-3:])
    assert graph and evaluated and sharded is None
    waits = 16 * (2 * METAL.sync_s - METAL_CROSSING_S)
    assert evaluated.decode.total - graph.decode.total == pytest.approx(waits)
    assert choice.considered[-2].remark == "attention cannot be cut by heads for 2 nodes"


def test_what_cannot_be_in_a_graph_is_evaluated() -> None:
    whole = choose(replace(MEDIUM, slice_alignment=0), here(2), **IN_GRAPH)
    assert whole.placement == place_evenly(MEDIUM.shape, 2)
    assert whole.evaluated == "the nodes hold whole experts"
    recorded = choose(MEDIUM, here(2), **BY_LAYERS)
    assert recorded.placement == place_evenly(MEDIUM.shape, 2)
    assert recorded.evaluated == "the routing is recorded"
    assert "180 us" not in recorded.assumed
    assert choose(MEDIUM, here(2)).evaluated is None  # by the kernels
    as_asked = choose(MEDIUM, here(2), "experts", **IN_GRAPH)
    assert names(as_asked) == ["experts, evaluated"]


def test_one_node_is_mlx_lms_model() -> None:
    choice = choose(MEDIUM, here(1), **IN_GRAPH)
    assert choice.why == "there is one node" and choice.evaluated == ""
    assert names(choice) == ["experts, in MLX's graph", "experts, evaluated"]
    graph, evaluated = (each.prediction for each in choice.considered)
    assert graph and evaluated
    waits = (2 * 16 + 1) * METAL.sync_s  # it waits for nothing
    assert evaluated.decode.total - graph.decode.total == pytest.approx(waits)


def test_sharded_attention_is_predicted_and_leaves_more_room() -> None:
    info = replace(MEDIUM, head_bytes=HEADS)
    whole = choose(info, apart((25, 2.5), (25, 2.5)), **IN_GRAPH)
    cut = choose(info, apart((25, 2.5), (25, 2.5)), **IN_GRAPH, sharded=True)
    assert cut.label == whole.label == "slices"
    assert names(cut)[-3:-1] == names(whole)[-3:-1][::-1]
    replicated, sharded = (each.prediction for each in whole.considered[-3:-1])
    assert replicated and sharded
    read = HEADS / 2 / 25e9
    assert replicated.decode.load - sharded.decode.load == pytest.approx(read, rel=1e-2)
    more = sharded.decode.overhead - replicated.decode.overhead
    assert more == pytest.approx(16 * METAL_CROSSING_S)
    assert [b - a for a, b in zip(whole.capacity, cut.capacity)] == [HEADS // 2] * 2


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_the_planner_prefers_the_same_in_the_graph(nodes: int, sharded: bool) -> None:
    """Its own forms, on the machines that the nodes are taken for."""
    info = replace(MEDIUM, head_bytes=HEADS)
    offers = apart(*[(25, 20)] * nodes)
    choice = choose(info, offers, **IN_GRAPH, sharded=sharded and nodes > 1)
    evaluated = choose(info, offers, **BY_LAYERS).considered[0].prediction
    taken = {each.name: each.prediction for each in choice.considered}
    assert evaluated
    (compared,) = compare(evaluated.setup, [evaluated])
    labels = {"graph": "in MLX's graph", "sharded": "in MLX's graph with sharded attention"}
    for label, form in labels.items():
        planned, ours = compared.in_graph[label], taken.get(f"{choice.label}, {form}")
        assert (planned is None) == (ours is None)
        assert not (planned and ours) or planned.decode == ours.decode
