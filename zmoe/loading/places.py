"""Where in a checkpoint's files the arrays of a model lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from zmoe.checkpoint.select import Piece

Weights = dict[str, mx.array]
Sanitize = Callable[[Weights], Weights]  # mlx-lm's word: rename and stack a checkpoint's tensors

_tracing = threading.Lock()


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the checkpoint's files, its padding apart.

    In one piece, or `stacked` of one piece for each index of its first axis.
    """

    pieces: tuple[Piece, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0]
        if self.stacked:
            return (len(self.pieces), *first.shape)
        return (first.shape[0] - first.padding, *first.shape[1:]) if first.shape else ()

    @property
    def can_be_mapped(self) -> bool:
        """Whether every piece is one run of bytes."""
        runs = [list(piece.runs()) for piece in self.pieces]
        return bool(runs) and all(len(run) == 1 and run[0][1] > 0 for run in runs)

    def taken_apart(self) -> Place:
        """The same tensor, stacked."""
        if self.stacked:
            return self
        piece = self.pieces[0]
        rows = (row for first, count in piece.rows for row in range(first, first + count))
        shape = piece.shape[1:]
        apart = (Piece(piece.name, piece.source, shape, ((row, 1),)) for row in rows)
        return Place(tuple(apart), stacked=True)


def trace(
    sanitize: Sanitize, arrays: Weights, pieces: Sequence[Piece]
) -> tuple[Weights, dict[str, Place]]:
    """What `sanitize` makes of `arrays`, one for each piece, and where in the
    checkpoint those of the results lie that it only renamed or stacked.
    """
    whose = {id(arrays[piece.name]): piece for piece in pieces}
    with _noted_stacks() as stacks:
        result = sanitize(dict(arrays))
    places = {}
    for name, array in result.items():
        _, parts = stacks.get(id(array), (None, []))
        if id(array) in whose:
            places[name] = Place((whose[id(array)],))
        elif parts and all(id(part) in whose for part in parts):
            own = (whose[id(part)] for part in parts)
            places[name] = Place(tuple(piece for piece in own if piece.nbytes), stacked=True)
    return result, places


@contextmanager
def _noted_stacks() -> Iterator[dict[int, tuple[mx.array, list[mx.array]]]]:
    """Meanwhile, every result of mx.stack along the first axis and its parts, by id.

    MLX does not say what a lazy array is made of, and mlx-lm's families all
    call this function by this name. A call that is missed costs a copy only.
    """
    noted: dict[int, tuple[mx.array, list[mx.array]]] = {}

    def noting(arrays: list[mx.array], axis: int = 0, **more: Any) -> mx.array:
        result: mx.array = stack(arrays, axis, **more)
        if axis == 0:
            noted[id(result)] = (result, list(arrays))
        return result

    with _tracing:
        stack: Any = mx.stack
        setattr(mx, "stack", noting)  # noqa: B010
        try:
            yield noted
        finally:
            setattr(mx, "stack", stack)  # noqa: B010
