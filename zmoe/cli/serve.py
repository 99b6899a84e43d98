"""zmoe-serve: an HTTP server over a cluster."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from zmoe import __version__
from zmoe.cli.cluster import add_cluster, cluster_spec
from zmoe.cli.common import Parser, add_settings, given_settings, run_command, warn_unencrypted
from zmoe.cli.progress import Bars
from zmoe.config import DEFAULT_MODEL, Batching, EngineConfig
from zmoe.errors import InputError

PROG = "zmoe-serve"
KEEP_ALIVE_S = 60.0  # within which a new engine has started, after pauses of up to 30 s


def _parser() -> Parser:
    parser = Parser(PROG, "Serve a model whose experts are spread over several nodes, over HTTP.")
    add = parser.add_argument
    add("--version", action="version", version=f"zmoe {__version__}", help="Print the version")
    add("--model", default=DEFAULT_MODEL, help="Checkpoint folder, store, or Hugging Face name")
    to_serving = parser.add_argument_group("serving").add_argument
    _add_serving(to_serving)
    add_settings(to_serving, EngineConfig, "parallel")
    add_settings(to_serving, Batching)
    add_settings(to_serving, EngineConfig, "prefill_chunk", "max_kv_size", "kv_bits")
    add_cluster(parser)
    return parser


def _add_serving(add: Callable[..., Any]) -> None:
    try:
        from zmoe.server.front import ServeConfig
    except ImportError as error:
        raise InputError(
            f"{PROG} needs the extra of that name ({error.name} is missing): "
            "pip install 'zmoe[serve]'"
        ) from None
    add_settings(add, ServeConfig)


class _Teller:
    """A Watcher that shows progress bars, then says where the server is."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def loading(self, rank: int, done: int, total: int) -> None:
        self._bars(rank, done, total)

    def notice(self, line: str) -> None:
        self._bars.print(f"{PROG}: {line}")

    def ready(self, address: str) -> None:
        self._bars.__exit__()
        print(f"{PROG}: ready at {address}", flush=True)


def _serve(options: argparse.Namespace) -> None:
    from zmoe.server.front import ServeConfig
    from zmoe.server.run import serve

    config = ServeConfig(**given_settings(options, ServeConfig))
    spec = cluster_spec(options, keep_alive=KEEP_ALIVE_S)
    if spec.nodes > 1:
        warn_unencrypted(PROG, spec.address, spec.insecure)
    with Bars([f"loading node {rank}" for rank in range(spec.nodes)]) as bars:
        serve(options.model, spec, config, _Teller(bars))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        options = _parser().parse_args(argv)
    except InputError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return error.exit_code
    return run_command(PROG, options.debug, lambda: _serve(options))


if __name__ == "__main__":
    sys.exit(main())
