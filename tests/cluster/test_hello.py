"""The hello: a node with another model, dtype, protocol or placement is refused by name."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.cluster.conftest import Commands
from zmoe.cluster.bus import WorkerBus
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.leader import ClusterSpec
from zmoe.cluster.member import hello_of
from zmoe.cluster.messages import Hello, Join, Setup, Stop
from zmoe.config import PROTOCOL_VERSION, Timing
from zmoe.errors import MismatchError, ZmoeError
from zmoe.models import inspect_model
from zmoe.models.hub import resolve_model
from zmoe.moe.exchange import Endpoint
from zmoe.placement.build import place_evenly

TINY = resolve_model("zmoe-tiny")


class Impostor(threading.Thread):
    """Rank 1, up to the hello, with one thing changed; keeps what the leader answers."""

    def __init__(self, port: int, join: dict[str, Any], hello: dict[str, Any]) -> None:
        super().__init__()
        self._port, self._join_changes, self._hello_changes = port, join, hello
        self.answer: object = None

    def run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        bus = WorkerBus(context, f"127.0.0.1:{self._port}", 1, 5.0)
        join = Join(PROTOCOL_VERSION, 1, "9.9", "otherhost")
        bus.send(dataclasses.replace(join, **self._join_changes))
        answer = bus.receive(20)
        if isinstance(answer, Setup):
            info = inspect_model(TINY)
            hello: Hello = hello_of(info, place_evenly(info, 2), Endpoint("127.0.0.1", 1, 2))
            bus.send(dataclasses.replace(hello, **self._hello_changes))
            answer = bus.receive(20)
        self.answer = answer
        bus.close()
        context.term()


@pytest.mark.parametrize(
    ("join", "hello", "words"),
    [
        (
            {"protocol": 99},
            {},
            f"node 1 .otherhost. speaks protocol 99.*9.9.*leader {PROTOCOL_VERSION}",
        ),
        (
            {},
            {"protocol": 99},
            f"node 1 .otherhost. has protocol 99, the leader {PROTOCOL_VERSION}",
        ),
        ({}, {"fingerprint": "beef"}, "node 1 .otherhost. has another model: fingerprint beef"),
        ({}, {"dtype": "bfloat16"}, "has dtype bfloat16, the leader float32"),
        ({}, {"quantization": "affine-4bit-g64"}, "quantisation affine-4bit-g64, the leader none"),
        ({}, {"placement": "0123"}, "has placement 0123, the leader"),
    ],
)
def test_what_differs_is_named_on_both_sides(
    free_port: int, join: dict[str, Any], hello: dict[str, Any], words: str
) -> None:
    impostor = Impostor(free_port, join, hello)
    impostor.start()
    spec = ClusterSpec(nodes=2, manual=True, port=free_port, timing=Timing(join=20))
    with pytest.raises(MismatchError, match=words), Cluster(TINY, spec=spec):
        pass
    impostor.join(30)
    assert not impostor.is_alive()
    assert isinstance(impostor.answer, Stop)
    assert impostor.answer.error


def test_a_worker_with_another_checkpoint_says_so_and_waits_on(
    commands: Commands, free_port: int, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = b"\1" * (len(data) - len(data) // 2)
    file.write_bytes(data)
    node = commands.start(
        "node", "--leader", f"127.0.0.1:{free_port}", "--rank", 1, "--model", other
    )
    line = commands.refused("-n", 2, "--manual", "-p", free_port, "x")
    assert "node 1" in line
    assert "another model" in line
    assert node.poll() is None


class TestAWorkerStartedByHand:
    """It serves one run after the other."""

    @pytest.fixture
    def spec(self, commands: Commands, free_port: int) -> Iterator[ClusterSpec]:
        commands.start("node", "--leader", f"127.0.0.1:{free_port}", "--rank", 1)
        yield ClusterSpec(nodes=2, manual=True, port=free_port, timing=Timing(join=30))

    def test_serves_several_runs(self, spec: ClusterSpec) -> None:
        texts = []
        for _ in range(3):
            with Cluster(TINY, spec=spec) as cluster:
                texts.append("".join(t.text for t in cluster.generate("ROMEO:", max_tokens=8)))
        assert len(set(texts)) == 1

    def test_one_cluster_serves_several_prompts(self, spec: ClusterSpec) -> None:
        with Cluster(TINY, spec=spec) as cluster:
            first = [t.id for t in cluster.generate("ROMEO:", max_tokens=8)]
            stopped = cluster.generate("JULIET:", max_tokens=50)
            next(stopped)
            stopped.close()
            assert [t.id for t in cluster.generate("ROMEO:", max_tokens=8)] == first

    def test_an_ended_cluster_says_so(self, spec: ClusterSpec) -> None:
        with Cluster(TINY, spec=spec) as cluster:
            pass
        with pytest.raises(ZmoeError):
            list(cluster.generate("ROMEO:", max_tokens=2))
