"""The planner against published speeds of MLX on Macs, and the page that compares them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.unit.perf.test_paper import PAGE
from zmoe.cli.plan.forms import FAST, compare, forms, gains
from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.perf.shape import Format, ModelShape, affine
from zmoe.placement.predict import Setup, Workload, predict

WITHIN = 0.15


@dataclass(frozen=True)
class Published:
    name: str
    shape: ModelShape
    machine: str
    speed: float
    nodes: int = 1
    context: int = 512
    form: str = "graph"

    def predicted(self) -> float:
        work = Workload(context=self.context)
        setup = Setup(self.shape, (MACHINES[self.machine],), LINKS["tb5-rdma"], work)
        return predict(forms(setup)[self.form], self.nodes).tokens_per_second

    def line(self) -> str:
        """Its cells on the page from the number of nodes on."""
        made = self.predicted()
        return f"| {self.nodes} | {made:.1f} | {self.speed:g} | {made / self.speed:.2f} |"


QWEN_30B, QWEN_235B = MODELS["qwen3-30b-a3b"], MODELS["qwen3-235b-a22b"].with_format(affine(8))
KIMI = replace(MODELS["kimi-k2"], dense_format=affine(8), expert_format=affine(3))
MINIMAX = MODELS["minimax-m2"].with_format(affine(4))
GPT_OSS = replace(MODELS["gpt-oss-20b"], dense_format=affine(8))
SHARDED = f"{FAST}, sharded"
ROWS = (
    *(
        Published(f"30B, {bits} bits", QWEN_30B.with_format(affine(bits)), "m4-max", speed, 1, 2112)
        for bits, speed in ((4, 113.33), (5, 101.0), (6, 94.14), (8, 83.16))
    ),
    Published("235B, 8 bits", QWEN_235B, "m3-ultra", 19.5),
    Published("235B on 2", QWEN_235B, "m3-ultra", 26.2, nodes=2, form=SHARDED),
    Published("235B on 4", QWEN_235B, "m3-ultra", 31.9, nodes=4, form=SHARDED),
    Published("GLM-4.5-Air", MODELS["glm-4.5-air"].with_format(affine(4)), "m3-ultra", 56),
    Published("MiniMax M2.5", MINIMAX, "m3-ultra", 51.15),
    Published("30B, short", QWEN_30B.with_format(affine(4)), "m4-max", 123.9, context=128),
    Published("GPT-OSS", GPT_OSS, "m3-ultra", 123),
    Published("Kimi K2.6", KIMI, "m3-ultra", 21.36, context=1280),
    Published("DeepSeek R1", MODELS["deepseek-v3"].with_format(Format(4.82)), "m3-ultra", 20.21),
)
MISSED = (
    Published("MiniMax", MINIMAX, "m3-ultra", 25, context=30_000),
    Published("GPT-OSS", GPT_OSS, "m3-ultra", 79),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_near_what_was_published(row: Published) -> None:
    assert row.predicted() == pytest.approx(row.speed, rel=WITHIN)
    assert row.line() in PAGE


@pytest.mark.parametrize("row", MISSED, ids=lambda row: row.name)
def test_the_page_owns_up_to_what_is_missed(row: Published) -> None:
    assert abs(row.predicted() / row.speed - 1) > WITHIN
    assert row.line() in PAGE


def test_the_graph_takes_crossings_in_the_place_of_waits() -> None:
    """By hand: two waits a layer and one per token, against one crossing and one wait."""
    mac = MACHINES["m3-ultra"]
    assert mac.crossing_s is not None
    layers = QWEN_235B.moe_layers
    setup = Setup(QWEN_235B, (mac,), LINKS["tb5"], Workload(context=1), placement="slices")
    waits = predict(setup, 2).decode
    in_graph = {label: predict(each, 2) for label, each in forms(setup).items()}
    graph, sharded = in_graph["graph"].decode, in_graph["sharded"].decode
    saved = 2 * layers * mac.sync_s - layers * mac.crossing_s
    assert waits.overhead - graph.overhead == pytest.approx(saved)
    assert replace(graph, overhead=0) == replace(waits, overhead=0)
    assert sharded.overhead - graph.overhead == pytest.approx(layers * mac.crossing_s)
    assert sharded.latency - graph.latency == pytest.approx(layers * LINKS["tb5"].latency_s)
    assert in_graph["sharded"].memory[0] < in_graph["graph"].memory[0]
    fast = in_graph[FAST].decode
    assert graph.overhead - fast.overhead == pytest.approx(layers * (mac.crossing_s - 20e-6))
    read = QWEN_235B.dense_format.bytes(QWEN_235B.attention_parameters) / mac.reached_bandwidth
    assert graph.load - sharded.load == pytest.approx(layers * read / 2, rel=1e-3)


def test_one_node_is_mlx_lm() -> None:
    """It waits for nothing, and a prompt is evaluated at exchanges that it lacks."""
    setup = Setup(QWEN_30B, (MACHINES["m4-max"],), None)
    made = predict(forms(setup)["graph"], 1)
    layers = QWEN_30B.layers * MACHINES["m4-max"].layer_s
    assert made.decode.overhead == made.prefill.overhead == pytest.approx(layers)


def test_what_has_no_graph() -> None:
    mac = Setup(QWEN_30B, (MACHINES["m4-max"],), LINKS["tb5"])
    for other in (
        replace(mac, machines=(MACHINES["m4-max"], MACHINES["epyc"])),
        replace(mac, schedule="centralized"),
        replace(mac, policy="busy-full"),
        replace(mac, placement="replicas"),
        replace(mac, one_machine=True),
    ):
        assert forms(other) == {} and compare(other, []) == []
    (three,) = compare(mac, [predict(mac, 3)])
    assert three.in_graph["sharded"] is None and three.in_graph["graph"] is not None
    assert set(forms(replace(mac, machines=(MACHINES["dgx-spark"],)))) == {"graph", "sharded"}


def test_what_the_graph_gains_is_said() -> None:
    mac = Setup(QWEN_235B, (MACHINES["m3-ultra"],), LINKS["tb5-rdma"])
    compared = compare(mac, [predict(mac, nodes) for nodes in (1, 4)])
    usual, quick = gains(compared)
    assert usual.startswith("In MLX's graph: ") and " times the fastest that evaluates" in usual
    speed = predict(forms(mac)[f"{FAST}, sharded"], 4).tokens_per_second
    assert quick.endswith(f": 4 nodes, {speed:.3g} tokens/s with sharded attention.")
    (only,) = gains(compared[:1])  # one node crosses nothing
    assert only.startswith("In MLX's graph: 1 node, ")
    assert gains([]) == []
