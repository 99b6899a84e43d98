"""The hello: a node with another model, dtype, protocol or placement is refused by name."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.changed import changed
from tests.cluster.conftest import PATIENCE_S, Commands, commands_in, wait_until
from tests.conftest import unused_port
from tests.unit.store.stores import EXPERTS_1, store_of
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.hello import check_hello, hello_of
from zmoe.cluster.leader import notices_of
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.messages import Endpoints, Failed, Hello, Join, Message, Place, Ready, Setup, Stop
from zmoe.cluster.node import Node
from zmoe.cluster.spec import ClusterSpec, PlacementRequest
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.errors import InputError, MismatchError, ZmoeError
from zmoe.exchange.keys import Pinned
from zmoe.exchange.local import Endpoint
from zmoe.exchange.sockets import Context
from zmoe.kernels.arithmetic import arithmetic_of
from zmoe.loading import Skeleton, describe
from zmoe.placement.build import place_evenly
from zmoe.placement.estimate import NodeResources

GIB = 1 << 30
TINY = resolve_model("zmoe-tiny")


class Impostor(threading.Thread):
    """Rank 1, with one thing changed; keeps what the leader answers at last."""

    def __init__(
        self, port: int, join: dict[str, Any], hello: dict[str, Any], digest: str = ""
    ) -> None:
        """`digest`: of the placement that it claims to have loaded."""
        super().__init__(daemon=True)
        self._port, self._join_changes, self._hello_changes = port, join, hello
        self._digest = digest
        self.answer: object = None

    def run(self) -> None:
        context = Context()
        join = Join(PROTOCOL_VERSION, 1, "9.9", "otherhost", "")
        join = dataclasses.replace(join, **self._join_changes)
        bus = WorkerBus(context, f"127.0.0.1:{self._port}", join, 5.0, Pinned.of_user())
        answer = bus.receive(PATIENCE_S)
        if isinstance(answer, Setup):
            info = describe(Skeleton(TINY))
            here = Endpoint("127.0.0.1", 1, 2)
            hello = hello_of(info, arithmetic_of(EngineConfig()), NodeResources("m", GIB), here)
            bus.send(changed(hello, self._hello_changes))
            answer = bus.receive(PATIENCE_S)
        if isinstance(answer, Place):
            answer = bus.receive(PATIENCE_S)
        if isinstance(answer, Endpoints):
            bus.send(Ready(0.1, self._digest, ()))
            answer = bus.receive(PATIENCE_S)
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
            {"arithmetic.device": "metal {applegpu_g13s"},
            "node 1 .otherhost. computes on metal .applegpu_g13s, the leader cpu .*: nodes that",
        ),
        (
            {},
            {"arithmetic.mlx": "0.1"},
            "node 1 .otherhost. runs mlx 0.1, the leader .*centralized",
        ),
        ({}, {"arithmetic.mlx_lm": "0.2"}, "node 1 .otherhost. runs mlx-lm 0.2, the leader"),
        (
            {},
            {"arithmetic.compute": "mlx"},
            "multiplies matrices with --compute mlx, the leader native",
        ),
        (
            {},
            {"arithmetic.device": "cpu sparc", "arithmetic.probe": "beef"},
            "node 1 .otherhost. rounds otherwise on cpu sparc: digest beef, the leader",
        ),
        (
            {},
            {"endpoint.data_port": 0},
            "node 1 .otherhost. sent bad control data: Hello.endpoint.data_port is 0",
        ),
        ({}, {"isa": "SSE9"}, "instruction set 'SSE9' is not known"),
        ({}, {"fingerprint": "beef"}, "node 1 .otherhost. has another model: fingerprint beef"),
        ({}, {"dtype": "bfloat16"}, "has dtype bfloat16, the leader float32"),
        ({}, {"quantization": "affine-4bit-g64"}, "quantisation affine-4bit-g64, the leader none"),
    ],
)
def test_what_differs_is_named_on_both_sides(
    free_port: int, join: dict[str, Any], hello: dict[str, Any], words: str
) -> None:
    impostor = Impostor(free_port, join, hello)
    impostor.start()
    spec = ClusterSpec(nodes=2, manual=True, port=free_port, timing=Timing(join=PATIENCE_S))
    with pytest.raises(ZmoeError, match=words), Cluster(TINY, spec=spec):
        pass
    impostor.join(PATIENCE_S)
    assert not impostor.is_alive()
    assert isinstance(impostor.answer, Stop)
    assert impostor.answer.error


@pytest.mark.parametrize("field", ["device", "compute", "mlx", "mlx_lm", "probe"])
def test_workers_that_do_not_route_may_round_differently(field: str) -> None:
    info, here = describe(Skeleton(TINY)), Endpoint("127.0.0.1", 1, 2)
    mine = hello_of(info, arithmetic_of(EngineConfig()), NodeResources("m", GIB), here)
    theirs = changed(mine, {f"arithmetic.{field}": "another"})
    check_hello(mine, theirs, "node 1", "centralized")
    with pytest.raises(MismatchError, match="node 1 .*another"):
        check_hello(mine, theirs, "node 1", "decentralized")


def test_a_stranger_that_comes_first_takes_no_workers_place(free_port: int) -> None:
    """The token that tells the two apart is in no argument and no environment."""
    context = Context()
    join = Join(PROTOCOL_VERSION, 1, "9.9", "otherhost", "")
    stranger = WorkerBus(context, f"127.0.0.1:{free_port}", join, 5.0)
    refusals: list[str] = []

    def wait() -> None:
        try:
            stranger.receive(PATIENCE_S)
        except InputError as error:
            refusals.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with Cluster(TINY, spec=ClusterSpec(nodes=2, port=free_port)) as cluster:
        assert len(list(cluster.generate("ROMEO:", max_tokens=4))) == 4
        assert cluster._leader is not None
        token = cluster._leader._access.tokens[1].encode()
        (pid,) = cluster.worker_pids()
        for file in ("cmdline", "environ"):
            assert token not in Path(f"/proc/{pid}/{file}").read_bytes()
    waiting.join()
    words = "takes only nodes with a key, or that it starts itself"
    assert refusals == [f"leader 127.0.0.1:{free_port} {words}"]
    stranger.close()
    context.term()


def test_another_placement_is_named_on_both_sides(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our side neither connects nor loads: the impostor would not either.

    What a placement is chosen by, how fast this machine is at the moment, is left out.
    """
    monkeypatch.setattr(Node, "connect", lambda *_: None)
    monkeypatch.setattr(Node, "load", lambda *_: (None, 0.0))
    impostor = Impostor(free_port, {}, {}, digest="0123")
    impostor.start()
    evenly, timing = PlacementRequest("experts"), Timing(join=PATIENCE_S)
    spec = ClusterSpec(2, manual=True, port=free_port, timing=timing, placement=evenly)
    ours = place_evenly(describe(Skeleton(TINY)).shape, 2).digest
    words = f"node 1 .otherhost. has loaded placement 0123, the leader {ours}"
    with pytest.raises(MismatchError, match=words), Cluster(TINY, spec=spec):
        pass
    impostor.join(PATIENCE_S)
    assert isinstance(impostor.answer, Stop)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"owned": [[list(range(16)), []]] * 3 + [[list(range(15)), []]]}, "layer 3: no node owns"),
        ({"owned": [[list(range(16)), [16]]] * 4}, "layer 0, node 1: no expert 16"),
        ({"owned": [[[-1], list(range(16))]] * 4}, "layer 0, node 0: no expert -1"),
        ({"owned": []}, "16 experts in 0 layers does not fit"),
        ({"speeds": [1, -1]}, "positive speed"),
        ({"slices": [[0, 63], [63, 64]]}, "are cut at multiples of 64"),
    ],
)
def test_a_worker_refuses_what_is_no_placement(
    commands: Commands, changes: dict[str, Any], words: str
) -> None:
    """Nothing of it is used, and the leader is told."""
    context = Context()
    options = {"session": 1, "nodes": 2, "grace": PATIENCE_S, "keys": Pinned.of_user()}
    bus = LeaderBus(context, "127.0.0.1", 0, **options)
    answers: list[Message] = []

    def answer() -> None:
        heard: list[tuple[int, Message]] = []
        wait_until(lambda: heard.extend(bus.hear()) or heard, PATIENCE_S, "an answer")
        answers.extend(message for _, message in heard)

    def lead() -> None:
        answer()
        timing = Timing(peer=60.0, grace=60.0, load=60.0, join=60.0)
        bus.broadcast(Setup(2, str(TINY), EngineConfig(), timing, None))
        answer()
        placement = dataclasses.replace(place_evenly(describe(Skeleton(TINY)).shape, 2), **changes)
        bus.broadcast(Place(placement))
        nodes = (Endpoint("127.0.0.1", 1, 3), Endpoint("127.0.0.1", 2, 4))
        bus.broadcast(Endpoints("GENERIC", nodes))
        answer()

    leading = threading.Thread(target=lead, daemon=True)
    leading.start()
    node = ("node", "--leader", f"127.0.0.1:{bus.port}", "--rank", 1, "--once")
    assert commands.call(*node).returncode == 2
    leading.join(PATIENCE_S)
    join, hello, failed = answers
    assert isinstance(join, Join) and isinstance(hello, Hello)
    assert isinstance(failed, Failed) and failed.input_error
    assert words in failed.error
    bus.close()
    context.term()


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
    done = commands.run("-n", 2, "--manual", "--starting-port", free_port, "x")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "node 1" in line
    assert "another model" in line
    assert node.poll() is None


def test_the_leader_shows_what_a_worker_has_noticed(
    commands: Commands, free_port: int, tmp_path: Path
) -> None:
    """The worker's store changed; the leader's is as it was written."""
    written = store_of(TINY, tmp_path / "written")
    copy = Path(shutil.copytree(written, tmp_path / "copy"))
    time.sleep(0.02)  # the clock of files is no finer
    (copy / EXPERTS_1).touch()
    node = ("node", "--leader", f"127.0.0.1:{free_port}", "--rank", 1, "--once", "--model", copy)
    worker = commands.start(*node)
    spec = ClusterSpec(nodes=2, manual=True, port=free_port, timing=Timing(join=PATIENCE_S))
    with Cluster(written, spec=spec) as cluster:
        (notice,) = cluster.notices
    assert notice.startswith(f"node 1: {copy} changed since it was written, so ")
    assert worker.wait(PATIENCE_S) == 0


def test_a_notice_names_its_nodes_unless_all_have_it() -> None:
    told = {0: ("slow", "far"), 1: ("slow",), 2: ("slow", "far")}
    assert notices_of(told) == ("slow", "node 0, 2: far")
    assert notices_of({0: (), 1: ("far",)}) == ("node 1: far",)


def test_a_worker_says_why_its_leader_stopped(commands: Commands, free_port: int) -> None:
    node = commands.start("node", "--leader", f"127.0.0.1:{free_port}", "--rank", 1, "--once")
    spec = ClusterSpec(nodes=2, manual=True, port=free_port, timing=Timing(join=PATIENCE_S))
    with pytest.raises(RuntimeError), Cluster(TINY, spec=spec):
        raise RuntimeError("out of ideas")
    _, errors = node.communicate(timeout=PATIENCE_S)
    assert node.returncode == 1
    assert f"leader 127.0.0.1:{free_port} stopped: out of ideas" in errors


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """A worker that serves run after run: its process id, and the port where it seeks leaders."""
    port = unused_port()
    with commands_in(tmp_path_factory.mktemp("commands")) as commands:
        worker = commands.start("node", "--leader", f"127.0.0.1:{port}", "--rank", 1)
        yield worker.pid, port


class TestAWorkerStartedByHand:
    """It serves one run after the other."""

    @pytest.fixture
    def spec(self, serving: tuple[int, int]) -> ClusterSpec:
        return ClusterSpec(2, manual=True, port=serving[1], timing=Timing(join=PATIENCE_S))

    def test_serves_several_runs(self, serving: tuple[int, int], spec: ClusterSpec) -> None:
        """And lets go of the model after each."""
        maps = Path(f"/proc/{serving[0]}/maps")
        texts = []
        for _ in range(2):
            with Cluster(TINY, spec=spec) as cluster:
                texts.append("".join(t.text for t in cluster.generate("ROMEO:", max_tokens=8)))
                assert str(TINY) in maps.read_text()
            wait_until(lambda: str(TINY) not in maps.read_text(), PATIENCE_S, "nothing is mapped")
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
