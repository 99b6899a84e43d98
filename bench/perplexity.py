"""What precision costs: perplexity of the held-out text under each way to compute.

A configuration is how the weights are quantised (mlx-lm makes the copies, in a
temporary folder), what computes the products, and how precise the activations
are. Each runs in a process of its own. The last tenth of the text is scored,
which zmoe-tiny was not fitted to.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    BENCH,
    BenchError,
    environment,
    finish,
    list_of,
    main,
    one_of,
    parser,
    positive,
    run_json,
    short_name,
)

from zmoe.config import ACTIVATIONS, COMPUTES

TINY = BENCH.parent / "zmoe" / "data" / "zmoe-tiny"
HELD_OUT_SHARE = 0.1  # as tools/tiny_data.py has it
CONVERT_SECONDS = 600
WEIGHTS = re.compile(r"(?:(?P<bits>[1-8])|(?P<mode>mxfp4|nvfp4|mxfp8))(?:g(?P<group>\d+))?")


@dataclass(frozen=True)
class Weights:
    """How a copy of the model is quantised; nothing at all: as the checkpoint has them."""

    name: str
    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None

    @property
    def quantised(self) -> bool:
        return self.mode is not None


@dataclass(frozen=True)
class Configuration:
    weights: Weights
    compute: str
    activations: str


def weights(text: str) -> Weights:
    """An argparse type: `plain`, bits as in 4 or 4g32 (affine), or a mode as in mxfp4."""
    if text == "plain":
        return Weights(text)
    found = WEIGHTS.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not plain, BITS[gGROUP], mxfp4, nvfp4, mxfp8"
        )
    bits, group = found["bits"], found["group"]
    return Weights(
        text, int(bits) if bits else None, int(group) if group else None, found["mode"] or "affine"
    )


def arguments() -> argparse.Namespace:
    made = parser("Measure perplexity over quantisations and ways to compute.")
    add = made.add_argument
    add("text", type=Path, help="UTF-8 text file that zmoe-tiny was trained on but for its end")
    add("--model", type=Path, default=TINY, help="checkpoint folder (default: zmoe-tiny)")
    add(
        "--weights",
        type=list_of(weights),
        default=[weights(text) for text in ("plain", "8g64", "4g64", "4g32", "mxfp4")],
        help="plain, BITS[gGROUP] or a mode; default plain,8g64,4g64,4g32,mxfp4",
    )
    add("--compute", type=list_of(one_of(COMPUTES)), default=["mlx", "native"])
    add("--activations", type=list_of(one_of(ACTIVATIONS)), default=list(ACTIVATIONS))
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of quantised copies' scales")
    add("--context", type=positive, default=256, help="tokens of a window; default 256")
    add("--tokens", type=positive, help="score only the first so many")
    add("--step-by-step", action="store_true", help="mlx too decodes token by token")
    add("--deadline", type=positive, default=1800, help="seconds for one configuration")
    options = made.parse_args()
    try:
        options.text = held_out(options.text.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        made.error(f"cannot read {options.text}: {error}")
    if not options.model.is_dir():
        made.error(f"no folder {options.model}")
    if not list(configurations(options)):
        made.error("--activations int8 alone needs quantised --weights and --compute native")
    return options


def configurations(options: argparse.Namespace) -> Iterator[Configuration]:
    """All that make sense: int8 activations are for quantised weights in our kernels."""
    for each in options.weights:
        for compute in options.compute:
            for activations in options.activations:
                if activations == "exact" or (each.quantised and compute != "mlx"):
                    yield Configuration(each, compute, activations)


def held_out(text: str) -> str:
    """The part that zmoe-tiny was not fitted to: from the first blank line after nine tenths."""
    cut = text.find("\n\n", int(len(text) * (1 - HELD_OUT_SHARE)))
    return text[cut + 2 :] if cut >= 0 else text


def quantised_copy(options: argparse.Namespace, wanted: Weights, workdir: Path) -> Path:
    """A folder with the model quantised as `wanted`, made once."""
    folder = workdir / wanted.name
    if folder.exists():
        return folder
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(options.model)]
    command += ["--mlx-path", str(folder), "-q", "--q-mode", str(wanted.mode)]
    for flag, value in (
        ("--q-bits", wanted.bits),
        ("--q-group-size", wanted.group_size),
        ("--dtype", options.dtype),
    ):
        if value is not None:
            command += [flag, str(value)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchError(f"mlx_lm took longer than {CONVERT_SECONDS} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise BenchError(f"mlx_lm cannot make {wanted.name}: {last[0] if last else 'no message'}")
    return folder


class Run:
    """One run: measures, and keeps what could not be measured."""

    def __init__(self, options: argparse.Namespace, workdir: Path) -> None:
        self.options, self.workdir = options, workdir
        self.failed: dict[str, str] = {}
        self._text = workdir / "text"
        self._text.write_text(options.text, encoding="utf-8")

    def measure(self) -> list[dict[str, Any]]:
        rows = []
        for each in configurations(self.options):
            name = f"{each.weights.name} {each.compute} {each.activations}"
            print(name, file=sys.stderr)
            try:
                rows.append(self._row(each))
            except BenchError as error:
                print(f"perplexity.py: {name}: {error}", file=sys.stderr)
                self.failed[name] = str(error)
        return rows

    def _row(self, each: Configuration) -> dict[str, Any]:
        options, folder = self.options, self.options.model
        if each.weights.quantised:
            folder = quantised_copy(options, each.weights, self.workdir)
        command = [sys.executable, str(BENCH / "peers" / "zmoe_loss.py"), str(folder)]
        command += [str(self._text), "--context", str(options.context)]
        command += ["--compute", each.compute, "--activations", each.activations]
        if options.tokens is not None:
            command += ["--tokens", str(options.tokens)]
        if options.step_by_step:
            command.append("--step-by-step")
        found = run_json(command, options.deadline)
        return {
            "model": short_name(str(options.model)),
            "weights": each.weights.name,
            "compute": each.compute,
            "activations": each.activations,
            "context": options.context,
            **{name: round(value, 5) for name, value in found.items()},
        }


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("weights", "compute", "activations", box=box.SIMPLE)
    for title in ("nats/token", "perplexity", "bits/char", "x first"):
        table.add_column(title, justify="right")
    results = report["results"]
    for each in results:
        table.add_row(
            *(each[name] for name in ("weights", "compute", "activations")),
            f"{each['nats_per_token']:.4f}",
            f"{each['perplexity']:.3f}",
            f"{each['bits_per_char']:.4f}",
            f"{each['perplexity'] / results[0]['perplexity']:.4f}",
        )
    console = Console()
    console.print(table)
    for name, reason in report["failed"].items():
        console.print(f"failed: {name}: {reason}", highlight=False)


def benchmark() -> int:
    options = arguments()
    block = environment()
    with tempfile.TemporaryDirectory(prefix="bench") as workdir:
        run = Run(options, Path(workdir))
        rows = run.measure()
    finish(options, {"environment": block, "results": rows, "failed": run.failed}, show)
    return 1 if run.failed else 0


if __name__ == "__main__":
    main(benchmark)
