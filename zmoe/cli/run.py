"""zmoe-run: generate text with a model whose experts are spread over several nodes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from zmoe import __version__
from zmoe.cli.cluster import add_cluster, cluster_spec
from zmoe.cli.common import (
    Parser,
    add_settings,
    check_writable,
    given_settings,
    run_command,
    template_config,
    warn_unencrypted,
)
from zmoe.config import DEFAULT_MODEL, Batching, EngineConfig, Sampling
from zmoe.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zmoe.cli.progress import Bars
    from zmoe.cluster.cluster import Cluster
    from zmoe.cluster.journal import Journal, Journaled
    from zmoe.cluster.spec import ClusterSpec
    from zmoe.engine.generate import Generation, Token
    from zmoe.placement.choose import Choice

PROG = "zmoe-run"
_PROMPT_FLAGS = ("system_prompt", "ignore_chat_template", "chat_template_config")
_EXPLAIN_HELP = "Print who owns which experts, and why, to stderr"
_RECORD_HELP = "Add the run's selections to a profile"
_JOURNAL_HELP = "Write the tokens into a new file, from which --resume goes on after a crash"
_RESUME_HELP = "Go on with the text of a journal, and with its prompt and settings"


def _parser() -> Parser:
    parser = Parser(PROG, "Generate text with a model whose experts are spread over several nodes.")
    add = parser.add_argument
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="Text to continue or answer; - reads from stdin"
    )
    text.add_argument(
        "-p", "--prompt", dest="prompt_option", metavar="TEXT", help="The prompt, given as a flag"
    )
    add("--version", action="version", version=f"zmoe {__version__}", help="Print the version")
    add("--model", default=DEFAULT_MODEL, help="Checkpoint folder, store, or Hugging Face name")
    to_text = parser.add_argument_group("generation").add_argument
    add_settings(to_text, Sampling)
    to_text("--system-prompt", help="System message for the chat template")
    to_text("--ignore-chat-template", action="store_true", help="Do not apply the chat template")
    to_text("--chat-template-config", metavar="JSON", help="More arguments of the chat template")
    add_settings(to_text, EngineConfig, "prefill_chunk", "max_kv_size", "kv_bits")
    add_settings(to_text, Batching, "speculate")
    to_placement = add_cluster(parser)
    to_placement("--explain", action="store_true", help=_EXPLAIN_HELP)
    to_placement("--record-usage", type=Path, metavar="FILE", help=_RECORD_HELP)
    add(
        "--prompt-cache-file",
        type=Path,
        metavar="FILE",
        help="Begin with the keys and values of this file, or write the prompt's into it",
    )
    to_journal = parser.add_mutually_exclusive_group().add_argument
    to_journal("--journal", type=Path, metavar="FILE", help=_JOURNAL_HELP)
    to_journal("--resume", type=Path, metavar="FILE", help=_RESUME_HELP)
    add("--stats", action="store_true", help="Print a table of times and memory to stderr")
    add("--json", action="store_true", help="Print one JSON object instead of the text")
    return parser


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


def _check_resume(options: argparse.Namespace) -> None:
    """Raise InputError for what --resume takes from the journal."""
    given = list(given_settings(options, Sampling))
    given += [name for name in _PROMPT_FLAGS if getattr(options, name)]
    if options.prompt is not None or options.prompt_option is not None:
        given.append("prompt")
    if given:
        raise InputError(
            f"--resume {options.resume} has a prompt and settings of its own: leave out "
            f"--{given[0].replace('_', '-')}"
        )


def _generate(options: argparse.Namespace) -> None:
    sampling, prompt = Sampling(**given_settings(options, Sampling)), ""
    if options.resume is not None:
        _check_resume(options)
    else:
        prompt = _prompt(options)
    template = template_config(options.chat_template_config)
    _unicode("--system-prompt", options.system_prompt or "")
    _check_files(options)
    spec = cluster_spec(options, parallel=1, record_usage=options.record_usage is not None)
    # All that can be wrong without a model has been checked by now.
    if spec.nodes > 1:
        warn_unencrypted(PROG, spec.address, spec.insecure)
    from zmoe.cli.progress import Bars

    with ExitStack() as stack:
        cluster, journaled = _enter(stack, options, spec)
        with Bars(["reading the prompt, tokens"], counted=True) as prefill:
            on_prefill = partial(prefill, 0)
            if journaled is not None:
                generation = cluster.generate(
                    journaled.prompt,
                    journaled.sampling,
                    generated=journaled.tokens,
                    on_prefill=on_prefill,
                )
            else:
                generation = cluster.generate(
                    prompt,
                    sampling,
                    system_prompt=options.system_prompt,
                    ignore_chat_template=options.ignore_chat_template,
                    chat_template_config=template,
                    on_prefill=on_prefill,
                )
            journal = _journal(options, cluster, generation, journaled, sampling)
            if journal is not None:
                stack.enter_context(journal)
            tokens = generation if journal is None else journal.write(generation)
            before, first = generation.text, next(tokens)
        saved = options.prompt_cache_file
        if saved is not None and not saved.exists():
            _save_prompt(cluster, saved, generation.prompt)
        _show(before, chain([first], tokens), quiet=options.json)
        _report(options, cluster, generation)


def _check_files(options: argparse.Namespace) -> None:
    """That all that is written at the end can be, before anything is computed."""
    if options.journal is not None and options.journal.exists():
        raise InputError(f"--journal {options.journal} exists: --resume goes on with it")
    for flag in ("record_usage", "prompt_cache_file", "journal"):
        path = getattr(options, flag)
        if path is not None:
            check_writable(f"--{flag.replace('_', '-')}", path)


def _report(options: argparse.Namespace, cluster: Cluster, generation: Generation) -> None:
    """What comes after the text."""
    from zmoe.cli import report

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


def _enter(
    stack: ExitStack, options: argparse.Namespace, spec: ClusterSpec
) -> tuple[Cluster, Journaled | None]:
    """The cluster, running until `stack` ends, and what --resume has found."""
    from zmoe.cli.progress import Bars
    from zmoe.cli.report import listeners
    from zmoe.cluster.cluster import Cluster
    from zmoe.cluster.journal import read_journal
    from zmoe.cluster.launch import ask_for_nodes
    from zmoe.cluster.prompt_cache import read_prompt_cache
    from zmoe.placement.usage import check_usage_file

    saved, journaled = options.prompt_cache_file, None
    with Bars([f"loading node {rank}" for rank in range(spec.nodes)]) as progress:
        cluster = Cluster(
            options.model,
            spec=spec,
            progress=progress,
            on_placement=partial(_explain, progress, spec) if options.explain else None,
            on_manual=lambda lines: progress.print(f"{PROG}: {ask_for_nodes(lines)}"),
            on_notice=lambda line: print(f"{PROG}: {line}", file=sys.stderr),
        )
        # All files are looked at before the model is loaded.
        if options.record_usage is not None:
            check_usage_file(options.record_usage, cluster.info)
        if options.resume is not None:
            journaled = read_journal(options.resume, cluster.info, spec.engine)
        loads = saved is not None and saved.exists()
        if loads:
            read_prompt_cache(saved, cluster.info, spec.engine)
        stack.enter_context(cluster)
        if options.explain:
            progress.print(listeners(cluster))
        if loads:
            cluster.load_prompt_cache(saved)
        elif saved is not None:
            cluster.save_prompt_cache(saved, [])  # which raises where it cannot be done
    for notice in cluster.notices:
        print(f"{PROG}: {notice}", file=sys.stderr)
    return cluster, journaled


def _journal(
    options: argparse.Namespace,
    cluster: Cluster,
    generation: Generation,
    journaled: Journaled | None,
    sampling: Sampling,
) -> Journal | None:
    """What the tokens are to be written into, if anything."""
    from zmoe.cluster.journal import Journal

    if journaled is not None:
        return Journal.go_on(options.resume, journaled)
    if options.journal is None:
        return None
    sampling = replace(sampling, seed=generation.seed)
    engine = cluster.spec.engine
    return Journal.begin(options.journal, cluster.info, engine, generation.prompt, sampling)


def _save_prompt(cluster: Cluster, file: Path, prompt: Sequence[int]) -> None:
    if not cluster.save_prompt_cache(file, prompt):
        print(
            f"{PROG}: {file} was not written: the prompt has {len(prompt)} tokens, too few for a "
            "prompt cache",
            file=sys.stderr,
        )


def _explain(progress: Bars, spec: ClusterSpec, choice: Choice) -> None:
    from zmoe.cli.report import explanation

    progress.print(explanation(choice, spec.engine.attention))


def _show(before: str, tokens: Iterable[Token], quiet: bool) -> None:
    """Consume all `tokens`, and print the text `before` and theirs as it arrives unless `quiet`."""
    if not quiet:
        print(before, end="", flush=True)
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
