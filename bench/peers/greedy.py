"""Greedy decoding on MLX, by mlx-lm or on nodes of zmoe. Prints one JSON object."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from process import BAD_INPUT, PeerFailure, checked, main, parser, tokens
from whole import whole_cluster

from zmoe.cluster.spec import ClusterSpec, PlacementRequest
from zmoe.config import Batching, EngineConfig
from zmoe.errors import ZmoeError

SEED = 1
KNOWN = 1000  # token ids below this are drawn for the prompt


def measure(begin: Callable[[int], Iterator[Any]], options: Any) -> dict[str, Any]:
    """Milliseconds a token: the median over the repetitions, after one that isn't counted.

    `begin(n)` generates n tokens; the first comes with the prompt.
    """
    found = []
    for _ in range(options.repetitions + (not options.no_warm_up)):
        stream = begin(options.tokens + 1)
        next(stream)
        begun = time.perf_counter()
        for _ in stream:
            pass
        found.append(1e3 * (time.perf_counter() - begun) / options.tokens)
    counted = found[-options.repetitions :]
    return {"ms": statistics.median(counted), "runs": [round(each, 3) for each in counted]}


def with_mlx_lm(options: Any) -> dict[str, Any]:
    """mlx-lm's own loop, which runs one step ahead."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(Path(options.model))
    except (OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())
        raise PeerFailure(f"cannot load {options.model}: {line}", BAD_INPUT) from None
    prompt = mx.array(tokens(SEED, options.prompt_tokens, KNOWN))
    return measure(lambda n: generate_step(prompt, model, max_tokens=n), options)


def with_zmoe(options: Any) -> dict[str, Any]:
    """One sequence on `--nodes` of zmoe, without drafts."""
    spec = ClusterSpec(
        nodes=options.nodes,
        engine=EngineConfig(compute="mlx", backend=options.backend),
        placement=PlacementRequest(options.placement),
        batching=Batching(speculate="off"),
    )
    prompt = tokens(SEED, options.prompt_tokens, KNOWN)
    begun: list[Any] = []
    with whole_cluster(options.model, spec) as cluster:

        def begin(count: int) -> Iterator[Any]:
            begun.append(cluster.submit(prompt, max_tokens=count, ignore_eos=True))
            return iter(begun[-1])

        found = measure(begin, options)
    spent = [run.timings.breakdown_ms()["exchange_ms"] for run in begun[-options.repetitions :]]
    return found | {"exchange_ms": statistics.median(spent), "layers": len(cluster.info.moe_layers)}


def of_slice(options: Any) -> dict[str, Any]:
    """The graph of a node that is one of `--slice-of`, but for its sums, which are left out: what
    it computes, one step ahead as in mlx-lm's loop.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from zmoe.exchange.groups import OneGroup
    from zmoe.exchange.local import SingleNode
    from zmoe.loading import Skeleton, describe, load_shard
    from zmoe.moe.graph import Form, Graph
    from zmoe.obs import Spans
    from zmoe.placement.build import place_slices

    if mx.default_device() == mx.Device(mx.cpu) and shutil.which("g++") is None:
        mx.disable_compile()
    info = describe(Skeleton(Path(options.model)), on_mlx=True)
    nodes, layers = options.slice_of, len(info.moe_layers)
    cut = place_slices(info.shape, [1] * nodes, [info.experts * layers] * nodes)
    alone = OneGroup(mx.distributed.init())
    graph = Graph(alone, layers, info.vocabulary, getattr(mx, info.dtype))
    shard = load_shard(info, cut, SingleNode(), spans=Spans(), form=Form(graph))
    prompt = mx.array([tokens(SEED, options.prompt_tokens, KNOWN)])

    def begin(count: int) -> Iterator[Any]:
        cache = make_prompt_cache(shard.model)

        def step(ids: mx.array) -> list[mx.array]:
            graph.begin(0, 0, 1)
            picked, told, _ = graph.tell(shard.model(ids, cache=cache)[:, -1].argmax(axis=-1))
            mx.async_eval(picked, told)
            return [picked, told]

        ahead = step(prompt)
        for _ in range(count):
            ahead, done = step(ahead[0][:, None]), ahead
            mx.eval(done)
            yield done[0].item()

    return measure(begin, options)


def program() -> dict[str, Any]:
    made = parser((__doc__ or "").splitlines()[0], 16, 32, 3)
    made.add_argument("--slice-of", type=int, help="of zmoe: the graph of one of these nodes")
    made.add_argument("--nodes", type=int, default=0, help="of zmoe; default 0: mlx-lm")
    made.add_argument("--backend", default="auto", help="zmoe-run's")
    made.add_argument("--placement", default="auto", help="zmoe-run's")
    options = checked(made)
    try:
        if options.slice_of is not None:
            return of_slice(options)
        return with_zmoe(options) if options.nodes else with_mlx_lm(options)
    except ZmoeError as error:
        raise PeerFailure(str(error), error.exit_code) from None


if __name__ == "__main__":
    main(program)
