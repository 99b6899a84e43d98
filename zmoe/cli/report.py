"""The statistics and the JSON object of zmoe-run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from zmoe.cluster.cluster import Cluster
from zmoe.engine.generate import Generation
from zmoe.perf.units import in_bytes


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
