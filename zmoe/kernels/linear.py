"""Linear layers whose matmuls the kernels compute.

A layer of MLX becomes one of ours by a change of its class: it keeps its
parameters, whose memory the kernels read, and its place in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import as_array, empty, pointer, writable
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import PARTS, Matrices, Quantization, Stored, matrices
from zmoe.native import Status, ffi, lib


class Matmul:
    """y = x W^T + bias for one weight, from MLX array to MLX array."""

    def __init__(self, pool: ThreadPool, weight: Matrices) -> None:
        self.weight, self._pool = weight, pool
        self._weights = ffi.new("zmoe_weight *[]", [weight[0]])
        self._strides = ffi.new("size_t[]", [weight.out_features])
        self._targets = ffi.new("void *[]", 1)
        pool.reserve(lib.zmoe_linear_scratch(weight.in_features))

    def __call__(self, x: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """From x (..., in_features), evaluated: (..., out_features) of `dtype`.

        None: of the type that MLX promotes to.
        """
        if x.dtype not in DTYPES:
            x = x.astype(mx.float32)
        rows = x.size // self.weight.in_features
        if dtype is None:
            dtype = mx.result_type(x.dtype, *self.weight.dtypes)
        out = empty((rows, self.weight.out_features), dtype)
        self._targets[0] = writable(out)
        status = lib.zmoe_linear(
            self._pool.handle,
            self._weights,
            1,
            pointer(x),
            DTYPES[x.dtype],
            rows,
            self._targets,
            self._strides,
            DTYPES[dtype],
            self._pool.precision,
        )
        if status != Status.OK:
            raise ZmoeError(f"a matmul failed: {Status(status).name}")
        return as_array(out, dtype, (*x.shape[:-1], self.weight.out_features))


@dataclass
class Head:
    """The model's last matmul, which only the leader needs, and of some rows only.

    `rows`: those whose logits are wanted, of the whole pass; None: the last of each sequence
    on the kernels, all on MLX.
    """

    dtype: mx.Dtype  # what x is rounded to
    rows: npt.NDArray[np.intp] | None = None

    def select(self, x: mx.array) -> mx.array:
        """The wanted rows (1, rows, in_features) of x (sequences, tokens, in_features)."""
        assert self.rows is not None
        if x.shape[0] > 1:
            x = x.reshape(1, -1, x.shape[-1])
        return x if len(self.rows) == x.shape[1] else x[:, mx.array(self.rows)]


class _HeadMatmul(Matmul):
    """From x (sequences, tokens, in_features): logits (1, wanted rows, out_features) float32,
    or (sequences, 1, out_features).
    """

    def __init__(self, pool: ThreadPool, weight: Matrices, head: Head) -> None:
        super().__init__(pool, weight)
        self._head = head

    def __call__(self, x: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        rows = self._head.rows
        if rows is None:
            x = x[..., -1:, :]
        elif len(rows) == 0:
            return mx.zeros((1, 0, self.weight.out_features))
        else:
            x = self._head.select(x)
        return super().__call__(x.astype(self._head.dtype), dtype or mx.float32)


class _Rows:
    """A head on MLX; `_head` lies in its instance's dict."""

    _head: Head

    def _selected(self, x: mx.array) -> mx.array:
        rows = self._head.rows  # without any, nobody will evaluate the logits
        return x if rows is None or not len(rows) else self._head.select(x)


class _RowsLinear(_Rows, Linear):
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = super().__call__(self._selected(x))
        return out


class _RowsQuantizedLinear(_Rows, QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = super().__call__(self._selected(x))  # type: ignore[no-untyped-call]
        return out


class _RowsEmbedding(_Rows, Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        out: mx.array = super().as_linear(self._selected(x))  # type: ignore[no-untyped-call]
        return out


class _RowsQuantizedEmbedding(_Rows, QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        out: mx.array = super().as_linear(self._selected(x))  # type: ignore[no-untyped-call]
        return out


class _Native:
    """What our layers have in common; `_matmul` lies in their instance's dict."""

    _matmul: Matmul

    def __call__(self, x: mx.array) -> mx.array:
        return self._matmul(x)


class _Mapped(_Native):
    """A layer whose weight is in a mapped file; few models ever ask for the array."""

    def __getattr__(self, key: str) -> Any:
        stored = self._matmul.weight.parts.get(key)
        return super().__getattr__(key) if stored is None else stored.as_array()  # type: ignore[misc]


class NativeLinear(_Native, Linear):
    """nn.Linear on the kernels."""


class NativeQuantizedLinear(_Native, QuantizedLinear):
    """nn.QuantizedLinear on the kernels."""


class MappedLinear(_Mapped, Linear):
    """nn.Linear on the kernels, its weight in a file."""


class MappedQuantizedLinear(_Mapped, QuantizedLinear):
    """nn.QuantizedLinear on the kernels, its weight in a file."""


class _Embedding:
    """Rows by token, and the matmul with all of them as lm_head."""

    _matmul: Matmul

    def __call__(self, x: mx.array) -> mx.array:
        weight = self._matmul.weight
        ids = np.asarray(x).reshape(-1)
        rows = np.empty((ids.size, weight.in_features), np.float32)
        if ids.size and not 0 <= ids.min() <= ids.max() < weight.out_features:
            raise ZmoeError(f"no embedding for one of the tokens {ids.tolist()}")
        # Modes whose scales are bytes (mxfp4 and kin) dequantise to bfloat16, as in MLX.
        dtype = (*weight.dtypes, mx.bfloat16)[0]
        for row, token in zip(rows, ids.tolist()):
            lib.zmoe_weight_decode(weight.array, token, ffi.from_buffer("float[]", row))
        return mx.array(rows.reshape(*x.shape, -1)).astype(dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._matmul(x)


class NativeEmbedding(_Embedding, Embedding):
    """nn.Embedding on the kernels."""


class NativeQuantizedEmbedding(_Embedding, QuantizedEmbedding):
    """nn.QuantizedEmbedding on the kernels."""


# Only these very classes: a subclass may compute something else.
_OURS: dict[type[Module], type[Module]] = {
    Linear: NativeLinear,
    QuantizedLinear: NativeQuantizedLinear,
    Embedding: NativeEmbedding,
    QuantizedEmbedding: NativeQuantizedEmbedding,
}
_MAPPED: dict[type[Module], type[Module]] = {
    Linear: MappedLinear,
    QuantizedLinear: MappedQuantizedLinear,
}
_ROWS: dict[type[Module], type[Module]] = {
    Linear: _RowsLinear,
    QuantizedLinear: _RowsQuantizedLinear,
    Embedding: _RowsEmbedding,
    QuantizedEmbedding: _RowsQuantizedEmbedding,
}
Parts = dict[str, Stored]


def may_be_mapped(module: Module) -> bool:
    """Whether make_native takes this linear layer's weight from a file."""
    return type(module) in _MAPPED


def quantization_of(layer: Any) -> Quantization | None:
    """The format of a layer's weight; None for floats."""
    if not hasattr(layer, "mode"):
        return None
    return Quantization(layer.mode, layer.bits, layer.group_size)


def take_parts(layer: Module, mapped: Parts | None) -> Parts:
    """The parameters of a linear or switch layer that C needs.

    Those that are `mapped` are taken out of the layer, which held no more than
    placeholders for them.
    """
    parts = dict(mapped or {})
    for part in parts:
        layer.pop(part, None)
    for part in PARTS:
        if isinstance(layer.get(part), mx.array):
            parts[part] = Stored.of(layer[part])
    return parts


def _is_head(path: str, kind: type[Module]) -> bool:
    return "lm_head" in path.split(".") or issubclass(kind, (Embedding, QuantizedEmbedding))


def select_rows(model: Module, head: Head) -> None:
    """Let `head` rule the matmul of MLX that makes the logits."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind in _ROWS and _is_head(path, kind):
            object.__setattr__(module, "_head", head)
            module.__class__ = _ROWS[kind]


def make_native(model: Module, pool: ThreadPool, mapped: Mapping[str, Parts], head: Head) -> None:
    """Give every large matmul of `model` outside its experts to the kernels.

    `mapped` are the parameters, by path of their layer, that lie in files;
    `head` will rule the matmul that makes the logits.
    """
    for path, module in model.named_modules():
        classes = _MAPPED if path in mapped else _OURS
        if type(module) in classes:
            weight = matrices(path, take_parts(module, mapped.get(path)), quantization_of(module))
            ours = classes[type(module)]
            is_head = _is_head(path, ours)
            matmul = _HeadMatmul(pool, weight, head) if is_head else Matmul(pool, weight)
            object.__setattr__(module, "_matmul", matmul)
            module.__class__ = ours
