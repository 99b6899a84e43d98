"""A node's peak memory and bytes read while loading, against its share of the checkpoint.

The share is worked out here from the tensor headers, apart from zmoe: dense
tensors, and the experts dealt evenly. Peak memory is what each node process
reports; bytes read are what the system counted for it (Linux only), the
interpreter's own files included, which `--baseline` shows.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BenchError, Children, environment, finish, list_of, main, parser, positive

ALLOWANCE = 200 * 10**6  # bytes of a node's peak beside its share and the largest tensor
SAMPLE_SECONDS = 0.02
EXPERT = re.compile(r"\.(?:experts|switch_mlp|switch_glu)\.")
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Checkpoint:
    """Sizes in bytes, from the headers of a checkpoint folder."""

    dense: int
    experts: int
    largest_dense: int
    largest_experts: int  # one projection of one layer, all experts together

    def share(self, nodes: int) -> int:
        """What each of `nodes` nodes has to hold."""
        return self.dense + math.ceil(self.experts / nodes)

    def largest(self, nodes: int) -> int:
        """The largest tensor of one node: dense, or its experts stacked."""
        return max(self.largest_dense, math.ceil(self.largest_experts / nodes))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Sum up the headers of `folder`; BenchError when there are none."""
    dense: list[int] = [0]
    stacks: dict[str, int] = defaultdict(int)
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
        except (OSError, ValueError, struct.error) as error:
            raise BenchError(f"cannot read the header of {path}: {error}") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if EXPERT.search(name):
                stacks[EXPERT_NUMBER.sub(".experts.", name)] += end - begin
            else:
                dense.append(end - begin)
    if not stacks:
        raise BenchError(f"{folder} holds no experts")
    return Checkpoint(sum(dense), sum(stacks.values()), max(dense), max(stacks.values()))


def bytes_read_of(pid: int) -> int | None:
    """Bytes that process `pid` has read through system calls."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    return None


def ranks_under(leader: int) -> dict[int, int]:
    """Process ids by rank: `leader` is 0, its children tell theirs on their command line."""
    found = {0: leader}
    with suppress(OSError):
        for children in Path(f"/proc/{leader}/task").glob("*/children"):
            for pid in children.read_text().split():
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"--rank" in words:
                    found[int(words[words.index(b"--rank") + 1])] = int(pid)
    return found


def sample(read: dict[int, int], leader: int, nodes: int) -> None:
    """Bring `read`, the bytes read by rank, up to date.

    The system adds what an ended child has read to its parent: the leader's
    count is taken only as long as all of its children run.
    """
    count = bytes_read_of(leader)
    ranks = ranks_under(leader)
    if count is not None and len(ranks) == nodes:
        read[0] = count
    for rank, pid in ranks.items():
        count = bytes_read_of(pid)
        if rank > 0 and count is not None:
            read[rank] = max(count, read.get(rank, 0))


def load(model: str, nodes: int, deadline_s: float) -> tuple[list[int], dict[int, int]]:
    """Run `nodes` nodes; peak bytes, by rank, and bytes read, as far as the system tells."""
    read: dict[int, int] = {}
    command = [sys.executable, "-m", "zmoe.cli.run", "--json", "--temp", "0", "--model", model]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Children() as children:
        leader = children.start(
            [*command, "--nodes", str(nodes), "-m", "1", "a"], stdout=out, stderr=err
        )
        until = time.monotonic() + deadline_s
        while leader.poll() is None:
            sample(read, leader.pid, nodes)
            if time.monotonic() > until:
                raise BenchError(f"loading on {nodes} nodes took longer than {deadline_s:g} s")
            with suppress(subprocess.TimeoutExpired):
                leader.wait(SAMPLE_SECONDS)
        out.seek(0)
        err.seek(0)
        if leader.returncode != 0:
            last = err.read().decode(errors="replace").strip().splitlines()[-1:]
            raise BenchError(f"zmoe-run failed: {last[0] if last else 'no message'}")
        peaks: list[int] = json.loads(out.read())["peak_memory"]
        if 0 in peaks:
            raise BenchError(f"node {peaks.index(0)} was lost, so nothing is measured")
    return peaks, read


def arguments() -> argparse.Namespace:
    made = parser("Measure each node's peak memory and bytes read against its share.")
    made.add_argument("model", type=Path, help="checkpoint folder, such as make_model.py writes")
    made.add_argument("--nodes", type=list_of(positive), default=[1, 2, 4], help="default 1,2,4")
    made.add_argument("--baseline", default="zmoe-tiny", help="a model that takes nearly nothing")
    made.add_argument("--deadline", type=positive, default=900, help="seconds for one run")
    return made.parse_args()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a node of each node count, and one for the baseline; all in bytes."""
    checkpoint = read_checkpoint(options.model)
    rows = []
    for nodes in options.nodes:
        print(f"{nodes} nodes", file=sys.stderr)
        empty_peaks, empty_read = load(options.baseline, nodes, options.deadline)
        peaks, read = load(str(options.model), nodes, options.deadline)
        share, largest = checkpoint.share(nodes), checkpoint.largest(nodes)
        for rank, peak in enumerate(peaks):
            rows.append(
                {
                    "nodes": nodes,
                    "rank": rank,
                    "share_bytes": share,
                    "largest_tensor_bytes": largest,
                    "peak_bytes": peak,
                    "allowed_bytes": share + largest + ALLOWANCE,
                    "bytes_read": read.get(rank),
                    "baseline_peak_bytes": empty_peaks[rank],
                    "baseline_bytes_read": empty_read.get(rank),
                }
            )
    return rows


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:.0f}"

    table = Table("nodes", "rank", "share", "largest", "peak", "allowed", "read", "peak0", "read0")
    table.caption = "MiB; peak0 and read0 are those of the baseline model"
    for row in report["results"]:
        sizes = [mib(row[name]) for name in list(row)[2:]]
        table.add_row(str(row["nodes"]), str(row["rank"]), *sizes)
    Console().print(table)


def benchmark() -> int:
    options = arguments()
    block = environment()
    finish(options, {"environment": block, "results": measure(options)}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
