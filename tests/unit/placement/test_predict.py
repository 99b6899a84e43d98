"""Predictions over numbers of nodes, and what is concluded from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.cli.plan.advice import (
    best,
    caveats,
    conclusions,
    purchases,
    what_to_buy,
)
from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.cli.plan.names import look_up
from zmoe.errors import InputError, PlacementError
from zmoe.perf.hardware import GIB
from zmoe.perf.shape import affine
from zmoe.placement.predict import ALIKE, Setup, Workload, predict, predict_all
from zmoe.placement.remedy import bits_that_fit, nodes_that_fit


def setup(
    model: str = "dbrx", machines: str = "m2-ultra", link: str = "10gbe", **how: object
) -> Setup:
    nodes = tuple(MACHINES[name] for name in machines.split(","))
    return Setup(MODELS[model], nodes, LINKS[link], **how)  # type: ignore[arg-type]


@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(("m3-ultra", "epyc", "m3-ultra,m4-max", "dgx-h100")),
    st.sampled_from(("experts", "slices", "replicas", "auto")),
    st.integers(1, 4),
    st.integers(1, 8),
)
@settings(deadline=None, max_examples=25)
def test_rows_are_consistent(
    model: str, machines: str, placement: str, nodes: int, batch: int
) -> None:
    work = Workload(batch=batch, context=1000, prompt=600)
    prediction = predict(setup(model, machines, placement=placement, workload=work), nodes)
    row = prediction.row()
    assert row["nodes"] == nodes == len(row["memory_by_node_bytes"])
    assert row["machines"] == (machines.split(",") * nodes)[:nodes]
    assert row["memory_per_node_bytes"] == max(row["memory_by_node_bytes"])
    assert row["fits"] == (row["missing_per_node_bytes"] == 0)
    # Of unlike nodes the slowest may be so slow that the others compute all experts.
    assert (machines == "m3-ultra,m4-max") or row["executed_experts_per_node"] > 0
    assert 0 <= row["executed_experts_per_node"] <= MODELS[model].experts
    if not row["fits"]:
        assert row["tokens_per_second"] is None
        assert set(row["breakdown"].values()) == {None}
        return
    spent = sum(row["breakdown"].values())
    assert row["tokens_per_second"] == pytest.approx(batch * 1000 / spent)
    messages = row["breakdown"]["latency_ms"] + row["breakdown"]["transfer_ms"]
    assert row["communication_share"] == pytest.approx(messages / spent)
    per_dollar = row["tokens_per_second"] / row["price_usd"]
    assert row["tokens_per_second_per_usd"] == pytest.approx(per_dollar)
    reading = sum(row["prompt_breakdown"].values()) / 1000
    assert row["prompt_tokens_per_second"] == pytest.approx(600 * batch / reading)


def test_memory_is_shared_out() -> None:
    shape, one, four = MODELS["dbrx"], predict(setup(), 1), predict(setup(), 4)
    assert max(one.memory) - max(four.memory) == pytest.approx(
        0.75 * 40 * 16 * shape.expert_bytes, rel=1e-6
    )
    central = predict(setup(schedule="centralized"), 4)
    assert central.memory[0] == four.memory[0]
    assert central.memory[0] - central.memory[1] == pytest.approx(
        shape.dense_bytes + shape.cache_bytes(4096), rel=1e-6
    )


def test_context_and_batch_take_memory_and_time() -> None:
    small, long = (
        predict(setup(workload=Workload(context=context)), 2) for context in (100, 20_000)
    )
    assert max(long.memory) > max(small.memory)
    assert long.decode.load > small.decode.load
    both = predict(setup(workload=Workload(batch=8)), 2)
    caches = 7 * MODELS["dbrx"].cache_bytes(4096)
    assert max(both.memory) - max(predict(setup(), 2).memory) == pytest.approx(caches)
    assert both.tokens_per_second > predict(setup(), 2).tokens_per_second
    assert both.busiest.count > predict(setup(), 2).busiest.count


def test_a_long_prompt_is_read_in_chunks() -> None:
    one = predict(setup(workload=Workload(prompt=512)), 2).prefill
    two = predict(setup(workload=Workload(prompt=1024)), 2).prefill
    assert 1.9 * one.total < two.total < 2.2 * one.total


def test_auto_takes_the_fastest_that_fits_or_what_holds_less() -> None:
    auto = predict(setup(placement="auto"), 4)
    others = [predict(setup(placement=p), 4) for p in ("experts", "slices", "replicas")]
    assert auto.decode.total <= (1 + ALIKE) * min(p.decode.total for p in others if p.fits)
    mixed = predict(setup(machines="m3-ultra,m4-pro-mini", placement="auto"), 2)
    assert mixed.fits
    assert mixed.decode.total < predict(setup(machines="m3-ultra,m3-ultra"), 2).decode.total * 3


def test_replicas_need_room_and_spare_the_busiest() -> None:
    roomy = predict(setup("mixtral-8x7b", placement="replicas"), 4)
    assert roomy.placed.label == "replicas"
    assert roomy.busiest.count < predict(setup("mixtral-8x7b"), 4).busiest.count
    tight = predict(setup("dbrx", "m4-pro-mini", placement="replicas"), 2)
    assert tight.placed.label == "experts" and not tight.fits


def test_auto_leaves_out_what_cannot_be() -> None:
    """Replicas on more nodes than are counted, and slices finer than experts can be cut."""
    many = predict(setup("qwen3-30b-a3b", placement="auto"), 64)
    assert many.placed.label == "experts" and many.fits
    for way, words in (("replicas", "at most 10 are planned"), ("slices", "12 slices at most")):
        with pytest.raises(PlacementError, match=words):
            predict(setup("qwen3-30b-a3b", placement=way), 64)


def test_slices_are_whole_groups_and_fit_where_all_nodes_together_have_room() -> None:
    """Shares in proportion to speed alone would not fit the slower of the two."""
    sliced = predict(setup("dbrx", "m3-ultra,m4-max", placement="slices"), 2)
    assert sliced.fits and sliced.placed.shares[0] + sliced.placed.shares[1] == 1
    assert all(10752 * share % 64 == 0 for share in sliced.placed.shares)
    uneven = predict(setup("gpt-oss-20b", placement="slices"), 4)  # 90 steps of 32
    assert sorted(2880 * share / 32 for share in uneven.placed.shares) == [22, 22, 23, 23]


def test_nodes_of_one_machine_share_it() -> None:
    alone = predict(setup("olmoe", one_machine=True), 1)
    shared = predict(setup("olmoe", one_machine=True), 4)
    assert shared.price_usd == alone.price_usd
    assert shared.decode.load > alone.decode.load / 4
    assert shared.tokens_per_second < predict(setup("olmoe"), 4).tokens_per_second


def test_more_nodes_than_experts() -> None:
    with pytest.raises(PlacementError, match="9 nodes are more than the 8 experts"):
        predict(setup("mixtral-8x7b"), 9)


# ---- advice ----------------------------------------------------------------------


def test_what_does_not_fit_says_what_would() -> None:
    (single,) = predict_all(setup(), [1])
    (sentence,) = conclusions([single])
    assert f"{single.missing / GIB:.0f} GiB are missing per node" in sentence
    assert "2 nodes or 8 bits on 1 node would do" in sentence
    assert nodes_that_fit(setup()) == 2 and not predict(setup(), 1).fits
    assert bits_that_fit(setup(), 1) == 8
    eight = replace(setup(), shape=MODELS["dbrx"].with_format(affine(8)))
    assert predict(eight, 1).fits


def test_what_auto_lacks_is_spread_by_memory() -> None:
    """Whole experts spread evenly would leave the smaller node without most of its half."""
    unequal = setup("kimi-k2", "m3-ultra,m4-max")
    unequal = replace(unequal, shape=unequal.shape.with_format(affine(4)))
    even, auto = predict(unequal, 2), predict(replace(unequal, placement="auto"), 2)
    assert not auto.fits and auto.placed.label == "experts by memory"
    assert auto.missing < even.missing / 2


def test_slices_that_fit_nowhere() -> None:
    """No more nodes are tried than an expert has slices."""
    huge = setup("qwen3-30b-a3b", placement="slices", workload=Workload(batch=4096, context=10**7))
    assert "neither more nodes nor fewer bits help" in conclusions([predict(huge, 8)])[0]


def test_what_fits_nowhere() -> None:
    huge = setup(workload=Workload(batch=4096, context=10**7))
    assert "neither more nodes nor fewer bits help" in conclusions([predict(huge, 8)])[0]


def test_more_nodes_that_are_slower_are_called_so() -> None:
    predictions = predict_all(setup("qwen3-30b-a3b", link="1gbe"), range(1, 9))
    fastest = best(predictions)
    assert fastest is not None and fastest.nodes < 8
    assert any(s.startswith("More nodes are slower: ") for s in conclusions(predictions))
    growing = predict_all(setup(), range(2, 5))
    assert not any("slower" in s for s in conclusions(growing))
    assert best(growing) is growing[-1]


def test_what_to_buy() -> None:
    asked = setup("dbrx", placement="slices")
    found = purchases(asked, 6, MACHINES)
    assert len(found) >= 2
    assert found == sorted(found, key=lambda p: p.price_usd)
    assert "dgx-h100" not in {p.machine for p in found}
    for purchase in found:
        kind = replace(asked, machines=(MACHINES[purchase.machine],))
        made = [predict(kind, nodes) for nodes in range(1, purchase.nodes + 1)]
        assert [p.fits and p.tokens_per_second >= 6 for p in made] == [
            *[False] * (purchase.nodes - 1),
            True,
        ]
    assert (
        f"Cheapest for 6 tokens/s over 10gbe: {found[0].nodes} node"
        in (what_to_buy(asked, 6, found)[0])
    )
    assert "Nothing in the table" in what_to_buy(asked, 1e6, purchases(asked, 1e6, MACHINES))[0]


def test_caveats() -> None:
    rdma = setup(link="tb5-rdma")
    assert "no transport for tb5-rdma" in caveats(rdma, [predict(rdma, 2)])[0]
    dgx = setup(machines="dgx-h100")
    assert "for comparison" in caveats(dgx, [predict(dgx, 1)])[0]
    sampled = setup("qwen3-30b-a3b", placement="replicas", workload=Workload(batch=4))
    predictions = [predict(sampled, 2)]
    if predictions[0].placed.label == "replicas":
        assert "sampled" in caveats(sampled, predictions)[0]
    assert caveats(setup(), [predict(setup(), 2)]) == []


def test_unknown_names() -> None:
    assert look_up("--link", "10GbE", LINKS).name == "10gbe"
    with pytest.raises(InputError, match=r'--link "10gb" is unknown; did you mean 10gbe') as caught:
        look_up("--link", "10gb", LINKS, "a file")
    assert all(name in str(caught.value) for name in LINKS)
    with pytest.raises(InputError) as caught:
        look_up("--link", "qqqq", LINKS)
    assert "did you mean" not in str(caught.value)
