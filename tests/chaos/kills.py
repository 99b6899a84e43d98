"""Kill workers at random moments of random runs: `python -m tests.chaos.kills --help`.

Every text is compared to that of the same run before anything was killed, at temperature 0.8 with
a seed. A line is printed per round; the exit code is 1 if a round has failed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.cluster.conftest import MARK, processes_with, wait_until
from tests.families import build
from tests.server.serving import Server, serving
from tests.server.test_life import Reader, engine_of
from zmoe import Cluster, ClusterSpec, EngineConfig
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.spec import PlacementRequest
from zmoe.config import DEFAULT_MODEL, Batching, Sampling
from zmoe.errors import ZmoeError

ROUND_S = 90  # the longest that a round may take, on a busy machine
RETURN_S = 60  # until all workers that were killed are back
ROUNDS_PER_CLUSTER = 8
STREAMS = 8  # at the same time, of a server
SECOND_KILL = 0.2  # how many rounds have another kill
RECOVERY_S = 0.4  # within which that comes
MOST_NODES = 4
SITES = ("open", "connect", "adopt")  # in a recovery

OPTIONS: dict[str, Any] = {"temp": 0.8, "seed": 5, "ignore_eos": True}


@dataclass(frozen=True)
class Variant:
    """How the nodes of a round work together."""

    nodes: int
    wire_dtype: str
    placement: str
    prefill_chunk: int
    window: bool  # a rotating cache in 8 bits
    speculate: str

    @classmethod
    def drawn(cls, draw: random.Random) -> Variant:
        """Any."""
        return cls(
            nodes=draw.randint(2, MOST_NODES),
            wire_dtype=draw.choice(("f32", "bf16", "q8")),
            placement=draw.choice(("experts", "replicas", "slices")),
            prefill_chunk=draw.choice((4, 64, 512)),
            window=draw.random() < 0.3,
            speculate=draw.choice(("auto", "off", "4")),
        )

    @property
    def model(self) -> str:
        """One that can be cut so."""
        return sliceable_model() if self.placement == "slices" else DEFAULT_MODEL

    def spec(self) -> ClusterSpec:
        """Of a cluster on this machine."""
        engine = EngineConfig(
            prefill_chunk=self.prefill_chunk,
            wire_dtype=self.wire_dtype,
            max_kv_size=256 if self.window else None,
            kv_bits=8 if self.window else None,
        )
        return ClusterSpec(
            nodes=self.nodes,
            engine=engine,
            batching=Batching(speculate=self.speculate),
            placement=PlacementRequest(way=self.placement),
        )

    def flags(self) -> list[str]:
        """Of zmoe-serve."""
        window = ["--max-kv-size", "256", "--kv-bits", "8"] if self.window else []
        return [
            *("--model", self.model),
            *("--nodes", str(self.nodes), "--wire-dtype", self.wire_dtype),
            *("--placement", self.placement, "--prefill-step-size", str(self.prefill_chunk)),
            *("--speculate", self.speculate, *window),
        ]

    def __str__(self) -> str:
        window = ", window of 256 in 8 bits" if self.window else ""
        return (
            f"{self.nodes} nodes, {self.placement}, {self.wire_dtype}, chunks of "
            f"{self.prefill_chunk}, speculate {self.speculate}{window}"
        )


@functools.cache
def sliceable_model() -> str:
    """A folder with a random model whose experts can be cut in four, for this process."""
    folder = Path(tempfile.mkdtemp(prefix="zmoe-chaos-"))
    atexit.register(shutil.rmtree, folder)
    sizes = {"moe_intermediate_size": 256, "head_dim": 64, "vocab_size": 1024}
    build("qwen3_moe", folder, **sizes, max_position_embeddings=2048)
    tiny = resolve_model(DEFAULT_MODEL)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, folder)
    return str(folder)


class Failure(Exception):
    """What a round must not do."""


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """What takes longer fails, and shows where every thread is."""

    def late(*_: object) -> None:
        faulthandler.dump_traceback(all_threads=True)
        raise Failure(f"did not end within {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest may have set another one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@dataclass
class Killer:
    """Kills one of `victims()` after `delays[0]` seconds, another one `delays[1]` s later, ..."""

    draw: random.Random
    victims: Callable[[], Sequence[int]]
    delays: Sequence[float]
    story: list[str] = field(default_factory=list)

    def __enter__(self) -> Killer:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        killed = set[int]()
        for delay in self.delays:
            time.sleep(delay)
            left = sorted(set(self.victims()) - killed)
            if not left:
                self.story.append("nobody left to kill")
                return
            pid = self.draw.choice(left)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            self.story.append(f"killed {pid} after {delay:.3f} s")


def delays(draw: random.Random, duration: float) -> list[float]:
    """When to kill, in what takes `duration` s undisturbed."""
    second = draw.random() < SECOND_KILL
    return [draw.uniform(0, duration)] + [draw.uniform(0, RECOVERY_S)] * second


class Results:
    """Counts rounds, and prints a line for each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed = False

    @contextlib.contextmanager
    def round(self, title: str, story: list[str]) -> Iterator[None]:
        """A round, whose `story` is known at its end; a last entry `=...` is its outcome."""
        try:
            with deadline(ROUND_S):
                yield
            died = any("killed" in each or "failed" in each for each in story)
            outcome = "same text" if died else "nobody to kill"
            outcome = story.pop()[1:] if story[-1][:1] == "=" else outcome
        except Exception as error:
            if not isinstance(error, Failure):
                traceback.print_exc()
            outcome = f"FAILED: {type(error).__name__}: {error}"
            self.failed = True
        self.counts["FAILED" if "FAILED" in outcome else outcome] += 1
        print(f"{title}: {'; '.join(story)}: {outcome}", flush=True)
        if "FAILED" in outcome:
            raise Failure(title)

    def end(self) -> int:
        """Print the counts; the exit code."""
        for outcome, count in sorted(self.counts.items()):
            print(f"{count:5} {outcome}")
        return int(self.failed)


@contextlib.contextmanager
def marked() -> Iterator[Path]:
    """What is started within has ended at the end. A worker dies where it comes to a site of a
    recovery if the folder that this yields has a file `<rank>.<site>`.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        points = [f"{rank}.{site}" for rank in range(1, MOST_NODES) for site in SITES]
        faults = ",".join(f"{point}=kill@{folder}/{point}" for point in points)
        told = {MARK: mark, "ZMOE_FAIL": faults}
        with mock.patch.dict(os.environ, told):
            try:
                yield Path(folder)
                wait_until(lambda: not processes_with(mark), 10, "all processes ended")
            finally:
                for pid in processes_with(mark):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def failpoint(draw: random.Random, nodes: int, folder: Path, story: list[str]) -> Iterator[None]:
    """Have a node die as it comes to a place in a recovery, in some rounds."""
    file = folder / f"{draw.randrange(1, nodes)}.{draw.choice(SITES)}"
    if draw.random() < SECOND_KILL:
        file.touch()
        yield
        story.append(f"node {file.name} failed" if not file.exists() else f"{file.name} unused")
        file.unlink(missing_ok=True)
    else:
        yield


def generate(cluster: Cluster, prompts: Sequence[Sequence[int]], many: int) -> list[list[int]]:
    """The texts of all prompts, which run at the same time and find nothing in the prefix cache."""
    sampling, salt = Sampling(max_tokens=many, **OPTIONS), uuid.uuid4().bytes
    streams = [cluster.make_stream(prompt, sampling, salt=salt) for prompt in prompts]
    for stream in streams:
        cluster.begin_stream(stream)
    while not all(stream.ended for stream in streams):
        cluster.step()
    assert all(stream.is_over() for stream in streams)  # raises what has ended one
    return [[pick.token for pick, _ in stream.ready] for stream in streams]


def run_workers(draw: random.Random, rounds: int, results: Results, name: str) -> None:
    """Rounds on one cluster in this process, whose workers are killed."""
    variant = Variant.drawn(draw)
    length, many = draw.choice((1, 70, 300)), draw.choice((60, 200, 400))
    prompts = [[draw.randrange(3, 200) for _ in range(length)] for _ in range(draw.choice((1, 4)))]
    told: list[str] = []
    print(f"{name}: {variant}; {len(prompts)} of {length} tokens, and {many} more", flush=True)
    cluster = Cluster(variant.model, spec=variant.spec(), on_notice=told.append)
    with marked() as folder, cluster:
        generate(cluster, prompts, many)
        began = time.monotonic()
        whole = generate(cluster, prompts, many)
        duration = time.monotonic() - began
        for number in range(rounds):
            killer = Killer(draw, cluster.worker_pids, delays(draw, duration))
            with results.round(f"{name}.{number}", killer.story):
                with killer, failpoint(draw, variant.nodes, folder, killer.story):
                    found = generate(cluster, prompts, many)
                killer.story.append(f"hosts {cluster.hosts}")
                if found != whole:
                    same = [sum(a == b for a, b in zip(*pair)) for pair in zip(found, whole)]
                    raise Failure(f"other texts: {same} tokens are the same; told {told}")
                told.clear()
            alone = set(cluster.hosts) == {0}
            if (alone or draw.random() < 0.7) and number < rounds - 1:
                back_by = time.monotonic() + RETURN_S
                while cluster.hosts != tuple(range(variant.nodes)):
                    if time.monotonic() > back_by:
                        raise Failure(f"not all came back: hosts {cluster.hosts}, told {told}")
                    cluster.step()
                    time.sleep(0.02)


def run_starting(draw: random.Random, rounds: int, results: Results, name: str) -> None:
    """One cluster after the other in this process, of which a worker is killed while it starts."""
    variant = Variant.drawn(draw)
    print(f"{name}: {variant}", flush=True)
    options = {**OPTIONS, "max_tokens": 40}
    began = time.monotonic()
    with marked(), Cluster(variant.model, spec=variant.spec()) as cluster:
        duration = time.monotonic() - began
        whole = [token.id for token in cluster.generate("ROMEO:", **options)]
    for number in range(rounds):
        cluster = Cluster(variant.model, spec=variant.spec(), on_notice=lambda line: None)
        killer = Killer(draw, cluster.worker_pids, [draw.uniform(0.1, duration)])
        with results.round(f"{name}.{number}", killer.story), marked(), killer:
            try:
                with cluster:
                    found = [token.id for token in cluster.generate("ROMEO:", **options)]
                if found != whole:
                    raise Failure("another text")
            except ZmoeError as error:
                killer.story += [str(error), "=an error that names the node"]
                if "rank" not in str(error) and "node" not in str(error):
                    raise


def run_served(
    draw: random.Random, rounds: int, results: Results, name: str, of_engine: bool
) -> None:
    """Rounds on one server with running streams, of which a worker or the engine is killed."""
    variant = Variant.drawn(draw)
    print(f"{name}: {variant}", flush=True)
    bodies = [
        {
            "messages": [{"role": "user", "content": "KING" * draw.choice((1, 10, 40))}],
            **{"temperature": 0.8, "seed": seed, "ignore_eos": True},
            **{"max_tokens": draw.choice((60, 150, 300)), "stream": True},
        }
        for seed in range(STREAMS)
    ]

    def begin(server: Server) -> list[Reader]:
        return [Reader(server, body) for body in bodies]

    def texts(readers: Sequence[Reader]) -> list[str]:
        return [reader.text() for reader in readers]

    with serving(*variant.flags()) as server:
        texts(begin(server))
        began = time.monotonic()
        whole = texts(begin(server))
        duration = time.monotonic() - began

        def victims() -> list[int]:
            if of_engine:
                return [pid for pid in [engine_of(server)] if pid is not None]
            return [pid for pid, line in server.processes().items() if "cli.node" in line]

        for number in range(rounds):
            when = [draw.uniform(0, duration)] if of_engine else delays(draw, duration)
            killer = Killer(draw, victims, when)
            with results.round(f"{name}.{number}", killer.story):
                # While there is no engine, new requests are refused.
                readers = begin(server) if of_engine else None
                with killer:
                    found = texts(readers or begin(server))
                different = [n for n, pair in enumerate(zip(found, whole)) if len({*pair}) > 1]
                if different:
                    raise Failure(f"other texts of streams {different}")
            if of_engine or draw.random() < 0.7:
                server.wait_for("ready")
    wait_until(lambda: not server.processes(), 10, "all processes ended")


KINDS: dict[str, Callable[[random.Random, int, Results, str], None]] = {
    "workers": run_workers,
    "starting": run_starting,
    "serve": lambda *given: run_served(*given, of_engine=False),
    "engine": lambda *given: run_served(*given, of_engine=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tests.chaos.kills", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="Kills (default: 100)")
    parser.add_argument("--seed", type=int, default=None, help="Seed of all that is drawn")
    parser.add_argument("--seconds", type=float, default=1e9, help="Begin no cluster after these")
    what = "workers of a run, workers while it starts, workers or the engine of a server"
    parser.add_argument("--kill", choices=KINDS, default="workers", help=what)
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    results, left, number, until = Results(), args.rounds, 0, time.monotonic() + args.seconds
    while left > 0 and time.monotonic() < until:
        rounds = min(left, ROUNDS_PER_CLUSTER)
        name = f"{args.kill} {seed}.{number}"
        try:
            KINDS[args.kill](random.Random(name), rounds, results, name)
        except Exception as error:
            results.failed = True
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
        left, number = left - rounds, number + 1
    return results.end()


if __name__ == "__main__":
    sys.exit(main())
