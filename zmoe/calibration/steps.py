"""What a step takes beside products, with one node and with several on this machine.

Measured on the model that the package carries, which has next to no weights,
once with few layers and once with many: what more layers add is the layers',
the rest the step's.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx

from zmoe.calibration.products import MOST_NODES, Progress
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.leader import ClusterSpec
from zmoe.cluster.placing import PlacementRequest
from zmoe.config import DEFAULT_MODEL, EngineConfig, Sampling
from zmoe.models.hub import resolve_model
from zmoe.planner.config import read_shape
from zmoe.planner.cost import SCHEDULES
from zmoe.planner.hardware import Machine
from zmoe.planner.links import Link
from zmoe.planner.measured import StepRate
from zmoe.planner.plan import Setup, Workload, predict

LAYERS = (2, 12)
PROMPT, TOKENS = 4, 12  # of a generation: a greedy one soon chooses the same experts each time
GENERATIONS = 30
NO_LINK = Link("none", 0.0, float("inf"), "nothing", per_peer_s=0.0)


def measure_steps(machine: Machine, progress: Progress) -> tuple[StepRate, ...]:
    """Of 1 to MOST_NODES nodes, both schedules. `machine` has the rates of its products."""
    bare = replace(machine, layer_s=0.0, step_s=0.0, sync_s=0.0, steps=())
    found = []
    with _models() as folders:
        for nodes in range(1, MOST_NODES + 1):
            for schedule in SCHEDULES if nodes > 1 else SCHEDULES[:1]:
                progress(f"steps of {nodes} nodes, {schedule}" if nodes > 1 else "steps of a node")
                few, many = (
                    _seconds(folder, nodes, schedule) - _products(folder, bare, nodes, schedule)
                    for folder in folders
                )
                layer_s = max(0.0, (many - few) / (LAYERS[1] - LAYERS[0]))
                step_s = max(0.0, few - LAYERS[0] * layer_s)
                found.append(StepRate(nodes, schedule, layer_s, step_s))
    return tuple(found)


@contextmanager
def _models() -> Iterator[list[Path]]:
    """Folders of the model with LAYERS layers each."""
    with tempfile.TemporaryDirectory(prefix="zmoe") as folder:
        yield [
            _with_layers(resolve_model(DEFAULT_MODEL), layers, Path(folder)) for layers in LAYERS
        ]


def _with_layers(model: Path, layers: int, folder: Path) -> Path:
    """A copy of `model` in bfloat16 whose layers are its own in turn."""
    made = folder / str(layers)
    shutil.copytree(model, made)
    config = json.loads((made / "config.json").read_text())
    config.update(n_layers=layers, torch_dtype="bfloat16")
    (made / "config.json").write_text(json.dumps(config))
    loaded: Any = mx.load(str(made / "model.safetensors"))
    tensors = {name: array.astype(mx.bfloat16) for name, array in loaded.items()}
    of_layer = re.compile(r"(.*\.blocks\.)(\d+)(\..*)")
    matches = [(name, of_layer.fullmatch(name)) for name in tensors]
    own = 1 + max(int(found[2]) for _, found in matches if found)
    kept = {}
    for name, found in matches:
        if found is None:
            kept[name] = tensors[name]
            continue
        for layer in range(int(found[2]), layers, own):
            kept[f"{found[1]}{layer}{found[3]}"] = tensors[name]
    mx.save_safetensors(str(made / "model.safetensors"), kept)
    return made


def _seconds(folder: Path, nodes: int, schedule: str) -> float:
    """Of one step: the median over generations."""
    engine = EngineConfig(schedule=schedule)
    spec = ClusterSpec(nodes=nodes, engine=engine, placement=PlacementRequest("experts"))
    draw, taken = Random(1), []
    with Cluster(folder, spec=spec) as cluster:
        known = len(cluster.tokenizer.get_vocab())
        for _ in range(GENERATIONS):
            prompt = [draw.randrange(known) for _ in range(PROMPT)]
            generation = cluster.generate(prompt, Sampling(max_tokens=TOKENS, ignore_eos=True))
            for _ in generation:
                pass
            taken.append(1 / generation.timings.generation_tps)
    return statistics.median(taken)


def _products(folder: Path, bare: Machine, nodes: int, schedule: str) -> float:
    """The products' part of it, by the model."""
    setup = Setup(
        shape=read_shape(folder / "config.json", folder.name),
        machines=(bare,),
        link=NO_LINK,
        workload=Workload(context=PROMPT + TOKENS // 2, prompt=PROMPT),
        schedule=schedule,
        one_machine=True,
    )
    return predict(setup, nodes).decode.total
