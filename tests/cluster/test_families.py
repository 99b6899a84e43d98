"""Every family of models on 1 to 4 real nodes against mlx-lm in one process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.cluster.conftest import Commands
from tests.families import FAMILIES, build
from zmoe.cluster.leader import ClusterSpec, Leader
from zmoe.cluster.member import Member
from zmoe.config import EngineConfig, Timing
from zmoe.models import inspect_model

PROMPT = [5, 17, 3, 44, 29, 8, 61, 2, 33, 12, 7]
TOKENS = 8
CHUNK = 6


def reference(folder: Path) -> tuple[list[int], list[np.ndarray]]:
    """mlx-lm alone: greedy tokens, and the logits (vocabulary,) of each step."""
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    tokens, logits, todo = [], [], PROMPT
    for _ in range(TOKENS):
        row = model(mx.array([todo]), cache=cache)[0, -1].astype(mx.float32)
        logits.append(np.array(row))
        tokens.append(int(logits[-1].argmax()))
        todo = tokens[-1:]
    return tokens, logits


class Ports:
    """Three workers started by hand for each cluster size, which serve all families in turn."""

    def __init__(self, commands: Commands) -> None:
        self.by_nodes: dict[int, int] = {}
        for nodes in (2, 3, 4):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.by_nodes[nodes] = port = probe.getsockname()[1]
            for rank in range(1, nodes):
                commands.start("node", "--leader", f"127.0.0.1:{port}", "--rank", rank)


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    commands = Commands()
    yield Ports(commands)
    for process in commands.started:
        process.terminate()
        process.communicate(timeout=10)


def run(folder: Path, nodes: int, ports: Ports) -> tuple[list[int], list[np.ndarray]]:
    """The same on `nodes` nodes, prompt in chunks."""
    info = inspect_model(folder)
    engine = EngineConfig(prefill_chunk=CHUNK)
    leader = None
    if nodes == 1:
        member = Member(info, 0, 1, 0, engine, Timing())
        member.load(lambda done, total: None)
    else:
        spec = ClusterSpec(
            nodes=nodes,
            manual=True,
            port=ports.by_nodes[nodes],
            engine=engine,
            timing=Timing(join=60),
        )
        leader = Leader(info, str(folder), spec, lambda rank, done, total: None)
    try:
        if leader is not None:
            leader.start()
            forward = leader.forward
        else:
            forward = lambda tokens, reset: member.forward(1, tokens, reset)  # noqa: E731
        tokens, logits = [], []
        forward(PROMPT[:CHUNK], True)
        todo = PROMPT[CHUNK:]
        for _ in range(TOKENS):
            row = forward(todo, False).astype(mx.float32)
            logits.append(np.array(row))
            tokens.append(int(logits[-1].argmax()))
            todo = tokens[-1:]
        return tokens, logits
    finally:
        if leader is not None:
            leader.close()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_nodes_agree_with_mlx_lm(name: str, ports: Ports, tmp_path: Path) -> None:
    folder = build(name, tmp_path / name)
    tokens, logits = reference(folder)
    for nodes in (1, 2, 3, 4):
        found_tokens, found_logits = run(folder, nodes, ports)
        assert found_tokens == tokens, f"{nodes} nodes"
        scale = max(float(np.abs(row).max()) for row in logits)
        worst = max(float(np.abs(a - b).max()) for a, b in zip(found_logits, logits))
        assert worst <= 1e-4 * scale, f"{nodes} nodes: logits differ by {worst / scale:.1e}"
