"""Which tensors of a checkpoint a model makes use of."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmoe.models.assembly import Sanitize, Weights


def used_names(sanitize: Sanitize, weights: Weights) -> set[str]:
    """The names in `weights` that the result of `sanitize` depends on.

    Checkpoints hold more than a text model needs (image encoders, layers for
    drafting), and mlx-lm drops that when it renames the rest. Traces without
    computing. A `sanitize` that insists on values is taken to need everything.
    """
    names = list(weights)
    records: list[dict[str, Any]] = []

    def renamed(*arrays: mx.array) -> list[mx.array]:
        return list(sanitize(dict(zip(names, arrays, strict=True))).values())

    try:
        mx.export_function(records.append, renamed, *weights.values())
    except ValueError:  # an array's value was asked for; other faults return when it is run
        return set(names)
    inputs: list[str] = []
    reached: set[str] = set()
    for record in records:
        if record["type"] == "inputs":
            inputs = [entry[0] for entry in record["inputs"]]
        elif record["type"] == "outputs":
            reached.update(entry[0] for entry in record["outputs"])
        elif record["type"] == "primitive":
            reached.update(entry[0] for entry in record["inputs"])
    return {name for name, symbol in zip(names, inputs, strict=True) if symbol in reached}
