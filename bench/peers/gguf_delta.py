"""Gated delta nets of Qwen3-Next and Qwen3.5 as llama.cpp has them: which of a parameter's rows or
columns go where.

llama.cpp wants queries, keys and values in one matrix and gates in another, each head after head.
In Qwen3.5 its heads of values come in the order in which repeating the heads of keys as a whole,
and not each of them, gives every one its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


class Place(NamedTuple):
    """A tensor of the file: its name within a layer, its shape, and how a parameter becomes it."""

    name: str
    shape: tuple[int, ...]
    change: Callable[[Floats], Floats]


def places(config: Mapping[str, Any], parameter: str, shape: tuple[int, ...]) -> list[Place]:
    """Where `parameter` of a layer's `linear_attn` goes."""
    heads = _Heads(config, is_tiled=config["model_type"] == "qwen3_5_moe_text")
    rows = {
        "in_proj_qkvz.weight": {
            "attn_qkv.weight": heads.mixed(),
            "attn_gate.weight": heads.gates(),
        },
        "in_proj_ba.weight": {"ssm_ba.weight": None},
        "in_proj_qkv.weight": {"attn_qkv.weight": heads.channels()},
        "in_proj_z.weight": {"attn_gate.weight": heads.values()},
        "in_proj_b.weight": {"ssm_beta.weight": heads.order},
        "in_proj_a.weight": {"ssm_alpha.weight": heads.order},
        "conv1d.weight": {"ssm_conv1d.weight": heads.channels()},
        "A_log": {"ssm_a": heads.order},
        "dt_bias": {"ssm_dt.bias": heads.order},
        "norm.weight": {"ssm_norm.weight": None},
    }
    if parameter == "out_proj.weight":
        columns = heads.values()
        return [Place("ssm_out.weight", shape, lambda weight: weight[:, columns])]
    return [_of_rows(name, parameter, shape, which) for name, which in rows[parameter].items()]


def _of_rows(name: str, parameter: str, shape: tuple[int, ...], which: Indices | None) -> Place:
    kept = np.arange(shape[0]) if which is None else which
    if parameter == "conv1d.weight":  # (channels, taps, 1)
        return Place(name, (len(kept), shape[1]), lambda weight: weight[kept, :, 0])
    if parameter == "A_log":
        return Place(name, (len(kept),), lambda weight: -np.exp(weight[kept]))
    return Place(name, (len(kept), *shape[1:]), lambda weight: weight[kept])


class _Heads:
    """The rows of a projection, by the sizes of the heads."""

    def __init__(self, config: Mapping[str, Any], is_tiled: bool) -> None:
        self._keys, self._key_dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
        self._value_dim = config["linear_value_head_dim"]
        self._of_key = config["linear_num_value_heads"] // self._keys
        order = np.arange(self._keys * self._of_key).reshape(self._keys, self._of_key)
        self.order: Indices = (order.T if is_tiled else order).ravel()

    def values(self) -> Indices:
        """Of values or gates alone."""
        return (self.order[:, None] * self._value_dim + np.arange(self._value_dim)).ravel()

    def channels(self) -> Indices:
        """Of queries, keys and values after each other."""
        before = 2 * self._keys * self._key_dim
        return np.concatenate([np.arange(before), before + self.values()])

    def mixed(self) -> Indices:
        """Of queries, keys and values where each head of keys has its own beside each other."""
        return np.concatenate([part.ravel() for part in self._parts()[:3]])

    def gates(self) -> Indices:
        return self._parts()[3].ravel()

    def _parts(self) -> list[Indices]:
        values = self._of_key * self._value_dim
        each = 2 * self._key_dim + 2 * values
        rows = np.arange(self._keys * each).reshape(self._keys, each)
        ends = np.cumsum([self._key_dim, self._key_dim, values])
        return np.split(rows, ends, axis=1)
