"""MLX's collectives over zmoe's exchange, among real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_exchange_processes import PATIENCE_S, Ranks

WORKER = Path(__file__).with_name("door_worker.py")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    started = Ranks(WORKER)
    yield started
    for rank in started.all:
        rank.end()


@pytest.mark.parametrize("scenario", ["sums", "sums of q8", "scattered sums"])
@pytest.mark.parametrize("nodes", [2, 3])
def test_sums_are_those_of_the_exchange(ranks: Ranks, nodes: int, scenario: str) -> None:
    for rank in ranks.start(nodes, scenario):
        assert rank.read("done")["done"]


def test_what_is_refused_is_named(ranks: Ranks) -> None:
    first, _ = ranks.start(2, "refusals")
    for words in (
        "an all_max of float32",
        "an all_sum of int8",
        "an all_max or min of bfloat16",
        "an all_sum of float32, over the whole world",
    ):
        said = first.read("error")
        assert f"zmoe's exchange does not do this: {words}" == said["error"]
        assert said["zeros"]


def test_a_killed_process_is_named_by_all_others(ranks: Ranks) -> None:
    first, victim, third = ranks.start(3, "forever")
    for rank in ranks.all:
        rank.read("running")
    victim.process.kill()
    for rank in (first, third):
        said = rank.read("error")
        assert said["rank"] == 1
        assert said["step"] >= 3 and said["layer"] in (0, 1)
        assert "rank 1 was lost at layer" in said["error"]
        assert rank.process.wait(PATIENCE_S) == 1


def test_a_stopped_process_misses_the_deadline(ranks: Ranks) -> None:
    first, victim = ranks.start(2, "forever", deadline_s=0.5)
    for rank in ranks.all:
        rank.read("running")
    os.kill(victim.process.pid, signal.SIGSTOP)
    assert "rank 1 sent nothing within 0.5 s" in first.read("error")["error"]


def test_another_plan_is_a_divergence(ranks: Ranks) -> None:
    for rank in ranks.start(2, "diverged"):
        said = rank.read("error")["error"]
        assert "has another plan, routing" in said and "layer 0, step 5" in said


def test_ctrl_c_ends_a_collective_that_waits(ranks: Ranks) -> None:
    first, silent = ranks.start(2, "silent")
    silent.read("running")
    first.read("running")
    first.process.send_signal(signal.SIGINT)
    assert first.read("error")["error"] == "interrupted"
    assert first.process.wait(PATIENCE_S) == 130
