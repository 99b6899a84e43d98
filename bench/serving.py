"""Servers that serve.py measures, and clients that load them."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import BenchError, Children

READY_S = 600.0
SILENT_S = 600.0  # that a server may take for the next event
HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server, and the processes that it is made of."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self._pid = port, pid

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=60) as answer:
            return bytes(answer.read())

    def memory(self, name: str) -> int:
        """Bytes of all of its processes: "VmRSS" now, or "VmHWM" at most."""
        total = 0
        for pid in self._pids():
            with suppress(OSError, ValueError):
                status = Path(f"/proc/{pid}/status").read_text()
                total += 1024 * int(status.split(f"{name}:")[1].split()[0])
        return total

    def pids(self, word: str) -> list[int]:
        """Those of its processes whose command has `word`."""
        found = []
        for pid in self._pids():
            with suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def _pids(self) -> list[int]:
        """Its process, and all that this one and its children have started."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
        found = [self._pid]
        for pid in found:
            found += parents.get(pid, [])
        return found


@contextmanager
def serving(command: Callable[[int], Sequence[str]], env: dict[str, str] | None = None) -> Any:
    """The server that `command` starts, given a port; ready to answer."""
    port = free_port()
    with Children() as children:
        process = children.start(command(port), stdout=sys.stderr, env=env)
        server, until = Server(port, process.pid), time.monotonic() + READY_S
        while True:
            try:
                server.get("/health")
                break
            except (urllib.error.URLError, OSError):
                if not children.alive() or time.monotonic() > until:
                    raise BenchError(f"{Path(command(port)[0]).name} did not start") from None
                time.sleep(0.1)
        yield server


# ---- clients -----------------------------------------------------------------------------


@dataclass
class Answer:
    """When a request was sent and its events came, in seconds, and what the usage says."""

    sent: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def first(self) -> float:
        return self.events[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.events, self.events[1:])]


async def events(port: int, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed completion. Raises BenchError."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
    try:
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = await asyncio.wait_for(reader.readline(), SILENT_S)
        if b" 200 " not in status:
            rest = await reader.read(2000)
            raise BenchError(f"{status.decode().strip()}: {rest[-500:].decode(errors='replace')}")
        while line := await asyncio.wait_for(reader.readline(), SILENT_S):
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise BenchError(f"the server said: {event['error']}")
                yield event
        raise BenchError("the server ended an answer early")
    finally:
        writer.close()


async def ask(port: int, prompt: Sequence[int], tokens: int, seed: int) -> Answer:
    """One request of `tokens` tokens, to its end."""
    answer = Answer(time.perf_counter())
    body = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 1.0,
        "seed": seed,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    async for event in events(port, body):
        if event.get("choices"):
            answer.events.append(time.perf_counter())
        if usage := event.get("usage"):
            answer.tokens = usage["completion_tokens"]
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get(
                "cached_tokens", 0
            )
    if not answer.events or not answer.tokens:
        raise BenchError("an answer without tokens")
    return answer


class Prompts:
    """Random prompts, none like another."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._draw, self._vocabulary, self._length = random.Random(0), vocabulary, length

    def next(self) -> list[int]:
        return [self._draw.randrange(self._vocabulary) for _ in range(self._length)]


async def closed_loop(
    port: int, prompts: Prompts, clients: int, each: int, tokens: int
) -> list[list[Answer]]:
    """`clients` that ask `each` time as soon as they have their answer; the answers of each."""

    async def client(number: int) -> list[Answer]:
        return [await ask(port, prompts.next(), tokens, number * each + i) for i in range(each)]

    return list(await asyncio.gather(*map(client, range(clients))))


async def poisson(
    port: int, prompts: Prompts, per_second: float, count: int, tokens: int
) -> list[Answer]:
    """`count` requests that arrive at random, whether or not others have ended."""
    draw, running = random.Random(1), []
    for seed in range(count):
        running.append(asyncio.ensure_future(ask(port, prompts.next(), tokens, seed)))
        await asyncio.sleep(draw.expovariate(per_second))
    return list(await asyncio.gather(*running))


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """What a load's answers say, as serve.py's rows have it."""
    begin = min(answer.sent for answer in answers)
    end = max(answer.events[-1] for answer in answers)
    firsts = [1e3 * answer.first for answer in answers]
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps]
    prompts = sum(answer.prompt_tokens for answer in answers)
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / (end - begin),
        "ttft_p50_ms": statistics.median(firsts),
        "ttft_p95_ms": quantile(firsts, 0.95),
        "gap_p50_ms": statistics.median(gaps),
        "gap_p99_ms": quantile(gaps, 0.99),
        "prefix_hits": sum(answer.cached_tokens for answer in answers) / prompts,
    }


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all have the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
