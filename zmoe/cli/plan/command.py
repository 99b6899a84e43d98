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

from zmoe.cli.common import Parser, run_command
from zmoe.cli.plan.known_links import LINKS
from zmoe.cli.plan.known_machines import MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.cli.plan.lookup import look_up
from zmoe.errors import InputError, PlacementError
from zmoe.perf.cost import POLICIES, SCHEDULES
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.profile import read_profile
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
    parser = Parser(PROG, __doc__.partition(": ")[2] if __doc__ else "")
    _add_question(parser)
    _add_workload(parser)
    _add_parameters(parser)
    add = parser.add_argument_group("output").add_argument
    add("--target", type=float, metavar="TOKENS_PER_S", help="say what to buy for this speed")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", type=Path, metavar="FILE", help="also draw it, as .png or .svg")
    _add_calibration(parser)
    return parser


def _add_calibration(parser: Parser) -> None:
    add = parser.add_argument_group("calibration").add_argument
    add("--calibrate", type=Path, metavar="FILE", help="measure this machine into a profile")
    add("--hosts", help="and the exchange among these hosts, this machine first, comma separated")
    add("--hostfile", type=Path, metavar="F", help="the same, in a hosts file of mlx.launch")
    add("--python", help="interpreter on the other hosts (default: the path of this one)")


def _add_question(parser: Parser) -> None:
    add = parser.add_argument_group("what runs where").add_argument
    models, machines, links = (", ".join(table) for table in (MODELS, MACHINES, LINKS))
    add("--model", metavar="M", help=f"{models}, a folder, or a Hugging Face name")
    add("--hardware", metavar="H", help=f"{machines}, or a profile; a,b for unequal nodes in turn")
    add("--link", metavar="L", help=f"{links}, or a profile; default: the one of --hardware")
    add("--nodes", metavar="N", help="a number, a list 2,4 or a range (default: 1-8)")
    add("--bits", type=int, metavar="B", help="bits per weight, instead of the published ones")
    add(
        "--group-size",
        type=int,
        metavar="G",
        help="with --bits: weights that share a scale; 64 if not given",
    )
    add("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="who does attention")
    add("--policy", choices=POLICIES, default=POLICIES[0], help="what a node computes")
    add(
        "--placement",
        metavar="P",
        default="experts",
        help=f"who owns what: {', '.join(WAYS)}, or a JSON file (docs/placement.md)",
    )
    add("--one-machine", action="store_true", help="the nodes share one machine evenly")


def _add_workload(parser: Parser) -> None:
    defaults = Workload()
    add = parser.add_argument_group("workload").add_argument
    add("--batch", type=int, metavar="B", default=defaults.batch, help="sequences at once")
    add(
        "--context",
        type=int,
        metavar="C",
        default=defaults.context,
        help="tokens in each one's cache",
    )
    add(
        "--prompt",
        type=int,
        metavar="P",
        default=defaults.prompt,
        help="tokens of each one's prompt",
    )


def _add_parameters(parser: Parser) -> None:
    add = parser.add_argument_group("parameters, instead of the tables' own").add_argument
    add(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="share of the memory bandwidth that decode reaches",
    )
    add("--latency-us", type=float, metavar="US", help="one small exchange between two nodes")
    add("--wiring", type=float, metavar="GB/S", help="Metal's driver wires cold weights at this")
    add(
        "--wire-bits",
        type=int,
        choices=(8, 16, 32),
        default=16,
        help="an element of an exchanged sum",
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


def _machines(text: str) -> tuple[list[Machine], Link | None]:
    """Return the machines of --hardware, and the link of the first profile among them."""
    machines, link = [], None
    for name in text.split(","):
        if _is_file(name):
            profile = read_profile(Path(name))
            machines.append(profile.machine)
            link = link or profile.link
        else:
            machines.append(look_up("--hardware", name, MACHINES, "the path of a profile"))
    return machines, link


def _link(name: str | None, measured: Link | None) -> Link | None:
    if name is None:
        return measured
    if _is_file(name):
        return read_profile(Path(name)).link
    return look_up("--link", name, LINKS, "the path of a profile")


def _is_file(name: str) -> bool:
    return name.endswith(".json") or "/" in name


def setup_of(options: argparse.Namespace) -> Setup:
    """Return what the flags ask to predict. Raises InputError naming the flag."""
    for flag, value, most in (
        ("--batch", options.batch, 4096),
        ("--context", options.context, 1e8),
        ("--prompt", options.prompt, 1e6),
        ("--target", options.target, math.inf),
        ("--efficiency", options.efficiency, 1),
        ("--latency-us", options.latency_us, math.inf),
        ("--wiring", options.wiring, math.inf),
    ):
        _positive(flag, value, most)
    if options.model is None or options.hardware is None:
        raise InputError("--model and --hardware are needed, or --calibrate FILE")
    machines, measured = _machines(options.hardware)
    link = _link(options.link, measured)
    if options.one_machine and len(machines) > 1:
        raise InputError("--one-machine and several machines in --hardware exclude each other")
    if options.efficiency is not None:
        machines = [replace(m, bandwidth_efficiency=options.efficiency) for m in machines]
    if options.wiring is not None:
        machines = [replace(m, wiring=options.wiring * 1e9) for m in machines]
    if options.latency_us is not None and link is not None:
        link = replace(link, latency_s=options.latency_us * 1e-6)
    from zmoe.cli.plan.model import find_model

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
    if not _is_file(name):
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

        hosts = hosts_of(options.hosts, options.hostfile, options.python)
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
    report = plan_report.report_of(setup, predictions, options.target)
    if options.plot is not None:
        plot(predictions)
    if options.json:
        print(json.dumps(report, indent=1), flush=True)
    else:
        plan_report.show(setup, predictions, report["environment"]["conclusions"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _plan(options))


if __name__ == "__main__":
    sys.exit(main())
