"""What a machine allows: how fast its cores read memory, how fast idle processes exchange."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from common import BENCH, run_json
from engines import usable_cores

DEADLINE_S = 600
TRANSPORTS = "raw-tcp,zmoe-c,zmoe"


def read_gb_per_s(cores: int) -> float:
    """GB/s that the first `cores` usable cores together read memory with."""
    available = usable_cores() or list(range(cores))
    words = ",".join(map(str, available[:cores]))
    answer = run_json([sys.executable, str(BENCH / "peers" / "memory.py"), words], DEADLINE_S)
    return float(answer["gb_per_s"])


def exchange_us(nodes: Sequence[int], payload: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of bench/exchange.py: one all-reduce of `payload` bytes, a rank each."""
    command = [sys.executable, str(BENCH / "exchange.py"), "--json", "--transports", TRANSPORTS]
    command += [
        "--nodes",
        ",".join(map(str, nodes)),
        "--bytes",
        str(payload),
        "--rounds",
        str(rounds),
    ]
    rows: list[dict[str, Any]] = run_json(command, DEADLINE_S)["results"]
    return rows
