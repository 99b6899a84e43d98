"""A cluster's life in the library: entered once, used by threads, closed, dropped, forked."""

from __future__ import annotations

import gc
import os
import socket
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.cluster.conftest import PATIENCE_S, wait_until
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import EngineConfig
from zmoe.errors import InputError, ZmoeError

PROMPT = list(range(40, 52))


def pair_of(compute: str) -> Cluster:
    return Cluster("zmoe-tiny", spec=ClusterSpec(nodes=2, engine=EngineConfig(compute=compute)))


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with pair_of("mlx") as two:
        yield two


def tokens(cluster: Cluster) -> list[int]:
    return [token.id for token in cluster.generate(PROMPT, max_tokens=8)]


def maps_of(folder: str) -> int:
    """How many maps of a checkpoint's files this process has."""
    return Path("/proc/self/maps").read_text().count(folder)


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
    before = sorted(os.listdir("/proc/self/fd"))
    waiting = pair_of("native")
    assert sorted(os.listdir("/proc/self/fd")) == before
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

    def fail() -> int:
        with socket.create_server(("127.0.0.1", free_port)):
            for spec, words in ((wide, "wire_dtype is"), (taken, "cannot listen")):
                with pytest.raises(InputError, match=words), Cluster(spec=spec):
                    pass
        return len(os.listdir("/proc/self/fd"))

    assert fail() == fail()  # what is opened once and kept, apart


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
    with pair_of("native") if nodes == 2 else Cluster("zmoe-tiny") as cluster:
        reader = Reader(cluster)
        assert reader.begun.wait(PATIENCE_S)
        cluster.close()
        assert "this cluster has ended" in reader.ended()


def test_closing_does_not_wait_for_a_peer_that_hangs() -> None:
    with pair_of("native") as cluster:
        reader = Reader(cluster)
        assert reader.begun.wait(PATIENCE_S)
        (pid,) = cluster.worker_pids()
        os.kill(pid, 19)  # SIGSTOP
        wait_until(lambda: cluster._lock.locked(), PATIENCE_S, "a step began")
        cluster.close()
        assert "given up" in reader.ended()


def test_threads_take_turns(pair: Cluster) -> None:
    want = tokens(pair)
    readers = [Reader(pair) for _ in range(3)]
    wait_until(lambda: sum(r.is_alive() for r in readers) == 1, PATIENCE_S, "one is left")
    pair.begin()
    assert all("another generation has begun" in reader.ended() for reader in readers)
    assert tokens(pair) == want


def test_a_step_is_refused_from_within_another_call(pair: Cluster) -> None:
    with pair._running(), pytest.raises(ZmoeError, match="in the middle of another call"):
        pair.close()
    tokens(pair)


# ---- what else a caller may do ------------------------------------------------------


def test_logits_stay_what_they_are(pair: Cluster) -> None:
    def logits(keep: bool) -> list[np.ndarray]:
        step, kept = pair.begin(), []
        for at in range(len(PROMPT)):
            row = step(PROMPT[at : at + 1], at == 0, True)
            kept.append(row if keep else np.array(row))
        return [np.array(row) for row in kept]

    for late, early in zip(logits(keep=True), logits(keep=False), strict=True):
        np.testing.assert_array_equal(late, early)


def test_a_forked_child_is_told_so_and_harms_nothing(pair: Cluster) -> None:
    want = tokens(pair)

    def in_the_child() -> Sequence[bool]:
        told = []
        for use in (pair.begin, pair.peak_memory, pair.__enter__, lambda: pair.generate("x")):
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
            code = 0 if in_the_child() == [True] * 4 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tokens(pair) == want
