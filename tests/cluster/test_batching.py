"""Many generations at once on real nodes: as if each were alone, and what ends them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.cluster.conftest import PATIENCE_S
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Batching, EngineConfig
from zmoe.engine.batcher import Batcher
from zmoe.engine.generate import Generation
from zmoe.errors import InputError, QueueFullError, ZmoeError

PLAY = (
    "ROMEO:\nO, she doth teach the torches to burn bright! It seems she hangs upon the night. " * 5
)
PROMPTS = [
    *("ROMEO:", "JULIET:\nO", "KING HENRY:\nWhat news?", PLAY, PLAY + "JULIET:", PLAY[:200]),
    *(f"{name}:\n" for name in ("First Citizen", "MENENIUS", "NURSE", "MERCUTIO", "A", "B")),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temp": 1.0, "seed": 5},
    {"temp": 0.8, "top_p": 0.9, "seed": 6, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3},
]
ENDLESS: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}


def spec_of(nodes: int, batching: Batching | None = None, **engine: Any) -> ClusterSpec:
    return ClusterSpec(nodes, engine=EngineConfig(**engine), batching=batching or Batching())


def submitted(cluster: Cluster) -> Iterator[Generation]:
    """The prompts' generations, each one submitted when it is asked for."""
    for number, prompt in enumerate(PROMPTS):
        options = OPTIONS[number % len(OPTIONS)]
        yield cluster.submit(prompt, max_tokens=16, ignore_eos=True, **options)


def texts(generations: Iterable[Generation]) -> list[list[int]]:
    return [[token.id for token in generation] for generation in generations]


def test_thirty_two_at_once_are_as_alone() -> None:
    """Alone is a cluster that runs one at a time, in other chunks and without drafts."""
    one = spec_of(2, Batching(speculate="off"), parallel=1, prefill_chunk=100)
    with Cluster("zmoe-tiny", spec=one) as cluster:
        alone = texts(submitted(cluster))
    many = spec_of(2, Batching(speculate="2"), prefill_chunk=64)
    with Cluster("zmoe-tiny", spec=many) as cluster:
        endless = [cluster.submit("KING:", seed=n, temp=1.0, **ENDLESS) for n in range(20)]
        together = list(submitted(cluster))
        while cluster._batcher.scheduler.running < 32:
            next(endless[0])
        assert texts(together) == alone
        for generation in endless:
            generation.close()
        assert texts(list(submitted(cluster))) == alone  # with all prompts cached


def test_mlx_alone_may_compute_them() -> None:
    """There results may change with the batch: these are certain enough not to."""
    with Cluster("zmoe-tiny", spec=spec_of(2, compute="mlx")) as cluster:
        alone = texts(cluster.submit(prompt, max_tokens=6) for prompt in PROMPTS)
        together = texts([cluster.submit(prompt, max_tokens=6) for prompt in PROMPTS])
    assert sum(a == b for a, b in zip(alone, together)) >= len(PROMPTS) - 1


# ---- what ends them --------------------------------------------------------------------


class Consumer(threading.Thread):
    """Takes all of a generation's tokens; `error` is what ended it."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(daemon=True)
        self.generation, self.error, self.begun = generation, "", threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for _ in self.generation:
                self.begun.set()
        except ZmoeError as error:
            self.error = f"{type(error).__name__}: {error}"


def test_a_killed_worker_changes_no_text() -> None:
    """Eight at once, of which some prefill, others draft; each is as if nothing had happened."""
    told: list[str] = []
    spec = spec_of(3, Batching(speculate="2"), prefill_chunk=64)
    with Cluster("zmoe-tiny", spec=spec, on_notice=told.append) as cluster:
        before = texts(list(submitted(cluster)))
        generations = list(submitted(cluster))
        found = [[next(each).id] for each in generations]
        os.kill(cluster.worker_pids()[0], signal.SIGKILL)
        for begun, rest in zip(found, texts(generations)):
            begun += rest
        assert cluster.hosts == (0, 2, 2), told
    assert found == before


def test_a_killed_worker_ends_all_consumers() -> None:
    with Cluster("zmoe-tiny", spec=spec_of(3, schedule="centralized")) as cluster:
        consumers = [Consumer(cluster.submit("ROMEO:", **ENDLESS)) for _ in range(5)]
        assert all(consumer.begun.wait(PATIENCE_S) for consumer in consumers)
        os.kill(cluster.worker_pids()[0], signal.SIGKILL)
        for consumer in consumers:
            consumer.join(PATIENCE_S)
            assert "rank 1" in consumer.error, consumer.error
        assert sum(consumer.error.startswith("PeerError") for consumer in consumers) >= 1
        with pytest.raises(ZmoeError, match="this cluster has ended: .*rank 1"):
            cluster.submit("ROMEO:")


def test_ctrl_c_ends_all_consumers() -> None:
    with pytest.raises(KeyboardInterrupt), Cluster("zmoe-tiny", 2) as cluster:
        consumer = Consumer(cluster.submit("ROMEO:", **ENDLESS))
        assert consumer.begun.wait(PATIENCE_S)
        mine = cluster.submit("JULIET:", **ENDLESS)
        for _ in mine:
            signal.raise_signal(signal.SIGINT)
    consumer.join(PATIENCE_S)
    assert "this cluster has ended" in consumer.error
    with pytest.raises(ZmoeError, match="this cluster has ended"):
        list(mine)


def test_ctrl_c_between_a_step_and_its_tokens_ends_the_cluster() -> None:
    """Nobody waits for tokens that were never picked."""
    with Cluster("zmoe-tiny") as cluster:
        one, other = (cluster.submit("ROMEO:", **ENDLESS) for _ in range(2))
        interrupted = mock.patch.object(Batcher, "_sample", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt):
            next(one)
        with pytest.raises(ZmoeError, match="this cluster has ended: KeyboardInterrupt"):
            next(other)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Cluster]:
    """A cluster that runs two at a time, and lets three wait for two seconds."""
    batching = Batching(max_queue=3, queue_timeout=2.0)
    with Cluster("zmoe-tiny", spec=spec_of(1, batching, parallel=2)) as cluster:
        yield cluster


def test_a_full_queue_refuses_and_patience_ends(narrow: Cluster) -> None:
    running = [narrow.submit("ROMEO:", **ENDLESS) for _ in range(2)]
    next(running[0])
    waiting = [narrow.submit("JULIET:", max_tokens=3, ignore_eos=True) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait"):
        narrow.submit("NURSE:")
    for stream in (generation._stream for generation in waiting[1:]):
        assert not stream.ended
    running[0].close()
    assert len(list(waiting[0])) == 3  # it has waited for a place, and then had it
    running.append(narrow.submit("ROMEO:", **ENDLESS))
    for generation in (*running, *waiting):
        generation.close()


def test_one_that_waits_too_long_is_given_up(narrow: Cluster) -> None:
    running = [narrow.submit("ROMEO:", **ENDLESS) for _ in range(2)]
    next(running[0])
    late = narrow.submit("JULIET:")
    scheduler = narrow._batcher.scheduler
    scheduler._sequences[max(scheduler._sequences)].submitted -= 10.0
    with pytest.raises(ZmoeError, match="the request waited 1[0-9] s for others to end"):
        next(late)
    assert len(list(running[0])) > 800  # the others never noticed
    running[1].close()


def test_who_goes_away_gives_all_blocks_back(narrow: Cluster) -> None:
    scheduler = narrow._batcher.scheduler
    generation = narrow.submit("ROMEO:", **ENDLESS)
    next(generation)
    del generation
    assert len(list(narrow.submit("JULIET:", max_tokens=2, ignore_eos=True))) == 2
    assert scheduler.running == scheduler.waiting == 0
    assert scheduler.available == scheduler._memory.count


def test_memory_stays_flat_while_sequences_come_and_go(narrow: Cluster) -> None:
    draw, scheduler, resident = random.Random(1), narrow._batcher.scheduler, []
    running: deque[tuple[Generation, int]] = deque()
    for number in range(240):
        prompt = draw.choices(range(5, 1000), k=draw.choice((1, 20, 80, 200)))
        generation = narrow.submit(prompt, max_tokens=draw.randint(1, 12), ignore_eos=True)
        running.append((generation, draw.choice((1, 3, 20))))
        if len(running) > 2:
            oldest, most = running.popleft()
            list(itertools.islice(oldest, most))
            oldest.close()
        if number % 4 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    while running:
        running.pop()[0].close()
    assert len(list(narrow.submit("A", max_tokens=1))) == 1
    assert scheduler.running == scheduler.waiting == 0
    assert scheduler.available == scheduler._memory.count
    assert sum(resident[45:]) <= 1.02 * sum(resident[15:30])


def test_a_prompt_that_never_fits_is_told_both_numbers(narrow: Cluster) -> None:
    context = narrow.info.context_length
    with pytest.raises(InputError, match=f"{context} tokens.* {context}"):
        narrow.submit([5] * context)  # type: ignore[operator]
