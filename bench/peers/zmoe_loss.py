"""Loss of a text under zmoe on one node. Prints one JSON object.

Windows of the text are scored one after the other, without context carried
over, each token once: the measure of zmoe-tiny's model card.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from process import BAD_INPUT, PeerFailure, count, main
from zmoe_cluster import add_settings, engine_config

from zmoe.batch.plan import Plan, Span, blocks_of
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.node import Node
from zmoe.config import Timing
from zmoe.engine.prompt import open_tokenizer
from zmoe.errors import ZmoeError
from zmoe.loading import Skeleton, describe
from zmoe.placement.build import place_evenly

Logits = Callable[[Sequence[int]], np.ndarray]  # of a window: (tokens,) -> (tokens, vocabulary)


def windows(node: Node, chunk: int) -> Logits:
    """A window as steps of `chunk` tokens, with logits after each of them."""
    sequences = itertools.count(1)
    steps = itertools.count(1)

    def logits(window: Sequence[int]) -> np.ndarray:
        sequence, rows = next(sequences), []
        for start in range(0, len(window), chunk):
            tokens = tuple(window[start : start + chunk])
            end = start + len(tokens)
            blocks = range(blocks_of(start), blocks_of(end)) if node.engine.paged else ()
            span = Span(sequence, start, len(tokens), len(tokens))
            free = (sequence - 1,) if sequence > 1 and start == 0 else ()
            rows.append(node.run(Plan(next(steps), (span,), tokens, tuple(blocks), free)))
        return np.concatenate(rows)

    return logits


def nats(logits: Logits, ids: Sequence[int], context: int) -> float:
    """Sum over all tokens but the first."""
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        rows = logits(window[:-1]).astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(rows, np.array(window[1:])[:, None], axis=-1)[:, 0]
        total += float((np.log(np.exp(rows).sum(axis=-1)) - chosen).sum())
    return total


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The loss per token and per character."""
    folder = resolve_model(options.model)
    tokenizer, text = open_tokenizer(folder), options.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if options.tokens:
        ids = ids[: options.tokens]
        text = tokenizer.decode(ids)
    if len(ids) < 2:
        raise PeerFailure("the text has fewer than 2 tokens: nothing to predict")
    info = describe(Skeleton(folder))
    engine = replace(engine_config(options), kv_bits=options.kv_bits)
    node = Node(info, engine, Timing())
    try:
        node.place(place_evenly(info.shape, 1))
        node.load(lambda done, total: None)
        if node.engine.paged:
            node.make_cache(blocks_of(options.context))
        chunk = 1 if options.step_by_step else engine.prefill_chunk
        total = nats(windows(node, chunk), ids, options.context)
    finally:
        node.close()
    scored = len(ids) - 1
    return {
        "tokens": scored,
        "nats_per_token": total / scored,
        "perplexity": math.exp(total / scored) if total / scored < 700 else math.inf,
        "bits_per_char": total / math.log(2) / len(text),
    }


def program() -> dict[str, Any]:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("model", help="folder or name")
    made.add_argument("text", type=Path, help="UTF-8 text to score, all of it")
    made.add_argument("--context", type=int, default=256, help="tokens of a window; default 256")
    made.add_argument("--tokens", type=count, default=0, help="score only so many; 0 is all")
    made.add_argument("--step-by-step", action="store_true", help="token by token")
    made.add_argument("--kv-bits", type=int, help="zmoe-run's; default: its default")
    add_settings(made)
    options = made.parse_args()
    if options.context < 1:
        made.error("--context must be at least 1")
    try:
        return measure(options)
    except ZmoeError as error:
        raise PeerFailure(str(error), error.exit_code) from None
    except (OSError, UnicodeError) as error:
        raise PeerFailure(str(error), BAD_INPUT) from None


if __name__ == "__main__":
    main(program)
