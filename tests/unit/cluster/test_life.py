"""A cluster's life in the library: entered once, used by threads and coroutines, closed, dropped,
forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import socket
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.cluster.conftest import PATIENCE_S, wait_until
from zmoe.batch.plan import Plan
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.leader import Leader
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Batching, EngineConfig
from zmoe.engine.base import Floats
from zmoe.errors import InputError, QueueFullError, ZmoeError

PROMPT = list(range(40, 52))


def pair_of(compute: str) -> Cluster:
    return Cluster("zmoe-tiny", spec=ClusterSpec(nodes=2, engine=EngineConfig(compute=compute)))


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with pair_of("mlx") as two:
        yield two


def tokens(cluster: Cluster, prompt: Sequence[int] = PROMPT) -> list[int]:
    return [token.id for token in cluster.generate(prompt, max_tokens=8, ignore_eos=True)]


def maps_of(folder: str) -> int:
    """How many maps of a checkpoint's files this process has."""
    return Path("/proc/self/maps").read_text().count(folder)


def held() -> Counter[str]:
    """What this process holds open, apart from what nobody refers to any more."""
    gc.collect()
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing, or one closed since
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return Counter(links)


class Reader(threading.Thread):
    """Generates without end in a thread of its own; `error` is what ended it."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster, self.error = cluster, ""
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            while True:
                for _ in self.cluster.generate(PROMPT, max_tokens=500, ignore_eos=True):
                    self.begun.set()
        except ZmoeError as error:
            self.error = str(error)

    def ended(self) -> str:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.error


# ---- entering and closing -----------------------------------------------------------


def test_a_cluster_holds_no_socket_before_it_is_entered() -> None:
    pair_of("native")  # what is imported and cached first
    before = held()
    waiting = pair_of("native")
    assert not held() - before
    for use in (waiting.begin, waiting.take_spans, waiting.peak_memory, waiting.locked_buffers):
        with pytest.raises(ZmoeError, match="not running yet: enter it"):
            use()
    with pytest.raises(ZmoeError, match="not running yet: enter it"):
        waiting.generate("x")
    waiting.close()
    with pytest.raises(ZmoeError, match="entered or closed before"):
        waiting.__enter__()


def test_a_cluster_that_cannot_start_leaves_nothing_open(free_port: int) -> None:
    taken = ClusterSpec(nodes=2, port=free_port)
    wide = ClusterSpec(nodes=2, engine=EngineConfig(wire_dtype="f16"))

    def fail() -> Counter[str]:
        with socket.create_server(("127.0.0.1", free_port)):
            for spec, words in ((wide, "wire_dtype is"), (taken, "cannot listen")):
                with pytest.raises(InputError, match=words), Cluster(spec=spec):
                    pass
        return held()

    first = fail()  # what is opened once and kept
    assert not fail() - first


def test_entering_twice_leaves_the_running_cluster_alone(pair: Cluster) -> None:
    want = tokens(pair)
    with pytest.raises(ZmoeError, match="entered or closed before"):
        pair.__enter__()
    assert tokens(pair) == want


@pytest.mark.parametrize("compute", ["native", "mlx"])
def test_closing_frees_the_model(compute: str) -> None:
    spec = ClusterSpec(engine=EngineConfig(compute=compute))
    gc.collect()
    gc.disable()
    try:
        cluster = Cluster("zmoe-tiny", spec=spec)
        maps, memory = maps_of(cluster.info.path), mx.get_active_memory()
        with cluster:
            generation = cluster.generate(PROMPT, max_tokens=3)
            list(generation)
            assert cluster._node is not None and cluster._node._engine is not None
            model = weakref.ref(cluster._node._engine._model)
            weights = mx.get_active_memory() - memory
            assert weights > 1 << 20
            assert maps_of(cluster.info.path) == maps + (compute == "native")
        assert model() is None  # although `cluster` and `generation` are still there
        assert maps_of(cluster.info.path) == maps
        assert mx.get_active_memory() - memory < weights / 10
        assert mx.get_cache_memory() == 0
        gone = weakref.ref(cluster)
        del cluster, generation
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ZmoeError, match="ended: it was closed"):
        with Cluster("zmoe-tiny") as closed:
            pass
        closed.generate("x")


def test_a_dropped_cluster_warns_and_ends_its_worker() -> None:
    cluster = pair_of("native").__enter__()
    (pid,) = cluster.worker_pids()
    with pytest.warns(ResourceWarning, match="Cluster.* was not closed"):
        del cluster
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), PATIENCE_S, "the worker ended")


# ---- threads ------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2])
def test_closing_ends_the_generation_of_another_thread(nodes: int) -> None:
    """A step that waits for a peer just then is given up, which one node alone never does."""
    words = "this cluster has ended: it was closed"
    if nodes == 2:
        words += r"|step \d+ was given up: the exchange is being closed"
    with pair_of("native") if nodes == 2 else Cluster("zmoe-tiny") as cluster:
        reader = Reader(cluster)
        assert reader.begun.wait(PATIENCE_S)
        cluster.close()
        error = reader.ended()
        assert re.fullmatch(words, error), error


def test_closing_does_not_wait_for_a_peer_that_hangs() -> None:
    with pair_of("native") as cluster:
        reader = Reader(cluster)
        assert reader.begun.wait(PATIENCE_S)
        (pid,) = cluster.worker_pids()
        os.kill(pid, 19)  # SIGSTOP
        wait_until(lambda: cluster._lock.locked(), PATIENCE_S, "a step began")
        cluster.close()
        assert "given up" in reader.ended()


def test_a_lost_peer_ends_the_generations_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can take over its share, as in MLX's graph."""
    monkeypatch.setattr(Leader, "survive", lambda self, blocks: None)
    with pair_of("native") as cluster:
        readers = [Reader(cluster) for _ in range(3)]
        assert all(reader.begun.wait(PATIENCE_S) for reader in readers)
        (pid,) = cluster.worker_pids()
        os.kill(pid, 9)
        errors = [reader.ended() for reader in readers]
        assert all("rank 1" in error and "killed by SIGKILL" in error for error in errors), errors
        assert sum("this cluster has ended: rank 1" in error for error in errors) == 2
        with pytest.raises(ZmoeError, match="this cluster has ended: rank 1"):
            cluster.submit(PROMPT)


def test_threads_share_steps_and_get_what_each_gets_alone() -> None:
    prompts = [PROMPT, PROMPT[:5], [7] * 90, [9]]
    with pair_of("native") as cluster:
        scheduler, want = cluster._batcher.scheduler, []
        begun = scheduler.step
        for prompt in prompts:
            want.append(tokens(cluster, prompt))
        alone = scheduler.step - begun
        got: list[list[int]] = [[] for _ in prompts]
        start = threading.Barrier(len(prompts))

        def read(at: int) -> None:
            generation = cluster.submit(prompts[at], max_tokens=8, ignore_eos=True)
            start.wait(PATIENCE_S)
            got[at] = [token.id for token in generation]

        begun = scheduler.step
        threads = [threading.Thread(target=read, args=(at,)) for at in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert got == want
        assert scheduler.step - begun < alone / 2
        assert scheduler.running == scheduler.waiting == 0


def test_a_step_is_refused_from_within_another_call(pair: Cluster) -> None:
    with pair._running(), pytest.raises(ZmoeError, match="in the middle of another call"):
        pair.close()
    tokens(pair)


# ---- many generations -----------------------------------------------------------------


def test_coroutines_share_steps_in_a_thread_beside_the_loop(pair: Cluster) -> None:
    scheduler, want, step_threads = pair._batcher.scheduler, tokens(pair), set()
    run = pair._batcher._run

    def spied(plan: Plan) -> Floats | None:
        step_threads.add(threading.get_ident())
        return run(plan)

    async def read() -> list[int]:
        generation = pair.submit(PROMPT, max_tokens=8, ignore_eos=True)
        return [token.id async for token in generation]

    async def several() -> list[list[int]]:
        return list(await asyncio.gather(*(read() for _ in range(4))))

    pair._batcher._run = spied
    begun = scheduler.step
    try:
        assert asyncio.run(several()) == [want] * 4
    finally:
        pair._batcher._run = run
    assert threading.get_ident() not in step_threads
    # On MLX's caches four prompts are four passes, and a step of four rows is one.
    assert scheduler.step - begun <= 4 + 2 * len(want)


def test_a_coroutine_that_is_cancelled_leaves_the_others(pair: Cluster) -> None:
    want = tokens(pair)

    async def cancelled() -> list[int]:
        async def endless() -> None:
            async for _ in pair.submit(PROMPT, max_tokens=900, ignore_eos=True):
                pass

        task = asyncio.create_task(endless())
        generation = pair.submit(PROMPT, max_tokens=8, ignore_eos=True)
        found = [(await anext(generation)).id]
        task.cancel()
        found += [token.id async for token in generation]
        assert task.cancelled() or task.cancelling()
        return found

    assert asyncio.run(cancelled()) == want
    assert tokens(pair) == want
    assert pair._batcher.scheduler.running == 0


def test_who_stops_early_is_in_no_further_step(pair: Cluster) -> None:
    scheduler = pair._batcher.scheduler
    stopped, dropped, other = (pair.submit(PROMPT, max_tokens=50) for _ in range(3))
    for generation in (stopped, dropped, other):
        next(generation)
    assert scheduler.running == 3
    stopped.close()
    del dropped
    next(other)
    assert scheduler.running == 1
    assert list(stopped) == []
    other.close()
    tokens(pair)
    assert scheduler.running == 0


def test_those_beyond_parallel_wait_for_a_place() -> None:
    spec = ClusterSpec(engine=EngineConfig(parallel=1), batching=Batching(max_queue=2))
    with Cluster("zmoe-tiny", spec=spec) as cluster:
        want = tokens(cluster)
        run = [cluster.submit(PROMPT, max_tokens=8, ignore_eos=True) for _ in range(2)]
        with pytest.raises(QueueFullError, match="^2 requests wait already, and no more may"):
            cluster.submit(PROMPT)
        assert [[token.id for token in each] for each in reversed(run)] == [want] * 2


def test_a_script_may_submit_all_that_it_has_before_it_reads_any() -> None:
    with Cluster("zmoe-tiny", spec=ClusterSpec(engine=EngineConfig(parallel=4))) as cluster:
        want = tokens(cluster)[:1]
        all_of_them = [cluster.submit(PROMPT, max_tokens=1, ignore_eos=True) for _ in range(300)]
        assert [[token.id for token in each] for each in all_of_them] == [want] * 300


def test_who_waits_too_long_is_told_so() -> None:
    batching = Batching(queue_timeout=0.01)
    spec = ClusterSpec(engine=EngineConfig(parallel=1), batching=batching)
    with Cluster("zmoe-tiny", spec=spec) as cluster:
        first = cluster.submit(PROMPT, max_tokens=500, ignore_eos=True)
        next(first)
        late = cluster.submit(PROMPT)
        time.sleep(0.02)
        with pytest.raises(ZmoeError, match="^the request waited 0 s for others to end"):
            next(late)
        assert len(list(first)) == 499


def test_a_callback_that_fails_ends_its_own_generation(pair: Cluster) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    want = tokens(pair)
    other = pair.submit(PROMPT, max_tokens=8, ignore_eos=True)
    failing = pair.submit(PROMPT, on_prefill=fail)
    assert [token.id for token in other] == want
    next(failing)  # which had come before the callback failed
    with pytest.raises(RuntimeError, match="^12 of 12$"):
        next(failing)
    assert pair._batcher.scheduler.running == 0


# ---- tokens that the caller brings ----------------------------------------------------


def test_a_sequence_of_the_callers_has_the_cluster_for_itself(pair: Cluster) -> None:
    want = tokens(pair)
    step = pair.begin()
    given = [int(step(PROMPT, True).argmax())]
    while len(given) < len(want):
        given.append(int(step(given[-1:], False).argmax()))
    assert given == want
    newer = pair.begin()
    with pytest.raises(ZmoeError, match="^another generation has begun on this cluster"):
        step([5], False)
    newer(PROMPT, True)
    generation = pair.submit(PROMPT, max_tokens=8, ignore_eos=True)
    with pytest.raises(ZmoeError, match="^another generation has begun on this cluster"):
        newer([5], False)
    last = pair.begin()
    with pytest.raises(ZmoeError, match="^generations are running on this cluster"):
        last(PROMPT, True)
    assert [token.id for token in generation] == want
    assert int(last(PROMPT, True).argmax()) == want[0]
    assert tokens(pair) == want


def test_tokens_that_are_none_are_refused_and_end_nothing() -> None:
    with Cluster("zmoe-tiny", spec=ClusterSpec(engine=EngineConfig(parallel=1))) as cluster:
        step, room = cluster.begin(), cluster._batcher.scheduler.capacity
        want = step(PROMPT, True)
        for none in ([], [1024], [-1]):
            with pytest.raises(InputError, match=r"^a step of \[.*: expected token ids below 1024"):
                step(none, False)
        with pytest.raises(InputError, match=f"^the prompt has {room} tokens, and the cache"):
            step([5] * room, True)
        step([5] * (room - 1), True)
        step([5], False)
        with pytest.raises(InputError, match=f"^the sequence has {room} tokens, all that the"):
            step([5], False)
        np.testing.assert_array_equal(step(PROMPT, True), want)


def test_logits_stay_what_they_are(pair: Cluster) -> None:
    def logits(keep: bool) -> list[np.ndarray]:
        step, kept = pair.begin(), []
        for at in range(len(PROMPT)):
            row = step(PROMPT[at : at + 1], at == 0)
            kept.append(row if keep else np.array(row))
        return [np.array(row) for row in kept]

    for late, early in zip(logits(keep=True), logits(keep=False), strict=True):
        np.testing.assert_array_equal(late, early)


# ---- other processes -------------------------------------------------------------------


def test_a_forked_child_is_told_so_and_harms_nothing(pair: Cluster) -> None:
    want = tokens(pair)
    generation = pair.submit(PROMPT, max_tokens=8, ignore_eos=True)
    begun = [next(generation).id]

    def in_the_child() -> Sequence[bool]:
        told = []
        uses = (pair.begin, pair.peak_memory, pair.__enter__, lambda: next(generation))
        for use in (*uses, lambda: pair.generate("x")):
            try:
                use()
            except ZmoeError as error:
                told.append("a forked child has to make its own" in str(error))
        pair.close()
        return told

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons advise against fork with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if in_the_child() == [True] * 5 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert begun + [token.id for token in generation] == want
    assert tokens(pair) == want
