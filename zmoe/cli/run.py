"""zmoe-run: generate text with a model whose experts are spread over several nodes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zmoe import __version__
from zmoe.cli.common import Parser, check_writable, memory_limit, run_command, warn_unencrypted
from zmoe.config import (
    ACTIVATIONS,
    COMPUTES,
    DEFAULT_MODEL,
    POLICIES,
    SCHEDULES,
    WIRE_DTYPES,
    EngineConfig,
    Sampling,
    Timing,
)
from zmoe.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zmoe.cli.progress import Bars
    from zmoe.cluster.hosts import HostList
    from zmoe.cluster.leader import ClusterSpec
    from zmoe.engine.generate import Token
    from zmoe.placement.choose import Choice

PROG = "zmoe-run"


def _parser() -> Parser:
    parser = Parser(PROG, __doc__.partition(": ")[2] if __doc__ else "")
    add = parser.add_argument
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="text to continue or to answer; - reads stdin"
    )
    text.add_argument(
        "-p", "--prompt", dest="prompt_option", metavar="TEXT", help="the prompt, as a flag"
    )
    add("--version", action="version", version=f"zmoe {__version__}")
    add("--model", default=DEFAULT_MODEL, help="checkpoint folder, store, or Hugging Face name")
    _add_generation(parser)
    _add_compute(parser)
    _add_placement(parser)
    _add_cluster(parser)
    add("--stats", action="store_true", help="print a table of times and memory to stderr")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def _add_generation(parser: Parser) -> None:
    defaults = Sampling()
    add = parser.add_argument_group("generation").add_argument
    add("-m", "--max-tokens", type=int, default=defaults.max_tokens, help="tokens to generate")
    add("--temp", type=float, default=defaults.temp, help="temperature; 0 is greedy")
    add("--top-p", type=float, default=defaults.top_p, help="nucleus sampling; 1 is off")
    add("--top-k", type=int, default=defaults.top_k, help="sample from the k likeliest; 0 is off")
    add("--min-p", type=float, default=defaults.min_p, help="least probability relative to the top")
    add("--seed", type=int, help="seed of the sampler")
    add("--system-prompt", help="system message for the chat template")
    add("--ignore-chat-template", action="store_true", help="take the prompt as raw text")
    add("--chat-template-config", metavar="JSON", help="more arguments for the chat template")
    add("--prefill-step-size", type=int, default=512, help="prompt tokens per step")
    add(
        "--max-kv-size",
        type=int,
        help="attend to the first 4 and the latest tokens, that many in all, without end",
    )


def _add_compute(parser: Parser) -> None:
    defaults = EngineConfig()
    add = parser.add_argument_group("compute").add_argument
    add(
        "--compute",
        choices=COMPUTES,
        default=defaults.compute,
        help="large products by MLX, or by zmoe's CPU kernels; auto: native on a CPU",
    )
    add(
        "--activations",
        choices=ACTIVATIONS,
        default=defaults.activations,
        help="in the kernels' quantised products; int8 is faster on some CPUs, and less exact",
    )
    add(
        "--policy",
        choices=POLICIES,
        default=defaults.policy,
        help="experts that a node runs: the chosen ones, all of its own, or as many as the busiest "
        "node; idle ones change no output, but keep their weights warm",
    )


def _add_placement(parser: Parser) -> None:
    add = parser.add_argument_group("placement of the experts").add_argument
    add(
        "--placement",
        metavar="WAY",
        default="auto",
        help="auto (the fastest by prediction), experts (whole ones, spread evenly, none twice), "
        "replicas (copies as far as there is memory), slices (a part of each on every node), "
        "or a JSON file (docs/placement.md)",
    )
    add("--explain", action="store_true", help="say on stderr who owns what, and why")
    add(
        "--usage",
        type=Path,
        metavar="FILE",
        help="replicate the experts that this profile shows as hottest",
    )
    add("--record-usage", type=Path, metavar="FILE", help="add the run's choices to this profile")
    add("--memory-limit", type=float, metavar="GB", help="GiB that each node may take")


def _add_cluster(parser: Parser) -> None:
    times = Timing()
    group = parser.add_argument_group("nodes")
    add = group.add_argument
    add("-n", "--nodes", type=int, help="processes on this machine (default: 1)")
    add("--hosts", help="comma separated hosts in rank order, this machine first")
    add("--hostfile", type=Path, help="the same as a JSON file of mlx.launch")
    add(
        "--schedule",
        choices=SCHEDULES,
        default=EngineConfig().schedule,
        help="every node routes; or the first one does, and the others hold experts only",
    )
    add("--manual", action="store_true", help="start no node: zmoe-node is started by hand")
    add("--bind", metavar="ADDRESS", help="address to listen on (default: loopback, or the host's)")
    add("--starting-port", type=int, default=0, help="port of the leader; 0 is any")
    add("--python", help="interpreter on the other hosts (default: the path of this one)")
    add("--cwd", help="working directory on the other hosts")
    add("--env", action="append", default=[], metavar="K=V", help="set on the other hosts")
    add(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        default=EngineConfig().wire_dtype,
        help="of partial sums between nodes; auto: the model's; q8: 8-bit blocks, for slow links",
    )
    add("--join-timeout", type=float, default=times.join, help="seconds for nodes to come up")
    add("--load-timeout", type=float, default=times.load, help="seconds for loading")
    add("--peer-timeout", type=float, default=times.peer, help="seconds to wait for a busy peer")


def _spec(options: argparse.Namespace) -> ClusterSpec:
    from zmoe.cluster.hosts import check_env, hosts_from_file, hosts_from_names
    from zmoe.cluster.launch import RemoteOptions
    from zmoe.cluster.leader import ClusterSpec
    from zmoe.cluster.placing import PlacementRequest

    if options.hosts is not None and options.hostfile is not None:
        raise InputError("--hosts and --hostfile exclude each other")
    hosts = None
    if options.hosts is not None:
        hosts = hosts_from_names(options.hosts)
    elif options.hostfile is not None:
        hosts = hosts_from_file(options.hostfile)
    nodes = options.nodes
    if nodes is None:
        nodes = len(hosts.hosts) if hosts is not None else 1
    if not 0 <= options.starting_port < 65536:
        raise InputError(f"--starting-port is {options.starting_port}: expected 0 to 65535")
    env = tuple(check_env(setting, "--env") for setting in options.env)
    _refuse_what_does_not_apply(options, hosts, nodes)
    return ClusterSpec(
        nodes=nodes,
        hosts=hosts,
        manual=options.manual,
        bind=options.bind,
        port=options.starting_port,
        remote=RemoteOptions(options.python, options.cwd, (*(hosts.envs if hosts else ()), *env)),
        timing=Timing(options.join_timeout, options.load_timeout, options.peer_timeout),
        engine=EngineConfig(
            options.prefill_step_size,
            options.max_kv_size,
            options.compute,
            options.activations,
            options.wire_dtype,
            options.schedule,
            options.policy,
        ),
        placement=PlacementRequest(
            options.placement, options.usage, memory_limit(options.memory_limit)
        ),
        record_usage=options.record_usage is not None,
    )


def _refuse_what_does_not_apply(
    options: argparse.Namespace, hosts: HostList | None, nodes: int
) -> None:
    """Raise InputError for flags that would change nothing."""
    if options.manual and nodes == 1:
        raise InputError("--manual is for several nodes: give --nodes, --hosts or --hostfile")
    if not options.manual and hosts is not None and not all(h.is_local for h in hosts.hosts[1:]):
        return
    for flag in ("python", "cwd", "env"):
        if getattr(options, flag):
            raise InputError(f"--{flag} is for nodes on other hosts, started over ssh")


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(
        max_tokens=options.max_tokens,
        temp=options.temp,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
    )


def _prompt(options: argparse.Namespace) -> str:
    prompt = options.prompt if options.prompt_option is None else options.prompt_option
    if prompt is None:
        raise InputError("no prompt: give one, or - to read standard input")
    text = _standard_input() if prompt == "-" else _unicode("the prompt", prompt)
    if not text:
        raise InputError("the prompt is empty")
    return text


def _standard_input() -> str:
    try:
        return _unicode("standard input", sys.stdin.read())
    except OSError as error:
        raise InputError(f"standard input cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not {error.encoding} text: {error.reason}") from None


def _unicode(name: str, text: str) -> str:
    """Return `text`, or raise InputError naming `name` if it held bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8 text") from None
    return text


def _template_config(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.chat_template_config is None:
        return None
    try:
        config = json.loads(options.chat_template_config)
    except ValueError as error:
        raise InputError(f"--chat-template-config is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError("--chat-template-config: expected a JSON object")
    return config


def _generate(options: argparse.Namespace) -> None:
    sampling, prompt, template = _sampling(options), _prompt(options), _template_config(options)
    _unicode("--system-prompt", options.system_prompt or "")
    if options.record_usage is not None:
        check_writable("--record-usage", options.record_usage)
    spec = _spec(options)  # all that can be wrong without a model has been checked by now
    if spec.nodes > 1:
        warn_unencrypted(PROG, spec.address)
    from zmoe.cli import report
    from zmoe.cli.progress import Bars
    from zmoe.cluster.cluster import Cluster
    from zmoe.placement.usage import check_usage_file

    with ExitStack() as stack:
        with Bars([f"loading node {rank}" for rank in range(spec.nodes)]) as progress:
            on_placement = partial(_explain, progress) if options.explain else None
            cluster = Cluster(
                options.model,
                spec=spec,
                progress=progress,
                on_placement=on_placement,
                on_manual=partial(_ask_for_nodes, progress),
            )
            if options.record_usage is not None:
                check_usage_file(options.record_usage, cluster.info)
            stack.enter_context(cluster)
        for notice in cluster.notices:
            print(f"{PROG}: {notice}", file=sys.stderr)
        with Bars(["reading the prompt, tokens"], counted=True) as prefill:
            generation = cluster.generate(
                prompt,
                sampling,
                system_prompt=options.system_prompt,
                ignore_chat_template=options.ignore_chat_template,
                chat_template_config=template,
                on_prefill=partial(prefill, 0),
            )
            first = next(generation)
        _show(chain([first], generation), quiet=options.json)
        if generation.context_full:
            how = "" if cluster.info.has_own_cache else "; --max-kv-size goes on in a window of it"
            length = cluster.info.context_length
            print(f"{PROG}: the model's context of {length} tokens is full{how}", file=sys.stderr)
        if options.record_usage is not None:
            cluster.save_usage(options.record_usage)
        if options.stats or options.json:
            summary = report.summarize(cluster, generation)
            if options.json:
                print(json.dumps(summary), flush=True)
            if options.stats:
                report.print_stats(cluster, generation, summary)


def _explain(progress: Bars, choice: Choice) -> None:
    from zmoe.cli.explain import explanation

    progress.print(explanation(choice))


def _ask_for_nodes(progress: Bars, commands: Sequence[str]) -> None:
    progress.print("\n".join((f"{PROG}: waiting for nodes; start each on its machine:", *commands)))


def _show(tokens: Iterable[Token], quiet: bool) -> None:
    """Consume all `tokens`, and print their text as it arrives unless `quiet`."""
    for token in tokens:
        if not quiet:
            print(token.text, end="", flush=True)
    if not quiet:
        print(flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    # Its advice on long prompts and missing frameworks is not for this command's users.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _generate(options))


if __name__ == "__main__":
    sys.exit(main())
