"""What runs a plan on one node, whatever its caches are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.batch.plan import Plan

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]


class CachesEmptied(Exception):
    """A step was not run: all nodes have dropped what they kept of all sequences, which are to be
    prefilled again.
    """


class SteppedReducer(Protocol):
    """A reducer whose frames, if there are other nodes, carry the number of the step and the
    digest of its plan.
    """

    nodes: int
    step: int
    plan: int


class Graph(Protocol):
    """A model whose exchanges are operations of MLX's graph."""

    def begin(self, step: int, plan: int, rows: int) -> None:
        """Before a pass of so many rows; `plan` is the digest of the step's plan."""
        ...

    def tell(self, tokens: mx.array) -> tuple[mx.array, mx.array, list[mx.array]]:
        """After a pass, with as many `tokens` (sequences,), uint32, on all nodes: those of rank 0,
        what check() takes, and what repeat() takes. Who evaluates the second evaluates all
        exchanges of the pass.
        """
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Around whatever may wait for an exchange."""
        ...

    def check(self, step: int, told: npt.NDArray[np.uint32]) -> None:
        """After the evaluation of a pass: raises what its exchanges failed with."""
        ...

    def repeat(self, sums: Sequence[mx.array]) -> bool:
        """After check() has raised, and passes begun later have been evaluated: begin the pass
        anew. False where no repetition would help.
        """
        ...

    def begin_again(self, rows: int) -> None:
        """As begin(), of a pass that was begun after one that is repeated."""
        ...


class LogitRows(Protocol):
    """The model's last matmul: after which rows of the next pass it computes logits.

    None: after the last one of each sequence.
    """

    rows: Rows | None


class Engine(Protocol):
    """A model and its caches of many sequences, in lock-step with the other ranks.

    `paged`: whether the caches are blocks, which a plan deals out. `can_batch`: whether several
    sequences may run in a step; `can_trim`: whether a sequence may go back. `plans_ahead`: whether
    it is an MlxEngine that begins a step before the last one has ended. `block_bytes`: the
    bytes of a block of keys and values in all layers, known from the first step on.
    `state_bytes`: what recurrent layers keep of a sequence beside blocks.
    """

    paged: bool
    plans_ahead: bool
    can_batch: bool
    can_trim: bool
    state_bytes: int

    @property
    def block_bytes(self) -> int: ...

    def make_cache(self, blocks: int) -> None:
        """Have room for `blocks` blocks in every layer, and forget all sequences.

        Raises ZmoeError where the caches are not paged.
        """
        ...

    def run(self, plan: Plan, logits: bool = True) -> Floats | None:
        """Run a step that zmoe.batch.plan.check() has passed.

        Returns the wanted logits (rows, vocabulary), in the rows' order, evaluated and the
        caller's to keep; None without any, and for a node that needs no `logits`.
        Raises ZmoeError for a plan that does not go with the sequences that this
        node holds, having changed nothing; and what the reducer raises.
        """
        ...
