"""Peers that die, hang or are interrupted: everybody else says so and ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import zmoe
from tests.cluster.conftest import PATIENCE_S, Commands, first_output, wait_until
from zmoe.config import Batching

ENDLESS = ("-m", 100000, "--prefill-step-size", 4)


def manual_cluster(
    commands: Commands, nodes: int, port: int, *options: object
) -> list[subprocess.Popen[str]]:
    """A leader and workers started by hand, so that each one's words can be read."""
    leader = commands.start(
        "run", "-n", nodes, "--manual", "--starting-port", port, *options, "ROMEO:"
    )
    return [leader] + [
        commands.start("node", "--leader", f"127.0.0.1:{port}", "--rank", rank, "--once")
        for rank in range(1, nodes)
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_the_text_goes_on_without_a_node(commands: Commands, free_port: int, how: int) -> None:
    """On the kernels a step can be repeated, and another node computes the lost one's share."""
    options = ("-m", 400, "--temp", 0.8, "--seed", 5)
    whole, _ = commands.start("run", "-n", 3, *options, "ROMEO:").communicate(timeout=PATIENCE_S)
    leader, *workers = manual_cluster(commands, 3, free_port, *options)
    first_output(leader)
    workers[0].send_signal(how)
    rest, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode == 0, errors
    assert whole.endswith(rest) and len(rest) > len(whole) // 2
    assert re.search("node 1 .*(cannot be reached|does not answer)", errors), errors
    assert "the run goes on; besides its own, node 2 computes the share of node 1" in errors
    _, errors = workers[1].communicate(timeout=PATIENCE_S)
    assert workers[1].returncode == 0, errors
    if how == signal.SIGSTOP:
        workers[0].send_signal(signal.SIGCONT)
        _, errors = workers[0].communicate(timeout=PATIENCE_S)
        assert workers[0].returncode == 1, errors  # the run is over meanwhile


def test_workers_end_when_the_leader_is_killed(commands: Commands) -> None:
    leader = commands.start("run", "-n", 3, *ENDLESS, "ROMEO:")
    first_output(leader)
    assert len(commands.others(leader.pid)) == 2
    leader.kill()
    wait_until(lambda: not commands.others(leader.pid), PATIENCE_S, "workers gone")


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_a_signal_ends_all_processes_at_once(commands: Commands, how: int, code: int) -> None:
    leader = commands.start("run", "-n", 2, *ENDLESS, "ROMEO:")
    first_output(leader)
    leader.send_signal(how)
    _, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode == code
    assert errors == ""
    wait_until(lambda: not commands.others(), PATIENCE_S, "workers gone")


def test_a_signal_while_starting_leaves_nothing(commands: Commands) -> None:
    leader = commands.start("run", "-n", 2, *ENDLESS, "ROMEO:")
    wait_until(lambda: len(commands.others(leader.pid)) == 1, PATIENCE_S, "workers started")
    leader.send_signal(signal.SIGINT)
    _, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode == 130, errors
    assert errors == ""
    wait_until(lambda: not commands.others(), PATIENCE_S, "workers gone")


def test_a_reader_that_goes_away_ends_the_run(commands: Commands) -> None:
    leader = commands.start("run", "-n", 2, *ENDLESS, "ROMEO:")
    first_output(leader)
    assert leader.stdout is not None
    leader.stdout.close()
    leader.wait(timeout=PATIENCE_S)
    wait_until(lambda: not commands.others(), PATIENCE_S, "workers gone")


@pytest.mark.parametrize("moment", [0.0, 0.4, 1.0])
def test_workers_end_when_the_leader_is_killed_while_starting(
    commands: Commands, moment: float
) -> None:
    leader = commands.start("run", "-n", 2, *ENDLESS, "ROMEO:")
    wait_until(lambda: len(commands.others(leader.pid)) == 1, PATIENCE_S, "workers started")
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(moment)
    leader.kill()
    wait_until(lambda: not commands.others(leader.pid), PATIENCE_S, "workers gone")


def test_a_node_lost_between_two_prompts_is_not_missed() -> None:
    options = {"max_tokens": 40, "temp": 0.8, "seed": 4, "ignore_eos": True}
    told: list[str] = []
    with zmoe.Cluster(nodes=3, on_notice=told.append) as cluster:
        before = [token.id for token in cluster.generate("ROMEO:", **options)]
        pid = cluster.worker_pids()[0]
        os.kill(pid, signal.SIGKILL)
        assert [token.id for token in cluster.generate("ROMEO:", **options)] == before
        assert cluster.hosts == (0, 2, 2)
        assert told == [
            f"node 1 on this machine (pid {pid}) was killed by SIGKILL",
            "the run goes on; besides its own, node 2 computes the share of node 1",
        ]

        def all_here() -> bool:
            cluster.step()  # a server does so while nobody asks for anything
            return cluster.hosts == (0, 1, 2)

        wait_until(all_here, PATIENCE_S, "another process has taken its place")
        assert [token.id for token in cluster.generate("ROMEO:", **options)] == before


@pytest.mark.parametrize(
    "engine",
    [
        {"wire_dtype": "q8"},
        {"max_kv_size": 256, "kv_bits": 8},
        {"schedule": "centralized"},
        {"compute": "mlx"},  # whose caches cannot go back: what ran is prefilled again
    ],
)
def test_all_workers_lost_inside_a_prompt_are_not_missed(engine: dict[str, Any]) -> None:
    spec = zmoe.ClusterSpec(nodes=3, engine=zmoe.EngineConfig(prefill_chunk=4, **engine))
    options = {"max_tokens": 20, "temp": 0.8, "seed": 4, "ignore_eos": True}
    prompt = [7 + n % 50 for n in range(600)]
    with zmoe.Cluster(spec=spec) as cluster:
        whole = [token.id for token in cluster.generate(prompt, **options)]

    def kill(done: int, total: int) -> None:
        if done >= 200 and doomed:
            os.kill(doomed.pop(), signal.SIGKILL)

    with zmoe.Cluster(spec=spec) as cluster:
        doomed = cluster.worker_pids()
        found = [t.id for t in cluster.generate(prompt, on_prefill=kill, **options)]
        assert cluster.hosts == (0, 0, 0)
    assert found == whole


def test_what_is_repeated_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMOE_FAIL", "1.before-step:60=kill")
    options = {"max_tokens": 40, "temp": 0.8, "seed": 4, "ignore_eos": True}
    spec = zmoe.ClusterSpec(3, record_usage=True, batching=Batching(speculate="off"))
    with zmoe.Cluster(spec=spec, on_notice=lambda line: None) as cluster:
        usages = []
        for _ in range(2):
            list(cluster.generate("ROMEO:", **options))
            usages.append(cluster.take_usage())
        assert cluster.hosts == (0, 2, 2)
        assert usages[0] == usages[1]


def test_a_worker_killed_while_starting_is_named(commands: Commands) -> None:
    leader = commands.start("run", "-n", 2, *ENDLESS, "ROMEO:")
    # What is just being started has no environment for a moment: it may be gone when asked again.
    (worker,) = wait_until(lambda: commands.others(leader.pid), PATIENCE_S, "worker started")
    os.kill(worker, signal.SIGKILL)
    _, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode in (1, 2)
    words = rf"(node|rank) 1 on this machine \(pid {worker}\) was killed by SIGKILL"
    assert re.search(words, errors.strip().splitlines()[-1])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_peer_lost_while_loading_is_not_missed(
    commands: Commands, free_port: int, tmp_path: Path, how: int
) -> None:
    armed, usual = tmp_path / "armed", commands.env
    armed.touch()
    commands.env = {**usual, "ZMOE_FAIL": f"1.load=sleep:3600@{armed}"}
    victim = commands.start("node", "--leader", f"127.0.0.1:{free_port}", "--rank", 1, "--once")
    commands.env = usual
    run = ("run", "-n", 3, "-m", 20)
    leader = commands.start(*run, "--manual", "--starting-port", free_port, "ROMEO:")
    third = commands.start("node", "--leader", f"127.0.0.1:{free_port}", "--rank", 2, "--once")
    wait_until(lambda: not armed.exists(), PATIENCE_S, "node 1 loads")
    victim.send_signal(how)
    told = [process.communicate(timeout=PATIENCE_S) for process in (leader, third)]
    assert (leader.returncode, third.returncode) == (0, 0), told
    assert "node 2 computes the share of node 1" in told[0][1]
    alone, _ = commands.start("run", "-m", 20, "ROMEO:").communicate(timeout=PATIENCE_S)
    assert told[0][0] == alone
