"""What a measured process does first: stay on its cores, and end with the process that began it."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

WATCH_SECONDS = 0.5
PARENT = "ZMOE_BENCH_PARENT"  # in the environment: the process id of whoever started this one


BAD_INPUT = 2  # exit status, as every program of zmoe has it
ABSENT = 3  # exit status of `--about` when what is to be measured is not installed


class PeerFailure(Exception):
    """What ends a peer: one line for standard error, and an exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def cores(text: str) -> list[int]:
    """An argparse type: comma-separated core numbers."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of core numbers")
    return [int(word) for word in words]


def count(text: str) -> int:
    """An argparse type: an integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def counts(text: str) -> list[int]:
    """An argparse type: comma-separated integers of 1 or more."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of 1 or more")
    return [int(word) for word in words]


def base_parser(description: str, prompt_tokens: int) -> Any:
    """An argument parser with the flags that every measured engine has."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = made.add_argument
    add("model", help="what to measure")
    add("--cores", type=cores, help="run on these only, such as 0,1 (default: wherever it may)")
    add("-p", "--prompt-tokens", type=count, default=prompt_tokens, help="default %(default)s")
    add("--about", action="store_true", help="measure nothing: tell the build, or why it can't run")
    return made


def parser(description: str, prompt_tokens: int, tokens: int, repetitions: int) -> Any:
    """The same, with those of an engine that runs one sequence; and its defaults."""
    made = base_parser(description, prompt_tokens)
    add = made.add_argument
    add("-n", "--tokens", type=count, default=tokens, help="decode steps; default %(default)s")
    add("-r", "--repetitions", type=count, default=repetitions, help="default %(default)s")
    add("--no-warm-up", action="store_true", help="time the first repetition as well")
    return made


def batch_parser(description: str) -> Any:
    """The same, with those of an engine that runs many sequences at once."""
    made = base_parser(description, 128)
    add = made.add_argument
    add("--sequences", type=counts, default=[1, 2, 4, 8, 16, 32], help="default 1,2,4,8,16,32")
    add("--generated", type=counts, default=[32, 128], help="tokens of each; default 32,128")
    return made


def checked(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line, once its process is where it says."""
    options = made.parse_args()
    for name in ("prompt_tokens", "tokens", "repetitions"):
        if getattr(options, name, 1) < 1:
            made.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.cores is not None and hasattr(os, "sched_getaffinity"):
        beyond = set(options.cores) - os.sched_getaffinity(0)
        if beyond:
            made.error(f"--cores: this process may not run on core {min(beyond)}")
    pin(options.cores)
    return options


def pin(wanted: Sequence[int] | None) -> None:
    """Keep this process and what it starts on `wanted`; None, or a system that can't: anywhere."""
    if wanted is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, wanted)


def end_with_parent() -> None:
    """End this process at once when the one that started it is gone, however that ended.

    Who that was, the environment tells: it may have ended before we could ask.
    """
    parent = int(os.environ.pop(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tokens(seed: int, length: int, vocabulary: int) -> list[int]:
    """Random token ids: what a prompt says makes no difference to its speed."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary) for _ in range(length)]


def rates(seconds: Sequence[float], length: int) -> tuple[float, list[float]]:
    """Median tokens/s, and those of each repetition."""
    each = [length / taken for taken in seconds]
    return statistics.median(each), [round(rate, 2) for rate in each]


def report(
    prompt_tokens: int, prompt: Sequence[float], steps: int, decode: Sequence[float]
) -> dict[str, Any]:
    """Medians over the repetitions, whose seconds are given; names are zmoe-run's."""
    prompt_tps, prompt_runs = rates(prompt, prompt_tokens)
    generation_tps, generation_runs = rates(decode, steps)
    return {
        "prompt_tokens": prompt_tokens,
        "generation_tokens": steps,
        "prompt_tps": prompt_tps,
        "generation_tps": generation_tps,
        "prompt_runs": prompt_runs,
        "generation_runs": generation_runs,
    }


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Peak resident memory of this process, or (RUSAGE_CHILDREN) the most of an ended child."""
    peak = resource.getrusage(who).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(program: Callable[[], dict[str, Any]]) -> NoReturn:
    """Print the object that `program` returns; a failure is one line."""
    end_with_parent()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        print(json.dumps(program()), flush=True)
        status = 0
    except PeerFailure as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
