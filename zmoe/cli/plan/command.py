"""zmoe-plan: predict what a cluster would do with a model, before anybody buys it."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zmoe.cli.common import Parser, add_hosts, run_command
from zmoe.cli.plan.forms import compare
from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.cli.plan.names import find_link, find_machines, find_model, is_file
from zmoe.cluster.spec import PYTHON_HELP
from zmoe.errors import InputError, PlacementError
from zmoe.perf.cost import POLICIES, SCHEDULES
from zmoe.perf.shape import ModelShape
from zmoe.placement.build import WAYS, most_nodes
from zmoe.placement.check import check_placement
from zmoe.placement.file import read_placement
from zmoe.placement.placed import Placed, placed_of
from zmoe.placement.predict import Setup, Workload, predict_all

PROG = "zmoe-plan"
MOST_NODES = 64
NODES = range(1, 9)  # unless --nodes says so, as many of them as the model has experts for


def _parser() -> Parser:
    parser = Parser(PROG, "Predict how fast a cluster would run a model, before anybody buys it.")
    _add_question(parser)
    _add_workload(parser)
    _add_parameters(parser)
    add = parser.add_argument_group("output").add_argument
    add("--target", type=float, metavar="TOKENS_PER_S", help="Say what to buy for this speed")
    add("--json", action="store_true", help="Print one JSON object instead of the table")
    add("--plot", type=Path, metavar="FILE", help="Also draw a plot to this .png or .svg file")
    _add_calibration(parser)
    return parser


def _add_calibration(parser: Parser) -> None:
    add = parser.add_argument_group("calibration of this machine and its links").add_argument
    add("--calibrate", type=Path, metavar="FILE", help="Measure and write a profile to this file")
    add_hosts(add)
    add("--python", help=PYTHON_HELP)


def _add_question(parser: Parser) -> None:
    add = parser.add_argument_group("what runs where").add_argument
    models, machines, links = (", ".join(table) for table in (MODELS, MACHINES, LINKS))
    add("--model", metavar="M", help=f"One of {models}, a folder, or a Hugging Face name")
    add("--hardware", metavar="H", help=f"One of {machines}, or a profile; a,b for unlike nodes")
    add("--link", metavar="L", help=f"One of {links}, or a profile (default: that of --hardware)")
    add("--nodes", metavar="N", help="Node counts: a number, list (2,4) or range (default: 1-8)")
    add("--bits", type=int, metavar="B", help="Bits per weight (default: as published)")
    add(
        "--group-size",
        type=int,
        metavar="G",
        help="With --bits: weights that share a scale (default: 64)",
    )
    add("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="Nodes that compute attention")
    add("--policy", choices=POLICIES, default=POLICIES[0], help="Experts that each node runs")
    add(
        "--placement",
        metavar="P",
        default="experts",
        help=f"Which node owns which experts: {', '.join(WAYS)}, or a JSON file "
        "(docs/placement.md)",
    )
    add("--one-machine", action="store_true", help="All nodes share one machine evenly")


def _add_workload(parser: Parser) -> None:
    defaults = Workload()
    add = parser.add_argument_group("workload").add_argument
    add("--batch", type=int, metavar="B", default=defaults.batch, help="Sequences at once")
    add(
        "--context",
        type=int,
        metavar="C",
        default=defaults.context,
        help="Tokens in the attention cache of each sequence",
    )
    add(
        "--prompt",
        type=int,
        metavar="P",
        default=defaults.prompt,
        help="Tokens in the prompt of each sequence",
    )


def _add_parameters(parser: Parser) -> None:
    add = parser.add_argument_group("parameters that replace the tables' values").add_argument
    add(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="Share of the memory bandwidth that decoding reaches, up to 1",
    )
    add("--latency-us", type=float, metavar="US", help="Latency between two nodes in microseconds")
    add(
        "--crossing-us",
        type=float,
        metavar="US",
        help="Crossing from MLX's graph to the CPU and back, as zmoe-doctor measures it",
    )
    add("--wiring", type=float, metavar="GB/S", help="Speed of wiring cold weights with Metal")
    add(
        "--wire-bits",
        type=int,
        choices=(8, 16, 32),
        default=16,
        help="Bits per element of an exchanged sum",
    )


def parse_nodes(text: str) -> list[int]:
    """Return ascending numbers for "4", "2,4" or "1-8". Raises InputError naming --nodes."""
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= MOST_NODES:
            raise InputError(
                f"--nodes {text}: expected a number, a list 2,4 or a range 1-8, "
                f"from 1 to {MOST_NODES}"
            )
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def _positive(flag: str, value: float | None, most: float = math.inf) -> None:
    if value is not None and not (0 < value <= most and math.isfinite(value)):
        limit = "" if most == math.inf else f" of at most {most:g}"
        raise InputError(f"{flag} is {value:g}: expected a positive number{limit}")


def setup_of(options: argparse.Namespace) -> Setup:
    """Return what the flags ask to predict. Raises InputError naming the flag."""
    for flag, value, most in (
        ("--batch", options.batch, 4096),
        ("--context", options.context, 1e8),
        ("--prompt", options.prompt, 1e6),
        ("--target", options.target, math.inf),
        ("--efficiency", options.efficiency, 1),
        ("--latency-us", options.latency_us, math.inf),
        ("--crossing-us", options.crossing_us, math.inf),
        ("--wiring", options.wiring, math.inf),
    ):
        _positive(flag, value, most)
    if options.model is None or options.hardware is None:
        raise InputError("--model and --hardware are needed, or --calibrate FILE")
    machines, measured = find_machines(options.hardware)
    link = find_link(options.link, measured)
    if options.one_machine and len(machines) > 1:
        raise InputError("--one-machine and several machines in --hardware exclude each other")
    if options.efficiency is not None:
        machines = [replace(m, bandwidth_efficiency=options.efficiency) for m in machines]
    if options.wiring is not None:
        machines = [replace(m, wiring=options.wiring * 1e9) for m in machines]
    if options.crossing_us is not None:
        for machine in machines:
            if machine.crossing_s is None:
                raise InputError(f"--crossing-us: {machine.name} does not compute in MLX's graph")
        machines = [replace(m, crossing_s=options.crossing_us * 1e-6) for m in machines]
    if options.latency_us is not None and link is not None:
        link = replace(link, latency_s=options.latency_us * 1e-6)
    shape = find_model(options.model, options.bits, options.group_size)
    return Setup(
        shape=shape,
        machines=tuple(machines),
        link=link,
        workload=Workload(options.batch, options.context, options.prompt),
        schedule=options.schedule,
        policy=options.policy,
        placement=options.placement,
        wire_bytes=options.wire_bits / 8,
        one_machine=options.one_machine,
        given=_given(options, shape),
    )


def _given(options: argparse.Namespace, shape: ModelShape) -> Placed | None:
    """Return the placement of `shape` in the file that --placement names, or None."""
    name = options.placement
    if name in WAYS:
        return None
    if not is_file(name):
        known = ", ".join(WAYS)
        raise InputError(f'--placement "{name}" is unknown (known: {known}, or a JSON file)')
    if options.target is not None:
        raise InputError("--target and a placement file exclude each other")
    placement = read_placement(Path(name), shape.moe_layers)
    try:
        check_placement(placement, shape)
    except PlacementError as error:
        raise PlacementError(f"placement {name}: {error}") from None
    placed = placed_of(placement, shape.expert_hidden, name)
    if placed is None:
        raise PlacementError(f"placement {name}: slices that several nodes hold are not modelled")
    return placed


def _counts(nodes: str | None, setup: Setup) -> list[int]:
    """Return the node counts of --nodes; without it, those that suit `setup`."""
    if nodes is not None:
        return parse_nodes(nodes)
    if setup.given is not None:
        return [len(setup.given.resident)]
    return [count for count in NODES if count <= most_nodes(setup.placement, setup.shape)]


def _plan(options: argparse.Namespace) -> None:
    if options.calibrate is not None:
        from zmoe.cli.calibrate import calibrate, hosts_of

        hosts = hosts_of(PROG, options.hosts, options.hostfile, options.python)
        calibrate(options.calibrate, hosts, as_json=options.json)
        return
    for flag in ("hosts", "hostfile", "python"):
        if getattr(options, flag) is not None:
            raise InputError(f"--{flag} is for --calibrate")
    setup = setup_of(options)
    counts = _counts(options.nodes, setup)
    if setup.link is None and (counts != [1] or options.target is not None):
        raise InputError(f"no --link: give one of {', '.join(LINKS)}, or a profile")
    from zmoe.cli.plan import report as plan_report

    if options.plot is not None:
        plot = plan_report.plotter(options.plot)
    predictions = predict_all(setup, counts)
    compared = compare(setup, predictions)
    report = plan_report.report_of(setup, predictions, compared, options.target)
    if options.plot is not None:
        plot(predictions)
    if options.json:
        print(json.dumps(report, indent=1), flush=True)
    else:
        plan_report.show(setup, predictions, compared, report["environment"]["conclusions"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _plan(options))


if __name__ == "__main__":
    sys.exit(main())
