"""Loss of a text under zmoe on one node. Prints one JSON object.

Windows of the text are scored one after the other, without context carried
over, each token once: the measure of zmoe-tiny's model card.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from process import BAD_INPUT, PeerFailure, count, main
from zmoe_cluster import add_settings, engine_config

from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.node import Node
from zmoe.config import Timing
from zmoe.engine.prompt import open_tokenizer
from zmoe.errors import ZmoeError
from zmoe.loading import Skeleton, describe
from zmoe.placement.build import place_evenly

Logits = Callable[[Sequence[int]], mx.array]  # of a window: (tokens,) -> (tokens, vocabulary)


def batched(model: Callable[[mx.array], mx.array]) -> Logits:
    """A window as one step, as a prompt is run."""
    return lambda window: model(mx.array([list(window)]))[0]


def stepped(node: Node) -> Logits:
    """A window token by token, as decoding runs."""

    def logits(window: Sequence[int]) -> mx.array:
        return mx.array(np.stack([step([token], at == 0) for at, token in enumerate(window)]))

    return logits


def nats(logits: Logits, ids: Sequence[int], context: int) -> float:
    """Sum over all tokens but the first."""
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        rows = logits(window[:-1]).astype(mx.float32)
        chosen = mx.take_along_axis(rows, mx.array(list(window[1:]))[:, None], axis=-1)[:, 0]
        total += float((mx.logsumexp(rows, axis=-1) - chosen).sum())
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
    node = Node(info, engine_config(options), Timing())
    try:
        node.place(place_evenly(info.shape, 1))
        shard, _ = node.load(lambda done, total: None)
        # The kernels compute the last row's logits only, so there each token is a step.
        by_step = options.step_by_step or options.compute != "mlx"
        logits = stepped(node) if by_step else batched(shard.model)
        total = nats(logits, ids, options.context)
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
    made.add_argument("--step-by-step", action="store_true", help="token by token, also with mlx")
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
