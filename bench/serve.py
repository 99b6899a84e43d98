"""Tokens per second and latency of zmoe-serve under load, beside llama.cpp's llama-server.

Every figure comes from a server of its own, started anew in each round; the engines take
turns in each. A row is the median over the rounds. The clients run on the same machine, and take
a part of its cores from every server alike. Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    BENCH,
    Absent,
    BenchError,
    environment,
    finish,
    list_of,
    main,
    one_of,
    parser,
    positive,
    short_name,
)
from engines import core_counts, gguf_file, layout, usable_cores
from serving import (
    Prompts,
    Server,
    ask,
    closed_loop,
    events,
    figures,
    jain,
    poisson,
    serving,
)

sys.path.insert(0, str(BENCH / "peers"))

from llamacpp_programs import PATHS, about, binaries, link
from process import PeerFailure
from whole import check_whole

from zmoe.config import DEFAULT_MODEL
from zmoe.errors import ZmoeError

MEASURES = ("closed", "poisson", "turn", "strangers", "soak")
STRANGERS = 500
RATES = ("tokens_per_second", "ttft_p95_ms")


@dataclass(frozen=True)
class Engine:
    """A server to measure: its command, given a port."""

    name: str
    nodes: int
    cores: int | None
    command: Callable[[int], Sequence[str]]
    env: tuple[tuple[str, str], ...]


def arguments() -> argparse.Namespace:
    made = parser((__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help="folder or name")
    add("--nodes", type=list_of(layout), default=[layout("1x2")], help="as in batch.py")
    add("--clients", type=list_of(positive), default=[1, 4, 8, 16, 32], help="of closed loops")
    add("--rates", type=list_of(float), default=[0.5], help="requests per second of poisson")
    add("--requests", type=positive, default=4, help="of each client, or of each rate times 8")
    add("-p", "--prompt-tokens", type=positive, default=128, help="random ones; default 128")
    add("-m", "--max-tokens", type=positive, default=64, help="of each answer; default 64")
    add("--long", type=positive, default=4000, help="tokens of the chat of turn; default 4000")
    add("--soak", type=positive, default=5000, help="requests of soak; default 5000")
    add("--runs", type=positive, default=3, help="rounds; default 3")
    add("--measure", type=list_of(one_of(MEASURES)), default=["closed"], help=",".join(MEASURES))
    add("--gguf", type=Path, help="the model for llama-server (default: MODEL.gguf)")
    add("--no-peer", action="store_true", help="measure zmoe alone")
    return made.parse_args()


# ---- the servers -------------------------------------------------------------------------


def on_cores(cores: int | None) -> list[str]:
    """What starts a command on the first of our cores."""
    available = usable_cores()
    if cores is None or available is None:
        return []
    return ["taskset", "-c", ",".join(map(str, available[:cores]))]


def zmoe(options: argparse.Namespace) -> list[Engine]:
    """Ours, one engine per layout."""

    def command(nodes: int, cores: int | None) -> Callable[[int], Sequence[str]]:
        words = [*on_cores(cores), sys.executable, "-m", "zmoe.cli.serve", "--model"]
        words += [options.model, "--nodes", str(nodes)]
        return lambda port: [*words, "--port", str(port)]

    return [
        Engine("zmoe", each.nodes, each.cores, command(each.nodes, each.cores), ())
        for each in options.nodes
    ]


@contextlib.contextmanager
def llama(options: argparse.Namespace) -> Iterator[list[Engine]]:
    """llama-server on as many cores as our layouts take. Raises Absent."""
    if options.no_peer:
        raise Absent("--no-peer")
    model = gguf_file(options)
    try:
        folder = binaries("llama-server")
    except PeerFailure as error:
        raise Absent(str(error)) from None
    program = folder / "llama-server"
    most = max(options.clients)
    context = most * (options.prompt_tokens + options.max_tokens)
    context = max(context, 2 * options.long + 4 * options.max_tokens)

    def command(cores: int | None) -> Callable[[int], Sequence[str]]:
        threads = str(cores or os.cpu_count() or 1)
        words = [*on_cores(cores), str(program), "-m", model, "-ngl", "0", "-t", threads]
        words += ["-tb", threads, "-np", str(most), "-kvu", "-c", str(context), "--no-webui"]
        return lambda port: [*words, "--port", str(port), "--log-disable"]

    with tempfile.TemporaryDirectory() as libraries:
        link(folder, Path(libraries))
        env = tuple((path, libraries) for path in PATHS)
        yield [Engine("llama-server", 1, n, command(n), env) for n in core_counts(options)]


# ---- what is measured --------------------------------------------------------------------

Record = tuple[dict[str, Any], dict[str, float]]  # a case, and its figures


def closed(server: Server, options: argparse.Namespace) -> Iterator[Record]:
    prompts = Prompts(options.vocabulary, options.prompt_tokens)
    for clients in options.clients:
        answers = asyncio.run(
            closed_loop(server.port, prompts, clients, options.requests, options.max_tokens)
        )
        rates = [sum(a.tokens for a in own) / (own[-1].events[-1] - own[0].sent) for own in answers]
        found = figures([answer for own in answers for answer in own])
        memory = server.memory("VmHWM")
        yield {"clients": clients}, {**found, "jain": jain(rates), "peak_memory": memory}


def at_random(server: Server, options: argparse.Namespace) -> Iterator[Record]:
    prompts = Prompts(options.vocabulary, options.prompt_tokens)
    for rate in options.rates:
        count = 8 * options.requests
        answers = asyncio.run(poisson(server.port, prompts, rate, count, options.max_tokens))
        yield {"per_second": rate}, figures(answers)


def turn(server: Server, options: argparse.Namespace) -> Iterator[Record]:
    """A chat's second turn: all of the first one, and a little more."""
    prompts = Prompts(options.vocabulary, options.long)
    first, more = prompts.next(), Prompts(options.vocabulary, 32).next()

    async def both() -> tuple[float, float]:
        one = await ask(server.port, first, 8, 1)
        two = await ask(server.port, [*first, *more], 8, 2)
        return one.first, two.first

    one, two = asyncio.run(both())
    yield {"chat_tokens": options.long}, {"first_s": one, "second_s": two, "share": two / one}


def strangers(server: Server, options: argparse.Namespace) -> Iterator[Record]:
    """Working clients alone, and beside connections that send nothing, or half, or do not read."""
    prompts = Prompts(options.vocabulary, options.prompt_tokens)

    async def rate() -> float:
        loop = closed_loop(server.port, prompts, 8, options.requests, options.max_tokens)
        answers = [answer for own in await loop for answer in own]
        return figures(answers)["tokens_per_second"]

    async def both() -> tuple[float, float]:
        alone = await rate()
        held = []
        for number in range(STRANGERS):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            sent = (b"", b"POST /v1/completions HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\n\r\n" * 50)
            writer.write(sent[number % 3])
            held.append(writer)
        beside = await rate()
        for writer in held:
            writer.close()
        return alone, beside

    alone, beside = asyncio.run(both())
    yield {"connections": STRANGERS}, {"alone": alone, "beside": beside, "share": beside / alone}


def soak(server: Server, options: argparse.Namespace) -> Iterator[Record]:
    """Many requests, of which some are cancelled or dropped: memory, and what was lost."""
    draw, at = random.Random(2), iter(range(options.soak))
    samples: list[float] = []
    counts: dict[str, int] = defaultdict(int)

    async def one(seed: int) -> None:
        prompt = [draw.randrange(options.vocabulary) for _ in range(draw.randrange(1, 300))]
        leave = draw.randrange(1, 20) if draw.random() < 0.3 else None
        tokens, seen = draw.randrange(1, 100), 0
        body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
        body["stream_options"] = {"include_usage": True}
        answer = events(server.port, body)
        async for event in answer:
            seen += 1
            if usage := event.get("usage"):
                counts["lost"] += usage["completion_tokens"] != tokens
                counts["ended"] += 1
            if seen == leave:
                counts["left"] += 1
                break
        await answer.aclose()  # type: ignore[attr-defined]

    async def client() -> None:
        for seed in at:
            await one(seed)
            if seed % max(1, options.soak // 200) == 0:
                samples.append(server.memory("VmRSS") / 2**20)

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(32)))

    asyncio.run(all_clients())
    quarter = len(samples) // 4
    second = statistics.median(samples[quarter : 2 * quarter])
    last = statistics.median(samples[-quarter:])
    found = {"second_quarter_mib": second, "last_quarter_mib": last, "growth": last / second - 1}
    yield {"requests": options.soak}, {**found, **{k: float(v) for k, v in counts.items()}}


WORK = {"closed": closed, "poisson": at_random, "turn": turn, "strangers": strangers, "soak": soak}


# ---- the report --------------------------------------------------------------------------


def check(server: Server) -> None:
    """Raise BenchError where figures would be those of a part of the nodes."""
    try:
        check_whole(json.loads(server.get("/v1/cluster")))
    except ZmoeError as error:
        raise BenchError(str(error)) from None


def measure(
    options: argparse.Namespace, engines: Sequence[Engine]
) -> dict[Any, dict[str, list[float]]]:
    """The figures of every case, a value per round; the engines take turns."""
    found: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turns in range(options.runs):
        for name in options.measure:
            for engine in engines:
                print(f"run {turns + 1}, {name}, {engine.name}", file=sys.stderr)
                with serving(engine.command, dict(engine.env)) as server:
                    asyncio.run(ask(server.port, [1] * 16, 4, 0))  # warm
                    for case, values in WORK[name](server, options):
                        if engine.name == "zmoe":
                            check(server)
                        key = (engine, name, tuple(case.items()))
                        for figure, value in values.items():
                            found[key][figure].append(value)
    return found


def rows_of(model: str, found: Mapping[Any, dict[str, list[float]]]) -> list[dict[str, Any]]:
    rows = []
    for (engine, name, case), values in found.items():
        row = {"model": model, "measure": name, "engine": engine.name, "nodes": engine.nodes}
        row |= {"cores": engine.cores, **dict(case)}
        for figure, runs in values.items():
            row[figure] = round(statistics.median(runs), 4)
            if figure in RATES:
                row[f"{figure}_runs"] = [round(value, 2) for value in runs]
        rows.append(row)
    for row in rows:  # as multiples of the peer's on as many cores
        same = ("measure", "cores", "clients", "per_second", "chat_tokens", "connections")
        for other in rows:
            is_peer = other["engine"] == "llama-server" and row["engine"] == "zmoe"
            if is_peer and all(row.get(k) == other.get(k) for k in same):
                for figure in RATES:
                    if figure in row:
                        row[f"{figure}_ratio"] = round(row[figure] / other[figure], 3)
    return rows


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name in MEASURES:
        rows = [row for row in report["results"] if row["measure"] == name]
        if not rows:
            continue
        hidden = ("model", "measure")
        columns = [
            column
            for column in dict.fromkeys(key for row in rows for key in row)
            if column not in hidden and not column.endswith("_runs")
        ]
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), title=name)
        for column in columns:
            table.add_column(column, justify="left" if column == "engine" else "right")
        for row in rows:
            table.add_row(*(str(row.get(column, "-")) for column in columns))
        console.print(table)
    for name, reason in report["absent"].items():
        console.print(f"absent: {name}: {reason}", highlight=False)


def vocabulary(model: str) -> int:
    """Below which the tokens of our prompts are."""
    from zmoe.checkpoint.hub import resolve_model
    from zmoe.engine.prompt import open_tokenizer

    return int(len(open_tokenizer(Path(resolve_model(model)))) * 0.9)  # the last ones are special


def benchmark() -> int:
    options = arguments()
    options.vocabulary = vocabulary(options.model)
    block, absent = environment(), dict[str, str]()
    with contextlib.ExitStack() as stack:
        engines = zmoe(options)
        try:
            engines += stack.enter_context(llama(options))
            block["builds"] = {"llama-server": about(binaries())}
        except Absent as reason:
            absent["llama-server"] = str(reason)
        try:
            found = measure(options, engines)
        except OSError as error:
            raise BenchError(f"a server went away: {error}") from None
    model = short_name(options.model)
    report = {"environment": block, "results": rows_of(model, found), "absent": absent}
    finish(options, report, show, of=model)
    return 0


if __name__ == "__main__":
    main(benchmark)
