"""What a block computes beside and after its routed experts.

The functions are an Adapter's `shared`, `finish` and `per_expert`: their
arguments and results are (..., hidden_size), unless the experts are narrower.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from zmoe.moe.adapter import Block, Routing, add_shared

# ---- beside: shared experts ----------------------------------------------------------


def shared_module(name: str) -> Callable[[Block, mx.array, Routing], mx.array | None]:
    """The output of the block's submodule `name`, where the checkpoint has it."""

    def shared(block: Block, x: mx.array, routing: Routing) -> mx.array | None:
        module = getattr(block, name, None)
        return None if module is None else module(x)

    return shared


shared_experts = shared_module("shared_experts")


def gated_shared_expert(block: Block, x: mx.array, routing: Routing) -> mx.array:
    """The output of `shared_expert`, times its own gate's."""
    output: mx.array = mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return output


def shared_mlp(block: Block, x: mx.array, routing: Routing) -> mx.array | None:
    return block.shared_mlp(x) if block.use_shared_mlp else None


def longcat_identities(block: Block, x: mx.array, routing: Routing) -> mx.array:
    """Ids from `n_routed_experts` on are identities, which every node adds by itself."""
    null = routing.ids >= block.n_routed_experts
    return x * mx.where(null, routing.weights, 0.0).sum(axis=-1, keepdims=True)


def deepseek_v41_shared(block: Block, x: mx.array, routing: Routing) -> mx.array:
    output: mx.array = block.shared_experts(x).astype(mx.float32)
    return output


# ---- after: the block's output -------------------------------------------------------


def klear_finish(block: Block, x: mx.array, routed: mx.array, shared: mx.array) -> mx.array:
    mix = mx.softmax(block.coefficient(x), axis=-1, precise=True)
    return routed * mix[..., :1] + shared * mix[..., 1:]


def nemotron_finish(
    block: Block, x: mx.array, routed: mx.array, shared: mx.array | None
) -> mx.array:
    if block.moe_latent_size is not None:
        routed = block.fc2_latent_proj(routed)
    return add_shared(block, x, routed, shared)


def kimi_k3_finish(
    block: Block, x: mx.array, routed: mx.array, shared: mx.array | None
) -> mx.array:
    if block.routed_expert_norm is not None:
        routed = block.routed_expert_norm(routed)
    if block.latent_size is not None:
        routed = block.routed_expert_up_proj(routed)
    return add_shared(block, x, routed, shared)


def muse_norm(switch: Block, y: mx.array) -> mx.array:
    normed: mx.array = switch.post_expert_norm(y)
    return normed


def muse_finish(block: Block, x: mx.array, routed: mx.array, shared: mx.array | None) -> mx.array:
    output: mx.array = block.post_expert_proj(routed)
    return output


def deepseek_v41_finish(block: Block, x: mx.array, routed: mx.array, shared: mx.array) -> mx.array:
    return (routed.astype(mx.float32) + shared).astype(x.dtype)
