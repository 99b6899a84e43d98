"""Which tensors of a checkpoint a model makes no use of."""

from __future__ import annotations

from collections import defaultdict

from zmoe.loading.places import Sanitize, Weights


def unused_names(sanitize: Sanitize, weights: Weights) -> set[str]:
    """Names of whole parts of the checkpoint that `sanitize` drops.

    Checkpoints hold more than a text model needs (image encoders, layers for
    drafting). A part is what names have in common up to their first number,
    or a module outside the layers. It is in use if any of its arrays comes out
    as it went in, or if the result has other names without it.
    """
    result = sanitize(dict(weights))
    survivors = {id(array) for array in result.values()}
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for name in weights:
        parts[_part_of(name)].add(name)

    def is_idle(names: set[str]) -> bool:
        rest = {name: array for name, array in weights.items() if name not in names}
        try:
            return sanitize(rest).keys() == result.keys()
        except Exception:  # whatever it raises, it cannot do without them
            return False

    suspects = [
        names
        for names in parts.values()
        if not any(id(weights[name]) in survivors for name in names)
    ]
    together: set[str] = set().union(*suspects)
    if not together or is_idle(together):
        return together
    return set().union(*(names for names in suspects if is_idle(names)))


def _part_of(name: str) -> str:
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: place + 1])
    return ".".join(words[:-1])
