"""What a model is made of: parameters, bytes and operations, per layer.

Left out: norms, biases and position embeddings, less than 0.1% of any of the
models in `models`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

GATED_MATRICES = 3  # gate, up and down
CACHE_BYTES = 2  # an element of the attention cache: bfloat16 or float16
CACHE_LINE = 64  # bytes
PLAIN_ALIGNMENT = 64  # of slices without quantisation: whole vectors and cache lines
MOST_GROUP = 128  # weights that share a scale; fp8's larger blocks become plain when loaded


@dataclass(frozen=True)
class Format:
    """How weights are stored: `bits` a weight, and what each group of them adds.

    MLX's affine formats keep a 16 bit scale and a 16 bit bias for each group of
    64 (so 4 bits are 4.5), mxfp4 an 8 bit scale for each 32.
    """

    bits: float
    group: int = 1
    group_bits: int = 0
    label: str = ""  # of what is no weight

    @property
    def name(self) -> str:
        """As calibration calls it; what no kernel knows has a name that none has."""
        if self.label:
            return self.label
        if self.group == 1:
            return {16.0: "bf16", 32.0: "f32"}.get(float(self.bits), f"{self.bits:g} bits")
        if self.group_bits == 8:
            return f"mxfp{self.bits:g}"
        return f"affine-{self.bits:g}-g{self.group}"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + self.group_bits / self.group

    @property
    def slice_alignment(self) -> int:
        """A slice of such weights begins and ends at multiples of this."""
        return self.group if 1 < self.group <= MOST_GROUP else PLAIN_ALIGNMENT

    def bytes(self, parameters: float) -> float:
        return parameters * self.bits_per_weight / 8


BF16 = Format(16)
F32 = Format(32)
CACHE = Format(16, label="cache")
MXFP4 = Format(4, 32, 8)
FP8_BLOCKS = Format(8, 128 * 128, 32)  # DeepSeek-V3: one float32 scale for 128 x 128


def affine(bits: int, group: int = 64) -> Format:
    """MLX's affine quantisation; 16 and 32 bits are plain floats."""
    return Format(bits) if bits >= 16 else Format(bits, group, 32)


class Attention(Protocol):
    """One layer's attention, for a model of width `hidden`."""

    def parameters(self, hidden: int) -> int:
        """Weights of the projections."""
        ...

    @property
    def cache_elements(self) -> int:
        """Elements that one token keeps in the cache of one layer."""
        ...

    def attended(self, context: float, layers: int) -> float:
        """Tokens that a row looks back on, in the mean over the layers."""
        ...

    def score_operations(self, attended: float) -> float:
        """Operations of one row's scores and weighted values."""
        ...

    def sharded(self, nodes: int) -> Attention | None:
        """What each of `nodes` nodes computes of it, cut by heads; None where these do not
        divide.
        """
        ...


@dataclass(frozen=True)
class GroupedAttention:
    """Query heads that share key and value heads in groups.

    `windowed_layers` of the layers look back on `window` tokens only, and `recurrent_layers` on
    none: they keep a state.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    windowed_layers: int = 0
    recurrent_layers: int = 0

    def parameters(self, hidden: int) -> int:
        return 2 * hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def cache_elements(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    def attended(self, context: float, layers: int) -> float:
        short = min(context, self.window) * self.windowed_layers
        whole = layers - self.windowed_layers - self.recurrent_layers
        return (context * whole + short) / layers

    def score_operations(self, attended: float) -> float:
        return 4 * self.heads * self.head_dim * attended

    def sharded(self, nodes: int) -> GroupedAttention | None:
        if self.heads % nodes or self.kv_heads % nodes:
            return None
        return replace(self, heads=self.heads // nodes, kv_heads=self.kv_heads // nodes)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values are kept as one latent vector of `kv_rank`, and `rope_dim`
    elements of position. The projections out of the latent are taken into query
    and output, so that scores are computed in the latent space. `query_rank` 0:
    queries are not compressed.
    """

    heads: int
    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def parameters(self, hidden: int) -> int:
        rank, query = self.query_rank, self.heads * (self.nope_dim + self.rope_dim)
        down_up = rank * (hidden + query) if rank else hidden * query
        latent = hidden * (self.kv_rank + self.rope_dim)
        out_of_latent = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return down_up + latent + out_of_latent + self.heads * self.value_dim * hidden

    @property
    def cache_elements(self) -> int:
        return self.kv_rank + self.rope_dim

    def attended(self, context: float, layers: int) -> float:
        return context

    def score_operations(self, attended: float) -> float:
        return 2 * self.heads * (2 * self.kv_rank + self.rope_dim) * attended

    def sharded(self, nodes: int) -> LatentAttention | None:
        """The projections into the latent space, and its cache, remain on every node."""
        return None if self.heads % nodes else replace(self, heads=self.heads // nodes)


def delta_state_bytes(
    key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int
) -> int:
    """What a gated delta net (Yang et al., arXiv 2412.06464) keeps of a sequence: the last rows
    that its convolution of so many `taps` sees, as elements of a cache, and a float32 matrix per
    head. Each of the two begins at a cache line.
    """
    row = 2 * key_heads * key_dim + value_heads * value_dim
    parts = (taps - 1) * row * CACHE_BYTES, value_heads * value_dim * key_dim * 4
    return sum(-(-part // CACHE_LINE) * CACHE_LINE for part in parts)


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose layers hold experts, but for `dense_layers` of them.

    `expert_hidden`: the expert's inner width, of which slices begin and end at
    multiples of `slice_alignment` (0: it has none). `expert_matrices`: how many
    of hidden x expert_hidden weights an expert has. `shared_hidden`: the inner
    width of all shared experts together, 0 for none. `dense_hidden`: that of
    the layers without experts. `tied`: the output head is the embedding.
    `dense_format` is everything's format but the routed experts'. `state_bytes`: what all
    recurrent layers together keep of a sequence.
    """

    name: str
    hidden: int
    layers: int
    attention: Attention
    experts: int
    top_k: int
    expert_hidden: int
    vocabulary: int
    dense_layers: int = 0
    dense_hidden: int = 0
    shared_hidden: int = 0
    tied: bool = False
    dense_format: Format = BF16
    expert_format: Format = BF16
    expert_matrices: float = GATED_MATRICES
    slice_alignment: int = PLAIN_ALIGNMENT
    state_bytes: int = 0

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.attention.parameters(self.hidden)

    @property
    def router_parameters(self) -> int:
        """Of one layer."""
        return self.hidden * self.experts

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer."""
        return round(self.expert_matrices * self.hidden * self.expert_hidden)

    @property
    def shared_parameters(self) -> int:
        """Of one layer's shared experts."""
        return GATED_MATRICES * self.hidden * self.shared_hidden

    @property
    def dense_mlp_parameters(self) -> int:
        """Of one layer without experts, attention apart."""
        return GATED_MATRICES * self.hidden * self.dense_hidden

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Everything but the routed experts: what each decentralised node holds."""
        moe = self.moe_layers * (self.router_parameters + self.shared_parameters)
        return (
            self.layers * self.attention_parameters
            + moe
            + self.dense_layers * self.dense_mlp_parameters
            + self.head_parameters * (1 if self.tied else 2)
        )

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.moe_layers * self.experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token's matmuls read: of the input embedding it takes one row only."""
        looked_up = 0 if self.tied else self.head_parameters
        chosen = self.moe_layers * self.top_k * self.expert_parameters
        return self.dense_parameters - looked_up + chosen

    def with_format(self, weights: Format) -> ModelShape:
        """The same model with all weights stored as `weights`."""
        step = weights.slice_alignment
        return replace(self, dense_format=weights, expert_format=weights, slice_alignment=step)

    @property
    def dense_bytes(self) -> float:
        return self.dense_format.bytes(self.dense_parameters)

    @property
    def expert_bytes(self) -> float:
        """Of one expert of one layer."""
        return self.expert_format.bytes(self.expert_parameters)

    def cache_bytes(self, context: float) -> float:
        """Of one sequence's keys and values in all layers, `context` tokens long."""
        kept = self.attention.attended(context, self.layers)
        return self.layers * kept * self.attention.cache_elements * CACHE_BYTES
