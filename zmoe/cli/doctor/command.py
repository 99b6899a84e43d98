"""zmoe-doctor: see what a machine is, and whether zmoe computes on it as mlx-lm does."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zmoe.cli.common import Parser, add_hosts, run_command
from zmoe.cli.doctor.check import Check, Result, results
from zmoe.cluster.spec import PYTHON_HELP
from zmoe.errors import ZmoeError

if TYPE_CHECKING:
    from zmoe.calibration.link import Hosts

PROG = "zmoe-doctor"


def _parser() -> Parser:
    parser = Parser(PROG, "See what a machine is, and whether zmoe computes on it as mlx-lm does.")
    add_hosts(parser.add_argument)
    parser.add_argument("--python", help=PYTHON_HELP)
    parser.add_argument(
        "--json", action="store_true", help="Print one JSON object instead of the table"
    )
    return parser


def examine(given: Hosts, folder: Path) -> Iterator[Result]:
    """The result of each check; `folder` is for the model of the self-test."""
    from zmoe.cli.doctor import hosts, machine
    from zmoe.cli.doctor.selftest import SelfTest, crossings

    found: list[tuple[bool, str]] = []

    def device() -> str:
        found.append(machine.device())
        return found[0][1]

    first = (
        Check("versions", machine.versions),
        Check("system", machine.system),
        Check("device", device),
    )
    yield from results(first, _say)
    on_gpu = bool(found) and found[0][0]
    metal = sys.platform == "darwin" and on_gpu
    rest = [*machine.checks(metal=metal), *hosts.checks(given)]
    if found:
        rest += SelfTest(folder).checks(on_gpu=on_gpu)
        rest += crossings(metal=metal)
    yield from results(rest, _say)


def _say(text: str) -> None:
    print(f"{PROG}: {text}", file=sys.stderr, flush=True)


def _examine(options: argparse.Namespace) -> None:
    from zmoe.cli.calibrate import hosts_of
    from zmoe.cli.doctor.report import report_of, show

    given = hosts_of(PROG, options.hosts, options.hostfile, options.python)
    with tempfile.TemporaryDirectory(prefix="zmoe-doctor-") as folder:
        found = list(examine(given, Path(folder)))
    if options.json:
        print(json.dumps(report_of(found), indent=1), flush=True)
    else:
        show(found)
    failed = [result.check for result in found if not result.ok]
    if failed:
        raise ZmoeError(f"failed: {', '.join(failed)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a check has failed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as in zmoe-run
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _examine(options))


if __name__ == "__main__":
    sys.exit(main())
