"""zmoe with many sequences at once, through the library, on token ids. Prints one JSON object.

Its `records` each tell the `case` that was measured and the `figures`.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from process import PeerFailure, batch_parser, checked, count, counts, main, tokens
from whole import whole_cluster
from zmoe_cluster import add_settings, engine_config, feed

from zmoe import __version__
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Batching
from zmoe.engine.generate import Generation
from zmoe.engine.stream import Timings
from zmoe.errors import ZmoeError

APART_MS = 60_000  # for a step: prompts are read in full chunks although others generate
WITHOUT_END = 1 << 20  # tokens of a sequence that is closed when it is no longer needed
RUNNING = 4  # sequences that generate beside a long prompt
TEXT = 512  # random tokens after which a text begins anew
PHRASE = 24  # tokens of the text that repeats itself
TAIL = 32  # tokens in which prompts with a common beginning differ
AT_ONCE = 48  # sequences of the soak: more than run, so that some wait
SOAK_PROMPT, SOAK_TOKENS = 200, 64  # the most of each
CANCELLED = 0.25
SAMPLES = 200  # of the memory
Record = dict[str, dict[str, Any]]


class Prompts:
    """Random token ids that the tokenizer knows, never the same ones twice."""

    def __init__(self, cluster: Cluster) -> None:
        self._known = max(cluster.tokenizer.get_vocab().values()) + 1
        self._seed = 0

    def take(self, length: int) -> list[int]:
        self._seed += 1
        return tokens(self._seed, length, self._known)


@contextmanager
def opened(options: Any, **batching: Any) -> Iterator[tuple[Cluster, Prompts]]:
    """A cluster on which as many sequences as are wanted run at once, after a first one."""
    engine = engine_config(options)
    engine = replace(engine, parallel=max(engine.parallel, *options.sequences))
    spec = ClusterSpec(nodes=options.nodes, engine=engine, batching=Batching(**batching))
    with whole_cluster(options.model, spec) as cluster:
        assert cluster._node is not None
        if not cluster._node.engine.can_batch:
            raise PeerFailure(f"{cluster.info.model_type} runs one sequence at a time")
        prompts = Prompts(cluster)
        finish(start(cluster, prompts.take(options.prompt_tokens), prompts.take(2), 2))
        yield cluster, prompts


def start(
    cluster: Cluster, prompt: Sequence[int], text: Sequence[int], most: int, **options: Any
) -> Generation:
    """A sequence that goes on with `text` over and over, as feed() has it."""
    generation = cluster.submit(
        prompt, max_tokens=most, ignore_eos=True, temp=1.0, seed=1, **options
    )
    feed(generation, text)
    return generation


def endless(cluster: Cluster, prompts: Prompts, wanted: int, length: int) -> list[Generation]:
    """So many sequences of prompts of `length` tokens, to be closed."""
    return [
        start(cluster, prompts.take(length), prompts.take(TEXT), WITHOUT_END) for _ in range(wanted)
    ]


def finish(generation: Generation) -> Generation:
    for _ in generation:
        pass
    return generation


# ---- throughput --------------------------------------------------------------------


def throughput(options: Any) -> list[Record]:
    """Tokens/s of prefill and of decoding, for each number of sequences."""
    with opened(options, speculate="off", step_ms=APART_MS) as (cluster, prompts):
        return [
            record
            for wanted in options.sequences
            for record in together(cluster, prompts, wanted, options)
        ]


def together(cluster: Cluster, prompts: Prompts, wanted: int, options: Any) -> list[Record]:
    """Prefill lasts until every sequence has its first token; from then on all of them decode."""
    length, made = options.prompt_tokens, []
    begun = time.perf_counter()
    running = endless(cluster, prompts, wanted, length)
    for generation in running:
        next(generation)
    prefill = time.perf_counter() - begun
    with step_parts(cluster) as parts:
        before, begun = decoded(running), time.perf_counter()
        for step in range(1, 1 + max(options.generated)):
            next(running[-1])  # of which no token is ready: it runs a step, for all of them
            if step not in options.generated:
                continue
            seconds = time.perf_counter() - begun
            figures = {
                "prefill_tps": wanted * length / prefill,
                "decode_tps": (decoded(running) - before) / seconds,
            }
            for name, each in parts.items():
                figures[f"{name.strip('_')}_us"] = 1e6 * statistics.median(each)
            case = {"sequences": wanted, "prompt_tokens": length, "generation_tokens": step}
            made.append({"case": case, "figures": figures})
    for generation in running:
        generation.close()
    return made


def decoded(generations: Sequence[Generation]) -> int:
    return sum(generation.timings.decode_tokens for generation in generations)


@contextmanager
def step_parts(cluster: Cluster) -> Iterator[dict[str, list[float]]]:
    """Seconds of each step's plan, of taking its results in, and of its sampling."""
    seconds: dict[str, list[float]] = defaultdict(list)
    batcher: Any = cluster._batcher
    parts = ((batcher.scheduler, "plan"), (batcher.scheduler, "advance"), (batcher, "_sample"))

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments)
            seconds[name].append(time.perf_counter() - begun)
            return result

        return call

    for owner, name in parts:
        setattr(owner, name, timed(name, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name in parts:
            delattr(owner, name)


# ---- what sequences do to each other -------------------------------------------------------


def prefix(options: Any) -> list[Record]:
    """Time to first token of two prompts with a common beginning, one after the other."""
    waits = []
    with opened(options, speculate="off") as (cluster, prompts):
        common = prompts.take(options.long)
        for _ in range(2):
            begun = time.perf_counter()
            generation = finish(start(cluster, common + prompts.take(TAIL), [0], 1))
            waits.append(time.perf_counter() - begun)
    figures = {
        "first_s": waits[0],
        "second_s": waits[1],
        "second_share": waits[1] / waits[0],
        "cached_tokens": generation.timings.cached_tokens,
    }
    return [{"case": {"common_tokens": options.long}, "figures": figures}]


def gap(options: Any) -> list[Record]:
    """The longest time between tokens of running sequences while a long prompt is prefilled."""
    return [gap_of(options, step_ms) for step_ms in options.step_ms]


def gap_of(options: Any, step_ms: int) -> Record:
    with opened(options, speculate="off", step_ms=step_ms) as (cluster, prompts):
        running = endless(cluster, prompts, RUNNING, options.prompt_tokens)

        def step() -> float:
            """Wait for one token of each; returns the seconds."""
            begun = time.perf_counter()
            for generation in running:
                next(generation)
            return time.perf_counter() - begun

        alone = [step() for _ in range(16)][1:]
        done = [0]
        prompt, begun = prompts.take(options.long), time.perf_counter()
        long = start(cluster, prompt, [0], 1, on_prefill=lambda tokens, total: done.append(tokens))
        beside = []
        while done[-1] < options.long:
            beside.append(step())
        prefill = time.perf_counter() - begun
        for generation in [long, *running]:
            generation.close()
    figures = {
        "alone_ms": 1e3 * statistics.median(alone),
        "beside_ms": 1e3 * statistics.median(beside),
        "longest_ms": 1e3 * max(beside),
        "prefill_tps": options.long / prefill,
    }
    case = {"running": RUNNING, "long_tokens": options.long, "step_ms": step_ms}
    return {"case": case, "figures": figures}


def speculation(options: Any) -> list[Record]:
    """Tokens/s of one sequence with drafts and without: of a text that is one phrase over and
    over, and of one that never repeats itself.
    """
    most, length = max(options.generated), options.prompt_tokens
    runs: dict[str, list[Timings]] = defaultdict(list)
    for speculate in ("off", "auto"):
        with opened(options, speculate=speculate) as (cluster, prompts):
            phrase = prompts.take(PHRASE)
            lap = phrase * (1 + length // PHRASE)
            cut = length % PHRASE
            texts = {
                "repeating": (lap[:length], phrase[cut:] + phrase[:cut]),
                "random": (prompts.take(length), prompts.take(most)),
            }
            for name, (prompt, text) in texts.items():
                runs[name].append(finish(start(cluster, prompt, text, most)).timings)
    made = []
    for text, (off, auto) in runs.items():
        figures = {
            "off_tps": off.generation_tps,
            "auto_tps": auto.generation_tps,
            "gain": auto.generation_tps / off.generation_tps,
            "drafted": auto.drafted,
            "accepted": auto.accepted,
        }
        made.append({"case": {"text": text, "generation_tokens": most}, "figures": figures})
    return made


# ---- soak ----------------------------------------------------------------------------


def soak(options: Any) -> list[Record]:
    """Many sequences of random lengths, some of which are cancelled: what memory and blocks do."""
    draw, memory, begun = random.Random(1), [], 0
    active: list[tuple[Generation, int]] = []  # with the number of tokens to be taken
    with opened(options) as (cluster, prompts):
        scheduler = cluster._batcher.scheduler
        blocks = scheduler.available
        while begun < options.soak or active:
            while begun < options.soak and len(active) < AT_ONCE:
                most = draw.randint(1, SOAK_TOKENS)
                prompt = prompts.take(draw.randint(1, SOAK_PROMPT))
                generation = start(cluster, prompt, prompts.take(most), most)
                wanted = draw.randrange(most) if draw.random() < CANCELLED else most
                active.append((generation, wanted))
                if begun % max(1, options.soak // SAMPLES) == 0:
                    memory.append(resident_bytes(cluster))
                begun += 1
            active = [each for each in active if goes_on(*each)]
        finish(start(cluster, prompts.take(1), [0], 1))  # by then those that were closed have ended
        lost = blocks - scheduler.available
    quarter = len(memory) // 4
    second, last = memory[quarter : 2 * quarter], memory[3 * quarter :]
    figures = {
        "second_quarter_mib": statistics.median(second) / 2**20,
        "last_quarter_mib": statistics.median(last) / 2**20,
        "growth": statistics.median(last) / statistics.median(second) - 1,
        "blocks": blocks,
        "blocks_lost": lost,
    }
    return [{"case": {"soak": options.soak}, "figures": figures}]


def goes_on(generation: Generation, wanted: int) -> bool:
    """Take a token unless enough were taken; whether the sequence is still wanted."""
    if len(generation.tokens) < wanted and next(generation, None) is not None:
        return True
    generation.close()
    return False


def resident_bytes(cluster: Cluster) -> int:
    """Resident memory of all nodes."""
    pids = ",".join(map(str, [os.getpid(), *cluster.worker_pids()]))
    listed = subprocess.run(
        ["ps", "-o", "rss=", "-p", pids], capture_output=True, text=True, check=True
    )
    return 1024 * sum(map(int, listed.stdout.split()))


MEASURES = {each.__name__: each for each in (throughput, prefix, gap, speculation, soak)}


def program() -> dict[str, Any]:
    made = batch_parser((__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--nodes", type=int, default=1, help="default 1")
    add("--measure", choices=MEASURES, default="throughput", help="default throughput")
    add("--long", type=count, default=4000, help="tokens of a long prompt; default 4000")
    add("--step-ms", type=counts, default=[250], help="zmoe-run's, for gap; default 250")
    add("--soak", type=count, default=2000, help="sequences; default 2000")
    add_settings(made)
    options = checked(made)
    if options.about:
        return {"build": f"zmoe {__version__}"}
    try:
        return {"records": MEASURES[options.measure](options)}
    except ZmoeError as error:
        raise PeerFailure(str(error), error.exit_code) from None


if __name__ == "__main__":
    main(program)
