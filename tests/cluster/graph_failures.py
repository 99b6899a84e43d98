"""Nodes that are killed, stopped or go astray at random moments of a run in MLX's graph: without
a worker the run goes on, and whatever else happens ends it.

test_graph.py runs a round of each. As a program it runs as many as it is told to:
`python -m tests.cluster.graph_failures MODEL --rounds 50`
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.cluster.conftest import PATIENCE_S, Commands, commands_in, first_output

NODES = 3
PEER_TIMEOUT_S = 3
ENDING_S = 5  # for a process to end, beyond the deadline, on a busy machine
ENDLESS_RUN = Path(__file__).with_name("endless_run.py")
STRAYING_NODE = Path(__file__).with_name("straying_node.py")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "astray": signal.SIGUSR1}


class Round(NamedTuple):
    """What happens to which rank, and when, in seconds after the first token."""

    what: str
    rank: int
    after: float


def draw_round(number: int, seed: int) -> Round:
    """Each kind in turn; the leader never goes astray, since the others follow it."""
    random_of, what = random.Random(1000 * seed + number), list(SIGNALS)[number % len(SIGNALS)]
    return Round(what, random_of.randrange(what == "astray", NODES), random_of.uniform(0, 0.5))


def words_of(happened: Round) -> str:
    """What the others say at the end of their last line."""
    if happened.what == "astray":
        other = rf"(rank|node) {happened.rank}(: rank \d)? has another routing"
        return other + r": layer \d+, step \d+"
    return rf"rank {happened.rank} .*(layer \d+, |between layers, )step \d+"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def check_round(commands: Commands, model: Path, happened: Round) -> float:
    """Have it happen; returns in how many seconds the others have ended, or go on.

    Raises AssertionError where one of them has not done as it should.
    """
    port = free_port()
    common = ("--model", model, "--compute", "mlx", "--peer-timeout", PEER_TIMEOUT_S, "-m", 100000)
    manual = ("--manual", "--starting-port", port)
    nodes = [commands.python(ENDLESS_RUN, "-n", NODES, *manual, *common, "x")]
    for rank in range(1, NODES):
        joins = ("--leader", f"127.0.0.1:{port}", "--rank", rank, "--once")
        nodes.append(commands.python(STRAYING_NODE, *joins))
    first_output(nodes[0])
    time.sleep(happened.after)
    begun = time.monotonic()
    nodes[happened.rank].send_signal(SIGNALS[happened.what])
    if happened.what != "astray" and happened.rank:
        await_words(nodes[0], f"the run goes on without node {happened.rank}")
        took = time.monotonic() - begun
        nodes[0].send_signal(signal.SIGINT)
        nodes[happened.rank].kill()
        for process in nodes:
            process.communicate(timeout=PATIENCE_S)
        assert nodes[0].returncode == 130
        return took
    for rank, process in enumerate(nodes):
        if rank == happened.rank:
            continue
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1, (happened, rank, process.returncode, errors)
        last = errors.strip().splitlines()[-1]
        assert re.search(words_of(happened), last), (happened, rank, errors)
    took = time.monotonic() - begun
    assert took < PEER_TIMEOUT_S + ENDING_S, (happened, took)
    if happened.what != "astray":
        nodes[happened.rank].kill()
    nodes[happened.rank].communicate(timeout=PATIENCE_S)
    assert nodes[happened.rank].returncode in (1, -signal.SIGKILL)
    return took


def await_words(process: subprocess.Popen[str], words: str) -> None:
    """Until `process`, which goes on, has written `words` to its standard error."""
    until, errors = time.monotonic() + PATIENCE_S, b""
    while words not in errors.decode():
        assert time.monotonic() < until, errors
        try:
            raise AssertionError(process.communicate(timeout=0.1))
        except subprocess.TimeoutExpired as yet:
            errors = yet.stderr or b""


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("model", type=Path, help="folder, of a model in float32")
    made.add_argument("--rounds", type=int, default=50, help="default 50")
    made.add_argument("--first", type=int, default=0, help="number of the first one; default 0")
    made.add_argument("--seed", type=int, default=1)
    options = made.parse_args()
    good, slowest = 0, 0.0
    for number in range(options.first, options.first + options.rounds):
        happened = draw_round(number, options.seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                with commands_in(Path(folder)) as commands:
                    took = check_round(commands, options.model.resolve(), happened)
                good, slowest = good + 1, max(slowest, took)
                print(f"{number}, {happened}: {took:.1f} s", flush=True)
            except Exception as problem:
                print(f"{number}, {happened}: {type(problem).__name__}: {problem}", flush=True)
    print(f"{good} of {options.rounds} went as they should, the slowest within {slowest:.1f} s")
    return good != options.rounds


if __name__ == "__main__":
    sys.exit(main())
