"""The DBRX architecture in PyTorch, small enough to train on a CPU.

Parameter names and shapes are those of the checkpoints published as DBRX, so `state_dict()` is the
checkpoint.  The arithmetic follows mlx-lm's `dbrx.py`: LayerNorm without bias, a fused and clipped
QKV projection, half-split rotary positions, a float32 softmax router whose k largest entries are
divided by their sum, SwiGLU experts.

Shapes: B sequences, T positions, N = B * T rows, d model width, E experts, F expert width, k
experts per row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a model; the defaults are those of `zmoe-tiny`."""

    vocab_size: int = 1024
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    kv_n_heads: int = 2
    ffn_hidden_size: int = 64
    moe_num_experts: int = 16
    moe_top_k: int = 4
    clip_qkv: float = 8.0
    rope_theta: float = 10000.0
    max_seq_len: int = 1024

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class Routing:
    """What one router decided: logits (N, E), expert ids (N, k), weights (N, k)."""

    logits: Tensor
    expert_ids: Tensor
    weights: Tensor


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (length, head_dim / 2)."""
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, heads, T, head_dim): channel i is paired with channel i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention, (B, T, d) -> (B, T, d)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.n_heads + 2 * config.kv_n_heads
        self.Wqkv = nn.Linear(config.d_model, heads * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config = self.config
        batch, length, width = x.shape
        qkv = self.Wqkv(x).clamp(-config.clip_qkv, config.clip_qkv)
        qkv = qkv.view(batch, length, -1, config.head_dim).transpose(1, 2)
        sizes = (config.n_heads, config.kv_n_heads, config.kv_n_heads)
        queries, keys, values = qkv.split(sizes, dim=1)
        out = F.scaled_dot_product_attention(
            rotate(queries, cos, sin),
            rotate(keys, cos, sin),
            values,
            is_causal=True,
            enable_gqa=True,
        )
        projected: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, width))
        return projected


class NormAttnNorm(nn.Module):
    """Attention between two norms: returns the residual stream and the expert block's input."""

    def __init__(self, config: TinyConfig, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, bias=False)
        self.norm_2 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = Attention(config)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.drop(self.attn(self.norm_1(x), cos, sin))
        return x, self.norm_2(x)


class ExpertMLP(nn.Module):
    """All experts of a layer, each weight (E * F, d) as DBRX publishes it."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.num_experts = config.moe_num_experts
        rows = config.moe_num_experts * config.ffn_hidden_size
        self.w1 = nn.Parameter(torch.empty(rows, config.d_model))
        self.v1 = nn.Parameter(torch.empty(rows, config.d_model))
        self.w2 = nn.Parameter(torch.empty(rows, config.d_model))

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, (N, d), (N, k), (N, k) -> (N, d).

        The (row, expert) pairs are sorted by expert, so that each expert is one dense product.
        """
        flat = expert_ids.flatten()
        order = flat.argsort(stable=True)
        rows = order // expert_ids.shape[1]
        counts = flat.bincount(minlength=self.num_experts).tolist()
        gate, up, down = (w.chunk(self.num_experts) for w in (self.w1, self.v1, self.w2))
        outputs = [
            (F.silu(part @ gate[e].T) * (part @ up[e].T)) @ down[e]
            for e, part in enumerate(x.index_select(0, rows).split(counts))
        ]
        weighted = torch.cat(outputs) * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, rows, weighted)


class Experts(nn.Module):
    """Holds `mlp`, for the published parameter names only."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.mlp = ExpertMLP(config)


class Router(nn.Module):
    """Scores rows against experts, (N, d) -> Routing."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.top_k = config.moe_top_k
        self.layer = nn.Linear(config.d_model, config.moe_num_experts, bias=False)

    def forward(self, x: Tensor) -> Routing:
        logits = self.layer(x).float()
        weights, expert_ids = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return Routing(logits, expert_ids, weights / weights.sum(dim=-1, keepdim=True))


class SparseMoE(nn.Module):
    """Router and experts, (B, T, d) -> (B, T, d) and the routing."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        rows = x.reshape(-1, x.shape[-1])
        routing = self.router(rows)
        out = self.experts.mlp(rows, routing.expert_ids, routing.weights)
        return out.view_as(x), routing


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: TinyConfig, dropout: float) -> None:
        super().__init__()
        self.norm_attn_norm = NormAttnNorm(config, dropout)
        self.ffn = SparseMoE(config)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing]:
        residual, hidden = self.norm_attn_norm(x, cos, sin)
        out, routing = self.ffn(hidden)
        return residual + self.drop(out), routing


class Transformer(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) -> (B, T, d) and one routing a layer."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TinyConfig, dropout: float) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model, bias=False)
        cos, sin = rotary_tables(config.max_seq_len, config.head_dim, config.rope_theta)
        # Not persistent: the checkpoint holds weights only, and readers compute the angles.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Routing]]:
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.drop(self.wte(ids))
        routings = []
        for block in self.blocks:
            x, routing = block(x, cos, sin)
            routings.append(routing)
        return self.norm_f(x), routings


class TinyModel(nn.Module):
    """The language model: token ids (B, T) -> logits (B, T, V) and one routing a layer."""

    def __init__(self, config: TinyConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, dropout)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal(0, 0.02), and less for what writes to the residual stream (GPT-2's recipe)."""
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("out_proj.weight", "mlp.w2"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Routing]]:
        hidden, routings = self.transformer(ids)
        return self.lm_head(hidden), routings


def balance_loss(routing: Routing) -> Tensor:
    """Switch Transformer's load-balancing loss (Fedus et al. 2021, eq. 4), 1 when even.

    E * sum over experts of (share of the pairs) * (mean probability); k choices a row.
    """
    num_experts = routing.logits.shape[1]
    shares = routing.expert_ids.flatten().bincount(minlength=num_experts).float()
    shares = shares / routing.expert_ids.numel()
    return num_experts * (shares * routing.logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """ST-MoE's z-loss (Zoph et al. 2022, eq. 5): keeps the router's logits small."""
    return routing.logits.logsumexp(dim=-1).square().mean()
