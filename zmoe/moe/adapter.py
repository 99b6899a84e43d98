"""What a model family tells zmoe about its MoE block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

# mlx-lm's blocks share no base class; an adapter knows the one it is for.
Block = Any


class Routing(NamedTuple):
    """Where a block sends its tokens.

    `x` (..., hidden_size): what the experts see. `ids` (..., k): the chosen experts;
    an id outside [0, experts) is computed by nobody. `weights` (..., k).
    """

    x: mx.array
    ids: mx.array
    weights: mx.array


def no_shared(block: Block, x: mx.array, routing: Routing) -> mx.array | None:
    """For blocks that compute nothing beside their routed experts."""
    return None


def add_shared(block: Block, x: mx.array, routed: mx.array, shared: mx.array | None) -> mx.array:
    """The block's output when the shared part is simply added."""
    return routed if shared is None else routed + shared


@dataclass(frozen=True)
class Adapter:
    """A block taken apart around its routed experts.

    With y_e(x) for expert e, the block's output must equal
    `finish(block, x, sum over k of weights * per_expert(switch, y_ids(xe)), shared(...))`.
    `route` gets what the block is called with; `switch` is the path of the
    SwitchGLU or SwitchMLP in the block, all that a node needs which holds
    experts only. What `shared` returns is computed
    while the sum over the nodes is under way. With `skips_ids`, `route` may return ids outside
    of the experts.
    """

    route: Callable[..., Routing]
    switch: str = "switch_mlp"
    shared: Callable[[Block, mx.array, Routing], mx.array | None] = no_shared
    finish: Callable[[Block, mx.array, mx.array, Any], mx.array] = add_shared
    per_expert: Callable[[Block, mx.array], mx.array] | None = None
    skips_ids: bool = False

    @property
    def has_shared(self) -> bool:
        """Whether something may be computed beside the routed experts."""
        return self.shared is not no_shared

    @property
    def only_adds(self) -> bool:
        """Whether the block's output is the weighted sum plus what is shared."""
        return self.finish is add_shared and self.per_expert is None


def bound_hook(adapter: Adapter | None, switch: Block) -> Callable[[mx.array], mx.array] | None:
    """What each expert's output of `switch` still goes through, if anything."""
    if adapter is None or adapter.per_expert is None:
        return None
    return functools.partial(adapter.per_expert, switch)
