"""The centralised schedule in real processes: what workers hold, and who is lost."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.cluster.conftest import PATIENCE_S, Commands, wait_until
from tests.cluster.test_failure import ENDLESS, first_output
from tests.families import build
from tests.one_sequence import ENOUGH_BLOCKS, OneSequence
from zmoe.cluster.leader import Leader
from zmoe.cluster.resolver import PlacementResolver
from zmoe.cluster.spec import ClusterSpec, PlacementRequest
from zmoe.config import EngineConfig
from zmoe.loading import Skeleton, describe

CENTRAL = ("--schedule", "centralized")


def worker_memory(folder: Path, compute: str, schedule: str) -> int:
    """Peak resident bytes of rank 1 of 2, after a step.

    Not as it tells them itself: in those it counts what it was forked from, this process.
    """
    engine = EngineConfig(compute=compute, schedule=schedule)
    info, spec = describe(Skeleton(folder)), ClusterSpec(nodes=2, engine=engine)
    resolver = PlacementResolver(PlacementRequest("experts"), info, 2, engine)
    leader = Leader(info, str(folder), spec, resolver, lambda *_: None, lambda _: None, print)
    error = "the test failed"
    try:
        leader.launch()
        leader.start()
        if leader.node.engine.paged:
            leader.make_cache(ENOUGH_BLOCKS)
        OneSequence(leader.run, leader.node.engine.paged)([1, 2, 3])
        status = Path(f"/proc/{leader.worker_pids()[0]}/status").read_text()
        error = ""
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # type: ignore[index]
    finally:
        leader.close(error)


@pytest.mark.parametrize("compute", ["native", "mlx"])
def test_workers_hold_nothing_dense(compute: str, tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path, hidden_size=512, vocab_size=32768)
    dense = 2 * 32768 * 512 * 4  # embedding and lm_head alone
    apart = worker_memory(folder, compute, "decentralized")
    central = worker_memory(folder, compute, "centralized")
    assert apart - central > 0.9 * dense


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_everybody_names_a_lost_worker(commands: Commands, free_port: int, how: int) -> None:
    leader = commands.start(
        "run", "-n", 3, "--manual", "--starting-port", free_port, *CENTRAL, *ENDLESS, "ROMEO:"
    )
    workers = [
        commands.start("node", "--leader", f"127.0.0.1:{free_port}", "--rank", rank, "--once")
        for rank in (1, 2)
    ]
    first_output(leader)
    workers[0].send_signal(how)
    for process in (leader, workers[1]):
        _, errors = process.communicate(timeout=PATIENCE_S)
        if process is workers[1] and process.returncode == 0:
            continue  # it was between two steps: the leader told it to stop
        assert process.returncode == 1, errors
        last = errors.strip().splitlines()[-1]
        assert re.search(r"rank 1 .*(layer \d+, |between layers, )step \d+", last), errors


def test_workers_end_when_the_leader_is_killed(commands: Commands) -> None:
    leader = commands.start("run", "-n", 2, *CENTRAL, *ENDLESS, "ROMEO:")
    first_output(leader)
    assert len(commands.others(leader.pid)) == 1
    leader.kill()
    wait_until(lambda: not commands.others(leader.pid), PATIENCE_S, "workers gone")


def test_ctrl_c_ends_all_processes_at_once(commands: Commands) -> None:
    leader = commands.start("run", "-n", 2, *CENTRAL, *ENDLESS, "ROMEO:")
    first_output(leader)
    leader.send_signal(signal.SIGINT)
    _, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode == 130 and errors == ""
    wait_until(lambda: not commands.others(), PATIENCE_S, "workers gone")
