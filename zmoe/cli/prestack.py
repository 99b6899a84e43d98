"""zmoe-prestack: write a model as a store, of which a node reads only its own experts' pages."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zmoe.cli.common import Parser, run_command
from zmoe.config import QUANTIZATIONS
from zmoe.errors import InputError

if TYPE_CHECKING:
    from zmoe.checkpoint.manifest import Manifest
    from zmoe.store.writer import Quantization

PROG = "zmoe-prestack"
_DEFAULTS = {"affine": (4, 64)}  # as mlx_lm.convert; other modes have one format


def _parser() -> Parser:
    parser = Parser(PROG, "Write a model as a store, of which a node reads only its own experts.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="Checkpoint folder, prestacked store, or Hugging Face name")
    add("out", metavar="OUT", type=Path, nargs="?", help="Folder to write, for zmoe-run --model")
    add("--verify", action="store_true", help="Compare the store (OUT or MODEL) with its checksums")
    add = parser.add_argument_group("quantisation, as by mlx_lm.convert -q").add_argument
    add(
        "--bits",
        type=int,
        metavar="N",
        help="Bits per weight (default: 4, or the only value of the mode)",
    )
    add(
        "--group-size",
        type=int,
        metavar="G",
        help="Weights that share a scale (default: 64, or the only value of the mode)",
    )
    add("--mode", choices=QUANTIZATIONS, help="Format of the quantised weights (default: affine)")
    return parser


def quantization_of(options: argparse.Namespace) -> Quantization | None:
    """Return the quantisation that the flags ask for, or None. Raises InputError naming a flag."""
    if options.bits is options.group_size is options.mode is None:
        return None
    mode = options.mode or "affine"
    known_bits, known_groups = QUANTIZATIONS[mode]
    bits, group = _DEFAULTS.get(mode, (known_bits[0], known_groups[0]))
    bits = bits if options.bits is None else options.bits
    group = group if options.group_size is None else options.group_size
    for flag, value, known in (("--bits", bits, known_bits), ("--group-size", group, known_groups)):
        if value not in known:
            expected = " or ".join(map(str, known))
            raise InputError(f"{flag} is {value}: expected {expected} in mode {mode}")
    from zmoe.store.writer import Quantization

    return Quantization(mode, bits, group)


def _run(options: argparse.Namespace) -> None:
    quantization = quantization_of(options)
    if options.out is None and (quantization is not None or not options.verify):
        raise InputError(f"no OUT: name the folder to write (see {PROG} --help)")
    from zmoe.checkpoint.hub import resolve_model
    from zmoe.checkpoint.verify import changed_files, verify
    from zmoe.cli.progress import Bars
    from zmoe.loading import Skeleton, describe
    from zmoe.store.writer import prestack

    store = resolve_model(options.model, "MODEL")
    if options.out is not None:
        with Bars(["writing"]) as bars:
            skeleton, store = Skeleton(store), options.out.expanduser()
            info = describe(skeleton)
            manifest = prestack(info, store, quantization, lambda *sizes: bars(0, *sizes), skeleton)
    if options.verify:
        with Bars(["comparing"]) as bars:
            manifest = verify(store, lambda *sizes: bars(0, *sizes))
    _say(manifest, "every checksum matches" if options.verify else "complete")
    if options.verify and changed_files(manifest):
        print(
            f"{PROG}: warning: {manifest.folder} cannot be written, so this is not recorded, and "
            "every run goes on to compare its share; verify the store once where it can be written",
            file=sys.stderr,
        )


def _say(manifest: Manifest, what: str) -> None:
    ranges = sum(len(file.ranges) for file in manifest.files)
    size = f"{manifest.nbytes / 1e9:.2f} GB in {len(manifest.files)} files, {ranges} ranges"
    print(f"{manifest.folder}: {size}: {what}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as in zmoe-run
    options = _parser().parse_args(argv)
    return run_command(PROG, options.debug, lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
