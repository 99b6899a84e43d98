"""zmoe-keys: the keys of nodes that are started by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zmoe.cli.common import Parser, run_command
from zmoe.exchange.keys import read_key, write_new_key

PROG = "zmoe-keys"


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Make the key that encrypts the links of nodes which are started by hand, or show its "
        "public half. Every machine of a cluster needs a copy of the file.",
    )
    parser.add_argument(
        "action", choices=("new", "show"), help="Make a file, or read one; prints the public key"
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="File of the secret key")
    return parser


def _run(options: argparse.Namespace) -> None:
    pair = write_new_key(options.file) if options.action == "new" else read_key(options.file)
    print(pair.public)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
