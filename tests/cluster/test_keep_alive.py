"""Workers whose leader is gone wait for the next one with the weights that they have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.cluster.conftest import PATIENCE_S, Commands, Workers, first_output, wait_until, workers
from tests.cluster.test_graph import folder
from zmoe import Cluster, ClusterSpec, EngineConfig
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.spec import PlacementRequest

__all__ = ["folder", "workers"]

STILL_LOADED = "node 1, 2: the weights of the run before were still loaded"
OPTIONS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def text(cluster: Cluster) -> str:
    return "".join(token.text for token in cluster.generate("ROMEO:", **OPTIONS))


@contextmanager
def leaving(folder: Path, spec: ClusterSpec) -> Iterator[Cluster]:
    """A cluster whose leader goes as if it were killed: it says nothing to its workers."""
    with Cluster(folder, spec=spec) as cluster:
        yield cluster
        with mock.patch.object(LeaderBus, "broadcast"), mock.patch.object(LeaderBus, "finish"):
            cluster.close()


@pytest.mark.parametrize(
    ("engine", "way", "is_kept"),
    [
        ({"compute": "native"}, "experts", True),
        ({"compute": "native", "kv_bits": 8, "max_kv_size": 64}, "slices", True),
        ({"compute": "mlx"}, "experts", True),
        ({"compute": "mlx"}, "slices", False),  # in MLX's graph
        ({"schedule": "centralized"}, "experts", True),
    ],
    ids=["native", "native slices", "mlx", "graph", "centralized"],
)
def test_what_is_loaded_serves_the_next_leader(
    folder: Path, workers: Workers, engine: dict[str, Any], way: str, is_kept: bool
) -> None:
    spec = replace(
        workers.spec(3, EngineConfig(**engine)),
        keep_alive=PATIENCE_S,
        placement=PlacementRequest(way=way),
    )
    with leaving(folder, spec) as cluster:
        assert STILL_LOADED not in cluster.notices
        whole = text(cluster)
        cluster.submit("JULIET:", **OPTIONS)
        cluster.step()  # its sequence has not ended when the leader is gone
    with leaving(folder, spec) as cluster:
        assert (STILL_LOADED in cluster.notices) == is_kept
        assert text(cluster) == whole
    other = PlacementRequest(way="experts" if way == "slices" else "replicas")
    with Cluster(folder, spec=replace(spec, placement=other)) as cluster:
        assert STILL_LOADED not in cluster.notices
        assert text(cluster) == whole


def test_a_worker_ends_when_no_leader_comes(commands: Commands, free_port: int) -> None:
    leader = commands.start(
        *("run", "-n", 2, "--manual", "--starting-port", free_port, "--keep-alive", 1),
        *("-m", 100000, "--max-kv-size", 64, "ROMEO:"),
    )
    address = f"127.0.0.1:{free_port}"
    worker = commands.start("node", "--leader", address, "--rank", 1, "--once")
    first_output(leader)
    leader.kill()
    _, said = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 1
    gone = f"zmoe-node[1]: rank 0 (leader {address}) is gone between layers, step "
    *_, waits, ends = said.splitlines()
    assert waits.startswith(gone) and waits.endswith("; waiting 1 s for another leader there")
    assert ends == waits.partition(";")[0]
    wait_until(lambda: not commands.others(leader.pid), PATIENCE_S, "all ended")
