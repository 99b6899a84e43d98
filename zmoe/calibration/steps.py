"""What a step takes beside products, with one node and with several on this machine.

Measured on a model of random weights, once with few layers and once with many:
what more layers add is the layers', the rest the step's. The time of the products
is taken off: of one node as it was measured, of several as the planner has it, as
much slower or faster as it was found to be for one. The weights are few, so that
little depends on it, and yet more than caches hold: between the products of a
real model everything else begins cold, too.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np

from zmoe.calibration.products import MOST_NODES, Progress
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.leader import ClusterSpec
from zmoe.cluster.placing import PlacementRequest
from zmoe.config import DEFAULT_MODEL, POLICIES, SCHEDULES, EngineConfig
from zmoe.models.hub import resolve_model
from zmoe.planner.config import read_shape
from zmoe.planner.hardware import Machine
from zmoe.planner.links import Link
from zmoe.planner.measured import ProductRate, StepRate
from zmoe.planner.plan import Setup, Workload, predict
from zmoe.planner.shape import CACHE, CACHE_BYTES, ModelShape

FEW, MANY = 4, 12  # layers
WIDTH, HEADS, HIDDEN = 256, 4, 512
NEAR, FAR = 42, 552  # tokens of context
STEPS, TOGETHER = 80, 8  # the median over groups of steps counts
_NO_LINK = Link("none", 0.0, float("inf"), "nothing", per_peer_s=0.0)


@dataclass(frozen=True)
class Case:
    """How some nodes of this machine work together."""

    nodes: int
    schedule: str = SCHEDULES[0]
    policy: str = POLICIES[0]

    def __str__(self) -> str:
        how = f"{self.nodes} nodes, {self.schedule}" if self.nodes > 1 else "1 node"
        return f"{how}, {self.policy}"


def cases() -> Iterator[Case]:
    """All that there are of up to MOST_NODES nodes, those of each number together."""
    for nodes in range(1, MOST_NODES + 1):
        for schedule in SCHEDULES if nodes > 1 else SCHEDULES[:1]:
            for policy in POLICIES:
                yield Case(nodes, schedule, policy)


def measure_steps(machine: Machine, progress: Progress) -> Machine:
    """`machine`, whose products are measured, with its steps, and the rates of its caches."""
    machine = replace(machine, layer_s=0.0, step_s=0.0, sync_s=0.0, steps=())
    with tempfile.TemporaryDirectory(prefix="zmoe") as folder:
        few, many = (make_model(Path(folder) / str(layers), layers) for layers in (FEW, MANY))
        progress("the attention's cache")
        machine = replace(machine, rates=(*machine.rates, *_cache_rates(machine, many)))
        steps, alone = list[StepRate](), dict[str, float]()
        for case in cases():
            progress(f"steps: {case}")
            layers = _beside_products(many, machine, case, alone)
            if case.policy == POLICIES[0]:
                fewer = _beside_products(few, machine, case, alone)
                once = max(0.0, fewer - FEW * (layers - fewer) / (MANY - FEW))
            layer_s = max(0.0, layers - once) / MANY  # a policy is a matter of the layers
            steps.append(StepRate(case.nodes, case.schedule, case.policy, layer_s, once))
    return replace(machine, layer_s=steps[0].layer_s, step_s=steps[0].step_s, steps=tuple(steps))


def _beside_products(model: Path, machine: Machine, case: Case, alone: dict[str, float]) -> float:
    """Seconds of a step beside its products. `alone`, by model and policy: how much longer
    one node's products take than the planner has it, which is found out first.
    """
    expected, key = _products(model, machine, case), f"{model.name} {case.policy}"
    with running(model, case) as clock:
        total, products = clock(NEAR)
    if case.nodes == 1:
        alone[key] = products / expected
    return total - alone[key] * expected


def make_model(folder: Path, layers: int) -> Path:
    """Write a model of DBRX's kind; returns `folder`."""
    shutil.copytree(resolve_model(DEFAULT_MODEL), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(d_model=WIDTH, n_heads=HEADS, n_layers=layers, torch_dtype="bfloat16")
    config["attn_config"]["kv_n_heads"] = HEADS
    config["ffn_config"]["ffn_hidden_size"] = HIDDEN
    path.write_text(json.dumps(config))
    experts, vocabulary = config["ffn_config"]["moe_num_experts"], config["vocab_size"]
    shapes = {
        "transformer.wte.weight": (vocabulary, WIDTH),
        "lm_head.weight": (vocabulary, WIDTH),
        "transformer.norm_f.weight": (WIDTH,),
    }
    for layer in range(layers):
        block = f"transformer.blocks.{layer}"
        shapes |= {
            f"{block}.norm_attn_norm.norm_1.weight": (WIDTH,),
            f"{block}.norm_attn_norm.norm_2.weight": (WIDTH,),
            f"{block}.norm_attn_norm.attn.Wqkv.weight": (3 * WIDTH, WIDTH),
            f"{block}.norm_attn_norm.attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}.ffn.router.layer.weight": (experts, WIDTH),
            **{
                f"{block}.ffn.experts.mlp.{m}": (experts * HIDDEN, WIDTH)
                for m in ("w1", "v1", "w2")
            },
        }
    tensors = {
        name: (mx.random.normal(shape) * WIDTH**-0.5).astype(mx.bfloat16)
        for name, shape in shapes.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


class Clock:
    """Times steps of a running cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._step, self._draw = cluster.begin(), Random(1)
        self._known = len(cluster.tokenizer.get_vocab())
        self._take_spans = cluster.take_spans

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(self._known) for _ in range(count)]

    def __call__(self, context: int) -> tuple[float, float]:
        """Seconds of a decode step around `context` tokens, and of its products on this node."""
        self._step(self._tokens(max(1, context - STEPS // 2)), True, False)
        taken = []
        for _ in range(STEPS // TOGETHER):
            self._take_spans()
            start = time.perf_counter()
            for token in self._tokens(TOGETHER):
                np.asarray(self._step([token], False, True)).argmax()
            total = time.perf_counter() - start
            taken.append((total / TOGETHER, self._take_spans().get("products", 0.0) / TOGETHER))
        return statistics.median(t for t, _ in taken), statistics.median(p for _, p in taken)


@contextmanager
def running(model: Path, case: Case) -> Iterator[Clock]:
    """The nodes of `case`, started."""
    engine = EngineConfig(schedule=case.schedule, policy=case.policy)
    placement = PlacementRequest("experts")
    with Cluster(
        model, spec=ClusterSpec(case.nodes, engine=engine, placement=placement)
    ) as cluster:
        yield Clock(cluster)


def _shape(model: Path) -> ModelShape:
    return read_shape(model / "config.json", model.name)


def _products(model: Path, machine: Machine, case: Case) -> float:
    """Seconds of a step's products, by the planner."""
    setup = Setup(
        shape=_shape(model),
        machines=(machine,),
        link=_NO_LINK,
        workload=Workload(context=NEAR),
        schedule=case.schedule,
        policy=case.policy,
        one_machine=True,
    )
    return predict(setup, case.nodes).decode.total


def _cache_rates(machine: Machine, model: Path) -> Iterator[ProductRate]:
    """Bytes of cache a second that a step of one row attends to, on each number of threads."""
    shape = _shape(model)
    size = MANY * (FAR - NEAR) * shape.attention.cache_elements * CACHE_BYTES
    threads: dict[int, ProductRate] = {}
    for rate in machine.rates:
        if rate.format == "bf16":
            threads[rate.nodes] = min(threads.get(rate.nodes, rate), rate, key=lambda r: -r.threads)
    for nodes, like in threads.items():
        with running(model, Case(nodes)) as clock:
            near, far = (min(clock(context)[0] for _ in range(2)) for context in (NEAR, FAR))
        speed = size / max(far - near, 1e-9)
        yield replace(like, format=CACHE.name, dense=speed, experts=speed)
