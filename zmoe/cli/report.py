"""What zmoe-run tells of a run beside the text: --explain, --json and --stats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from zmoe.cluster.cluster import Cluster
from zmoe.engine.generate import Generation
from zmoe.perf.units import in_bytes
from zmoe.placement.choose import Alternative, Choice
from zmoe.placement.types import Placement


def explanation(choice: Choice, attention: str = "replicated") -> str:
    """The choice and its alternatives in a few lines of text."""
    return "\n".join(_lines(choice, attention))


def listeners(cluster: Cluster) -> str:
    """Say at which ports each node listens for the others."""
    lines = [
        f"  node {rank}: {host}, ports {', '.join(map(str, ports))}"
        for rank, (host, ports) in enumerate(cluster.listeners)
    ]
    how = "encrypted" if cluster.spec.encrypted else "not encrypted"
    return "\n".join([f"links: {how}" if lines else "links: none, there is one node", *lines])


def _lines(choice: Choice, attention: str) -> Iterator[str]:
    yield f"placement: {choice.label} ({choice.why})"
    total = sum(choice.resident)
    for node, resident in enumerate(choice.resident):
        yield (
            f"  node {node}: {_owned(choice.placement, node)}; {in_bytes(resident)} of experts "
            f"({resident / total:.0%}), room for {in_bytes(choice.capacity[node])}; "
            f"reads {choice.speeds[node]} GB/s"
        )
    if choice.evaluated is not None:
        yield from _forms(choice, attention)
    yield f"  predicted by the cost model, {choice.assumed}:"
    width = max(len(each.name) for each in choice.considered)
    for each in choice.considered:
        yield f"  {each.name:{width}}  {_outcome(each)}"


def _forms(choice: Choice, attention: str) -> Iterator[str]:
    """How MLX computes the layers, and where the attention heads are."""
    nodes = choice.placement.nodes
    if choice.evaluated:
        yield f"  layers: evaluated one by one, as {choice.evaluated}"
    elif nodes == 1:
        yield "  layers: in MLX's graph, as mlx-lm's model, which one node computes as it is"
    else:
        yield "  layers: in MLX's graph, as every node has a slice of every expert"
    if attention == "sharded":
        yield f"  attention: 1/{nodes} of the heads on each node, one more exchange per layer"
    elif nodes > 1 and not choice.evaluated:
        yield "  attention: all heads on each node, unless --attention sharded is given"


def _owned(placement: Placement, node: int) -> str:
    """How many experts `node` owns per layer, which ones, which part; how many others own too."""
    layers = [layer[node] for layer in placement.owned]
    counts = sorted({len(ids) for ids in layers})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    where = "each layer" if len(set(layers)) == 1 else "the first layer"
    text = f"{many} experts per layer ({where}: {_ranges(layers[0])})"
    parts = placement.slices or ((0, 0),) * placement.nodes
    copies = sum(
        any(
            expert in ids
            for other, ids in enumerate(layer)
            if other != node and parts[other] == parts[node]
        )
        for layer in placement.owned
        for expert in layer[node]
    )
    if copies:
        text += f", {copies / len(layers):.3g} of them also elsewhere"
    if placement.slices:
        text += f", [{parts[node][0]}, {parts[node][1]}) of their intermediate size"
    return text


def _ranges(ids: Sequence[int]) -> str:
    """Write 0, 1, 2, 5 as "0-2, 5"."""
    found: list[list[int]] = []
    for number in ids:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in found) or "none"


def _outcome(each: Alternative) -> str:
    if each.prediction is None:
        return each.remark
    return (
        f"{1e3 * each.prediction.decode.total:.2f} ms per token, "
        f"the busiest node computes {each.prediction.busiest.count:.3g} experts per layer"
    )


def summarize(cluster: Cluster, generation: Generation) -> dict[str, Any]:
    """Return the object that `--json` prints: memory in bytes per node, `breakdown` in ms."""
    timings = generation.timings
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "prompt_tokens": timings.prompt_tokens,
        "generation_tokens": len(generation.tokens),
        "prompt_tps": timings.prompt_tps,
        "generation_tps": timings.generation_tps,
        "finish_reason": generation.finish_reason,
        "nodes": cluster.spec.nodes,
        "breakdown": timings.breakdown_ms(),
        "peak_memory": cluster.peak_memory(),
        "load_seconds": cluster.load_seconds,
    }


def print_stats(cluster: Cluster, generation: Generation, summary: dict[str, Any]) -> None:
    """Print `summary` and further times and sizes as a table on standard error."""
    parts: dict[str, float] = summary["breakdown"]
    timings = generation.timings
    first_token, prefill = timings.first_token, timings.prefill
    overhead = timings.overhead_us(cluster.info.layers)
    locked, buffers = cluster.locked_buffers()
    table = Table(show_header=False)
    table.add_row("load", f"{summary['load_seconds']:.2f} s")
    table.add_row("time to first token", f"{1e3 * first_token:.1f} ms")
    table.add_row("  prefill", f"{1e3 * prefill:.1f} ms")
    table.add_row("  sampling", f"{1e3 * (first_token - prefill):.1f} ms")
    table.add_row("prompt tokens in the cache", f"{timings.cached_tokens}")
    table.add_row("prefill", f"{summary['prompt_tps']:.1f} tokens/s")
    table.add_row("decode", f"{summary['generation_tps']:.1f} tokens/s")
    table.add_row("milliseconds per token", f"{sum(parts.values()):.2f}")
    for name in ("experts", "exchange", "other"):
        table.add_row(f"  {name}", f"{parts[name + '_ms']:.2f}")
    if overhead is not None:
        table.add_row("outside matmuls and exchange", f"{overhead:.0f} us per layer")
    for rank, memory in enumerate(summary["peak_memory"]):
        table.add_row(f"peak memory, node {rank}", in_bytes(memory))
    if generation.seed is not None:
        table.add_row("seed", str(generation.seed))
    if buffers:
        table.add_row("buffers locked", f"{in_bytes(locked)} of {in_bytes(buffers)}")
    Console(stderr=True).print(table)
