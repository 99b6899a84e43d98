"""What a step takes beside matmuls, with one node and with several on this machine.

Measured on a model of random weights, once with few layers and once with many:
what more layers add is the layers', the rest the step's. The time of the matmuls
is taken off: as the planner has it, as much slower or faster as the leader's were
found to be in the same steps. The experts are as large as those of real models:
a node that has none waits long enough to go to sleep, and between matmuls
everything else begins cold.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import mlx.core as mx

from zmoe.calibration.matmuls import Progress
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec, PlacementRequest
from zmoe.config import DEFAULT_MODEL, POLICIES, SCHEDULES, EngineConfig
from zmoe.perf.cost import Step, attention_cost, dense_matmul, experts_cost
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.measured import MatmulRate, StepRate
from zmoe.perf.model_config import read_shape
from zmoe.perf.shape import CACHE, CACHE_BYTES, ModelShape
from zmoe.placement.predict import Prediction, Setup, Workload, predict

FEW, MANY = 4, 12  # layers
WIDTH, HEADS, HIDDEN = 512, 4, 1024
# Tokens of context. What FAR adds must stand out from a step that reads experts of 150 MB.
NEAR, FAR = 42, 2090
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


def cases(nodes: int) -> Iterator[Case]:
    """All that there are of so many nodes."""
    for schedule in SCHEDULES if nodes > 1 else SCHEDULES[:1]:
        for policy in POLICIES:
            yield Case(nodes, schedule, policy)


class Steps:
    """The measured times of steps, by case; from them what is no matmul."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where the models are written."""
        self._models = [make_model(folder / str(n), n) for n in (FEW, MANY)]
        self._found: dict[tuple[Case, Path], tuple[float, float]] = {}
        self._far: dict[int, float] = {}  # by nodes: seconds of a step at FAR

    def measure(self, nodes: int, progress: Progress, policies: Sequence[str] = POLICIES) -> None:
        """All cases of so many nodes. Of what was measured before the faster counts: noise,
        which may last for as long as the processes do, only slows.
        """
        few, many = self._models
        for case in (case for case in cases(nodes) if case.policy in policies):
            progress(f"steps: {case}")
            with running(many, case) as clock:
                near = clock(NEAR)
                self._keep(case, many, near)
                if case == Case(nodes):
                    far = clock(FAR)[0]
                    self._far[nodes] = min(far, self._far.get(nodes, far))
            if case.policy == POLICIES[0]:
                with running(few, case) as clock:
                    self._keep(case, few, clock(NEAR))

    def _keep(self, case: Case, model: Path, found: tuple[float, float]) -> None:
        self._found[case, model] = min(found, self._found.get((case, model), found))

    def add_to(self, machine: Machine) -> Machine:
        """`machine`, whose matmuls are measured, with its steps, and the rates of its caches."""
        machine = replace(machine, layer_s=0.0, step_s=0.0, sync_s=0.0, steps=())
        machine = replace(machine, rates=(*machine.rates, *self._cache_rates(machine)))
        few, many = self._models
        steps = []
        for case in (case for case, model in self._found if model == many):
            layers = self._outside_matmuls(machine, case, many)
            if case.policy == POLICIES[0]:
                fewer = self._outside_matmuls(machine, case, few)
                once = max(0.0, fewer - FEW * (layers - fewer) / (MANY - FEW))
            layer_s = max(0.0, layers - once) / MANY  # a policy is a matter of the layers
            steps.append(StepRate(case.nodes, case.schedule, case.policy, layer_s, once))
        first = steps[0]
        return replace(machine, layer_s=first.layer_s, step_s=first.step_s, steps=tuple(steps))

    def _outside_matmuls(self, machine: Machine, case: Case, model: Path) -> float:
        """Seconds of a step; the matmuls that are taken off are the planner's, times what
        the leader's really took, in the same steps, over what the planner has for them.
        """
        total, of_leader = self._found[case, model]
        planned = _planned(model, machine, case)
        return total - planned.decode.total * of_leader / _leaders_matmuls(planned)

    def _cache_rates(self, machine: Machine) -> Iterator[MatmulRate]:
        """Bytes of cache a second that a step of one row attends to."""
        attention = _shape(self._models[1]).attention
        size = MANY * (FAR - NEAR) * attention.cache_elements * CACHE_BYTES
        for nodes, far in self._far.items():
            near, _ = self._found[Case(nodes), self._models[1]]
            alike = [r for r in machine.rates if r.format == "bf16" and r.nodes == nodes]
            if alike:  # else several take turns on a core
                speed = size / max(far - near, 1e-9)
                like = max(alike, key=lambda rate: rate.threads)
                yield replace(like, format=CACHE.name, dense=speed, experts=speed, expert_s=0.0)


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
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = (mx.random.normal(shape) * WIDTH**-0.5).astype(mx.bfloat16)
        mx.eval(tensors[name])  # one by one, or Ctrl-C would wait for all of them
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
        """Seconds of a decode step around `context` tokens, and of its matmuls on this node."""
        self._step(self._tokens(max(1, context - STEPS // 2)), True)
        taken = []
        for _ in range(STEPS // TOGETHER):
            self._take_spans()
            start = time.perf_counter()
            for token in self._tokens(TOGETHER):
                self._step([token], False).argmax()
            total = time.perf_counter() - start
            taken.append((total / TOGETHER, self._take_spans().get("matmuls", 0.0) / TOGETHER))
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


def _planned(model: Path, machine: Machine, case: Case) -> Prediction:
    """Of the matmuls of a step, and of nothing else."""
    setup = Setup(
        shape=_shape(model),
        machines=(machine,),
        link=_NO_LINK,
        workload=Workload(context=NEAR),
        schedule=case.schedule,
        policy=case.policy,
        one_machine=True,
    )
    return predict(setup, case.nodes)


def _leaders_matmuls(planned: Prediction) -> float:
    """Seconds that the leader itself computes in a step, in the mean."""
    cluster, shape = planned.cluster, planned.setup.shape
    place, central, step = cluster.places[0], cluster.is_central, Step(1, 1, NEAR, 1)
    counts = {
        "selected": shape.top_k / cluster.nodes,
        "busy-full": shape.experts / cluster.nodes,
        "router-aided": planned.busiest.count,
    }
    count = counts[cluster.policy]
    layer = attention_cost(shape, place, step, central).total
    layer += dense_matmul(shape, place, shape.router_parameters, 1, central).total
    layer += experts_cost(shape, place, count, count, count, False).total
    head = dense_matmul(shape, place, shape.head_parameters, 1, alone=True).total
    return shape.layers * layer + head
