"""Slices of experts on MLX, exchanged inside its graph, on real nodes, against mlx-lm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.cluster.conftest import PATIENCE_S, Commands, Workers, first_output, wait_until
from tests.cluster.graph_failures import check_round, draw_round
from tests.families import build
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster import share
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import EngineConfig
from zmoe.errors import SettingError
from zmoe.exchange.groups import Door

PROMPT = [
    (7 * i + 3) % 90 for i in range(60)
]  # a chunk that is evaluated at its exchanges, and one
CHUNK = 50
TOKENS = 8
WIDE = {"moe_intermediate_size": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": WIDE,
    "qwen2_moe": WIDE,
    "gpt_oss": {"intermediate_size": 256},
    "longcat_flash": {"expert_ffn_hidden_size": 256},
    "nemotron_h": WIDE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be cut in four, with the tokenizer of zmoe-tiny."""
    folder = tmp_path_factory.mktemp("models") / "model"
    build("qwen3_moe", folder, vocab_size=1024, **WIDE)
    tiny = resolve_model("zmoe-tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


def reference(
    folder: Path, prompt: list[int] = PROMPT, count: int = TOKENS
) -> tuple[list[int], list[np.ndarray]]:
    """mlx-lm alone: greedy tokens, and the logits (vocabulary,) of each step."""
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    tokens, logits, todo = [], [], prompt
    for _ in range(count):
        logits.append(np.array(model(mx.array([todo]), cache=cache)[0, -1]))
        tokens.append(int(logits[-1].argmax()))
        todo = tokens[-1:]
    return tokens, logits


def check(folder: Path, nodes: int, workers: Workers, attention: str = "replicated") -> None:
    tokens, logits = reference(folder)
    scale = max(float(np.abs(row).max()) for row in logits)
    engine = EngineConfig(compute="mlx", prefill_chunk=CHUNK, attention=attention)
    spec = ClusterSpec(nodes, engine=engine)
    if nodes > 1:
        spec = workers.spec(nodes, engine)
    with Cluster(folder, spec=spec) as cluster:
        assert (len(cluster.placement.slices) == nodes) == (nodes > 1)
        assert cluster.notices == ()
        step = cluster.begin()
        todo, found = PROMPT, []
        for wanted in logits:
            row = step(todo, False)
            assert np.abs(row - wanted).max() <= 1e-4 * scale
            found.append(int(row.argmax()))
            todo = found[-1:]
        assert found == tokens


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_nodes_agree_with_mlx_lm(folder: Path, nodes: int, workers: Workers) -> None:
    check(folder, nodes, workers)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_mlx_lm(family: str, workers: Workers, tmp_path: Path) -> None:
    """Groups of experts, biases, a gated shared expert, experts that do nothing, plain MLPs."""
    folder = build(family, tmp_path / family, vocab_size=1024, **FAMILIES[family])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model("zmoe-tiny") / name, folder)
    check(folder, 2, workers)


@pytest.mark.parametrize(
    "quantize", [("affine", 4, 32), ("mxfp4", 4, 32)], ids=lambda quantize: quantize[0]
)
def test_quantised_slices(
    folder: Path, quantize: tuple[str, int, int], workers: Workers, tmp_path: Path
) -> None:
    quantised = build("qwen3_moe", tmp_path / "q", quantize=quantize, vocab_size=1024, **WIDE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, quantised)
    check(quantised, 3, workers)


def test_attention_cut_by_heads(folder: Path, workers: Workers) -> None:
    check(folder, 2, workers, attention="sharded")


@pytest.mark.parametrize(
    ("nodes", "engine", "words"),
    [
        (3, {}, "3 nodes cannot share 2 or 4 heads of qwen3_moe evenly: expected 2 nodes"),
        (1, {}, "expected replicated, as there is one node"),
        (2, {"compute": "auto"}, "expected replicated, as MLX does not compute"),
    ],
)
def test_attention_that_cannot_be_cut(
    folder: Path, nodes: int, engine: dict[str, Any], words: str
) -> None:
    config = EngineConfig(**{"compute": "mlx", "attention": "sharded", **engine})
    with pytest.raises(SettingError) as refusal:
        Cluster(folder, spec=ClusterSpec(nodes, engine=config))
    assert str(refusal.value) == f"attention is sharded: {words}"


@pytest.mark.parametrize("attention", ["replicated", "sharded"])
def test_a_batch_is_as_alone(folder: Path, attention: str) -> None:
    """On MLX results may change with the batch: these are certain enough not to."""
    prompts = [f"{word} {word} and" for word in ("to be", "a king", "my lord", "the night")]
    engine = EngineConfig(compute="mlx", attention=attention)
    with Cluster(folder, spec=ClusterSpec(2, engine=engine)) as cluster:
        alone = [[t.id for t in cluster.submit(prompt, max_tokens=6)] for prompt in prompts]
        together = [cluster.submit(prompt, max_tokens=6) for prompt in prompts]
        assert [[t.id for t in generation] for generation in together] == alone


# ---- backends --------------------------------------------------------------------------


JSON = ("-m", 12, "--json", "--compute", "mlx")


def said(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"errors": done.stderr}


def test_backends_give_the_same_text(commands: Commands, folder: Path) -> None:
    model = ("--model", folder, *JSON)
    alone = said(commands.call("run", *model, "x"))
    two = (*model, "-n", 2, "--backend")
    # A process joins one backend of MLX's own for good.
    for done in (commands.call("run", *two, "zmq", "x"), commands.run(*two, "ring", "x")):
        answer = said(done)
        assert (answer["tokens"], answer["errors"]) == (alone["tokens"], "")


def test_a_library_that_the_user_named(commands: Commands, folder: Path) -> None:
    alone = said(commands.call("run", "--model", folder, *JSON, "x"))
    commands.env["MLX_MPI_LIBNAME"] = "libmpi.so"
    answer = said(commands.run("--model", folder, *JSON, "-n", 2, "x"))
    assert answer["tokens"] == alone["tokens"]
    line = "MoE layers are evaluated one by one: on node 0, 1 MLX_MPI_LIBNAME is set, or"
    assert line in answer["errors"]


def test_two_runs_of_a_process(folder: Path) -> None:
    """The second one evaluates its layers one by one, and the first goes on in its graph."""
    spec = ClusterSpec(2, engine=EngineConfig(compute="mlx"))
    with Cluster(folder, spec=spec) as first:
        with Cluster(folder, spec=spec) as second:
            assert "another run of the same process" in second.notices[0]
            ours, theirs = (cluster.submit("my lord", max_tokens=8) for cluster in (first, second))
            assert [token.id for token in ours] == [token.id for token in theirs]
        assert first.notices == ()
        assert len([*first.submit("the night", max_tokens=4)]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-n", 2, "--backend", "nccl"), "--backend is nccl: this MLX on node 0 has none"),
        (("--backend", "ring"), "--backend is ring: expected auto, as there is one node"),
        (
            ("-n", 2, "--backend", "ring", "--placement", "experts"),
            "--backend is ring: expected auto, as the nodes hold whole experts",
        ),
        (
            ("-n", 2, "--backend", "ring", "--policy", "busy-full", "--placement", "slices"),
            "--backend is ring: expected auto, as the schedule or the policy needs the routing",
        ),
        (
            ("-n", 2, "--backend", "ring", "--wire-dtype", "q8"),
            "--wire-dtype is q8: expected auto with the backend ring",
        ),
        (("-n", 5, "--placement", "slices"), "4 slices at most, not 5"),
    ],
    ids=lambda value: " ".join(map(str, value[-3:])) if isinstance(value, tuple) else "",
)
def test_what_cannot_be(
    commands: Commands, folder: Path, arguments: tuple[object, ...], words: str
) -> None:
    assert words in commands.refused("--model", folder, "--compute", "mlx", *arguments, "x")


def test_a_backend_is_for_mlx(folder: Path) -> None:
    spec = ClusterSpec(engine=EngineConfig(compute="native", backend="ring"))
    with pytest.raises(SettingError, match="is ring: expected auto, as MLX does not compute"):
        Cluster(folder, spec=spec).__enter__()


# ---- failures --------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["replicated", "sharded"])
def test_the_text_goes_on_without_nodes(
    folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is lost in a prompt, another one between two tokens; the leader is alone then. Once they
    are back, all nodes divide the experts again.
    """
    nodes = 3 if attention == "replicated" else 2  # which must divide the heads
    prompts = [PROMPT, PROMPT[::-1]]
    wanted = [reference(folder, prompt, count=24)[0] for prompt in prompts]
    load, in_use = share.load_shard, list[int]()
    monkeypatch.setattr(
        share, "load_shard", lambda *a, **k: in_use.append(mx.get_active_memory()) or load(*a, **k)
    )
    told = list[str]()
    engine = EngineConfig(compute="mlx", prefill_chunk=16, attention=attention)
    spec = ClusterSpec(nodes, engine=engine)
    with Cluster(folder, spec=spec, on_notice=told.append) as cluster:
        loaded, doomed = mx.get_active_memory(), cluster.worker_pids()
        killed = list[str]()

        def kill() -> None:
            pid = doomed.pop(0)
            killed.append(f"node {nodes - 1 - len(doomed)} on this machine (pid {pid})")
            os.kill(pid, signal.SIGKILL)

        def in_prompt(done: int, total: int) -> None:
            if done >= 32 and len(doomed) == 2:
                kill()

        def texts() -> list[list[int]]:
            running = [
                cluster.submit(
                    prompt, max_tokens=24, temp=0.0, ignore_eos=True, on_prefill=in_prompt
                )
                for prompt in prompts
            ]
            found = [[token.id for _, token in zip(range(8), each)] for each in running]
            if doomed:
                kill()
            return [first + [t.id for t in each] for first, each in zip(found, running)]

        assert texts() == wanted
        assert cluster.hosts == (0,) + (None,) * (nodes - 1)
        assert cluster.placement.slices == ()
        assert max(in_use[1:]) < min(in_use[:1]) + loaded / 4  # nothing of the old weights is left
        several = "node 0 and node 2 have divided the experts anew"
        if nodes == 3:
            assert f"without node 1, once what runs is prefilled again: {several}" in told[1]
        alone = "once what runs is prefilled again: node 0 has all experts"
        assert told[-1].endswith(alone) and told[0].startswith(killed[0])

        if attention == "sharded":
            return

        def all_here() -> bool:
            cluster.step()  # a server does so while nobody asks for anything
            return cluster.hosts == tuple(range(nodes))

        wait_until(all_here, PATIENCE_S, "other processes have taken their places")
        assert len(cluster.placement.slices) == nodes
        assert texts() == wanted


@pytest.mark.parametrize("number", [1, 2, 7])
def test_the_others_go_on_or_name_the_node_that_fails(
    commands: Commands, folder: Path, number: int
) -> None:
    """Stopped or on another way; `python -m tests.cluster.graph_failures` runs more."""
    check_round(commands, folder, draw_round(number, seed=0))


def test_a_slow_node_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a GPU may wait: the pass is repeated, with the next one, and the text goes on."""
    repeat, layers = Door.repeat, list[int | None]()
    monkeypatch.setattr(Door, "repeat", lambda door: layers.append(repeat(door)) or layers[-1])
    monkeypatch.setattr("zmoe.loading.graph._patience_s", lambda: 0.3)
    with Cluster(folder, spec=ClusterSpec(2, engine=EngineConfig(compute="mlx"))) as cluster:
        wanted = [token.id for token in cluster.submit("my lord", max_tokens=24)]
        (worker,) = cluster.worker_pids()
        found = []
        for token in cluster.submit("my lord", max_tokens=24):
            found.append(token.id)
            if len(found) == 6:
                os.kill(worker, signal.SIGSTOP)
                threading.Timer(1.0, os.kill, (worker, signal.SIGCONT)).start()
        assert found == wanted
    assert layers and None not in layers  # once, or more often where the machine is busy


def test_ctrl_c_ends_all_processes(commands: Commands, folder: Path) -> None:
    leader = commands.start(
        "run", "-n", 3, "--model", folder, "--compute", "mlx", "-m", 100000, "x"
    )
    first_output(leader)
    leader.send_signal(signal.SIGINT)
    _, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode == 130, errors
