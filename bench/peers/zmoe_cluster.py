"""zmoe's own tokens/s through the library, on token ids. Prints one JSON object.

The nodes share out the cores that this process may run on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from process import PeerFailure, checked, count, main, parser, tokens
from recording import Recording
from whole import whole_cluster

from zmoe import __version__
from zmoe.cluster.spec import ClusterSpec, PlacementRequest
from zmoe.config import EngineConfig, Sampling
from zmoe.engine.generate import Generation
from zmoe.engine.sampler import Pick
from zmoe.engine.stream import Timings
from zmoe.errors import ZmoeError

SEED = 1
SETTINGS = ("compute", "activations", "wire_dtype")
CLUSTER_SETTINGS = (*SETTINGS, "schedule", "policy", "placement")


def add_settings(made: argparse.ArgumentParser, names: Sequence[str] = SETTINGS) -> None:
    """The flags that engine_config and cluster_spec read."""
    for name in names:
        made.add_argument(f"--{name.replace('_', '-')}", help="zmoe-run's; default: its default")


def engine_config(options: argparse.Namespace, names: Sequence[str] = SETTINGS) -> EngineConfig:
    """The settings that were given."""
    known = {field.name for field in fields(EngineConfig)}
    values = {name: getattr(options, name) for name in names if name in known}
    return EngineConfig(**{name: value for name, value in values.items() if value is not None})


def cluster_spec(options: argparse.Namespace) -> ClusterSpec:
    """The settings that were given."""
    engine = engine_config(options, CLUSTER_SETTINGS)
    placement = PlacementRequest(options.placement or "auto")
    return ClusterSpec(nodes=options.nodes, engine=engine, placement=placement)


def spans_ms(timings: Timings) -> dict[str, float]:
    """Mean milliseconds per decoded token of every span that the engine recorded."""
    steps = max(1, timings.decode_steps)
    return {name: 1e3 * seconds / steps for name, seconds in timings.spans.items()}


def median_of(tables: list[dict[str, float]]) -> dict[str, float]:
    """Key by key; one that is missing counts as 0."""
    names = {name: None for table in tables for name in table}
    return {name: statistics.median(table.get(name, 0.0) for table in tables) for name in names}


def feed(generation: Generation, ids: Sequence[int]) -> None:
    """Go on with `ids`, over and over, whatever was picked; picking is done all the same.

    A model of random weights soon repeats one token, and so one choice of
    experts: not what a real text asks of caches, nor of the nodes' balance.
    """
    stream = generation._stream
    pick = stream.sampler.pick

    def picked(logits: Any, position: int, mask: Any = None) -> Pick:
        pick(logits, position, mask)
        return Pick(ids[(position - len(stream.prompt)) % len(ids)])

    setattr(stream.sampler, pick.__name__, picked)


def generate(cluster: Any, options: argparse.Namespace, turn: int) -> Generation:
    """One generation, to its end; each `turn` has a prompt of its own, since prompts are cached."""
    sampling = Sampling(max_tokens=options.tokens, ignore_eos=True)
    if options.prompt is not None:
        generation: Generation = cluster.generate(options.prompt, sampling)
    else:
        # The tokenizer may know fewer ids than the model has.
        known = max(cluster.tokenizer.get_vocab().values()) + 1
        before = tokens(SEED + 1, options.context, known)
        prompt = before + tokens(SEED + 10 * turn, options.prompt_tokens, known)
        generation = cluster.generate(prompt, sampling)
        feed(generation, tokens(SEED + 2, options.tokens, known))
    for _ in generation:
        pass
    return generation


def measure(cluster: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repetitions, after one that isn't counted; names are zmoe-run's.

    `cluster` is a Cluster, or looks like one.
    """
    if options.context or not options.no_warm_up:  # the context is cached then
        generate(cluster, options, options.repetitions)
    runs = [generate(cluster, options, turn) for turn in range(options.repetitions)]
    timings = [run.timings for run in runs]
    return {
        "prompt_tokens": timings[0].prompt_tokens - timings[0].cached_tokens,
        "generation_tokens": len(runs[0].tokens),
        "tokens": runs[0].tokens,
        "prompt_tps": statistics.median(each.prompt_tps for each in timings),
        "generation_tps": statistics.median(each.generation_tps for each in timings),
        "prompt_runs": [round(each.prompt_tps, 2) for each in timings],
        "generation_runs": [round(each.generation_tps, 2) for each in timings],
        "breakdown": median_of([each.breakdown_ms() for each in timings]),
        "spans_ms": median_of([spans_ms(each) for each in timings]),
        "peak_memory": cluster.peak_memory(),
        "load_seconds": cluster.load_seconds,
    }


def flags(prompt_tokens: int, generated: int, repetitions: int) -> Any:
    """The parser of a program that measures with measure()."""
    made = parser((__doc__ or "").splitlines()[0], prompt_tokens, generated, repetitions)
    made.add_argument("--nodes", type=int, default=1, help="default 1")
    made.add_argument("--prompt", help="text, continued greedily, in place of random tokens")
    made.set_defaults(context=0)
    return made


def program() -> dict[str, Any]:
    made = flags(128, 64, 3)
    made.add_argument("--context", type=count, default=0, help="tokens before the prompt, cached")
    made.add_argument("--record", action="store_true", help="also tell what each layer took")
    add_settings(made, CLUSTER_SETTINGS)
    options = checked(made)
    if options.record and options.nodes < 2:
        made.error("--record: a single node exchanges nothing")
    try:
        spec = cluster_spec(options)
    except ZmoeError as error:
        raise PeerFailure(str(error), error.exit_code) from None
    if options.about:
        return {"build": f"zmoe {__version__}"}
    try:
        with ExitStack() as stack:
            recording = stack.enter_context(Recording()) if options.record else None
            with whole_cluster(options.model, spec) as cluster:
                measured = measure(cluster, options)
            if recording is not None:
                central = getattr(spec.engine, "schedule", "") == "centralized"
                layers = len(cluster.info.moe_layers)
                steps = (options.tokens - 1) * layers
                measured["layer"] = recording.summary(options.nodes, steps, 2 if central else 1)
            return measured
    except ZmoeError as error:
        raise PeerFailure(str(error), error.exit_code) from None


if __name__ == "__main__":
    main(program)
