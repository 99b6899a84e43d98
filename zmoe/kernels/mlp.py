"""Feed-forward networks that every token goes through: dense layers and shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.attention import fill_norm, weights_of
from zmoe.kernels.chain import Chain, Sublayer
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Activation, RouteKind, Status, ffi, lib
from zmoe.placement.pairs import Floats

if TYPE_CHECKING:
    from zmoe.native import CData


@dataclass(frozen=True)
class MlpParts:
    """down(silu(gate(x)) * up(x)); `linears` are these three. With `weight`, a linear layer
    with one output, its logistic function multiplies the result.
    """

    linears: tuple[Any, Any, Any]
    weight: Any = None


class NativeMlp:
    """h += mlp(norm(h)): the MLP is an expert to which every token goes."""

    def __init__(self, norm: Any, parts: MlpParts, pool: ThreadPool, dtype: mx.Dtype) -> None:
        weights = weights_of(parts.linears)
        keep: list[Any] = [parts, weights]
        expert = ffi.new("zmoe_expert_layer *")
        expert.gate, expert.up, expert.down = (weights + i for i in range(3))
        expert.experts, expert.activation = 1, int(Activation.SILU)
        self.described = ffi.new("zmoe_mlp *")
        fill_norm(self.described.input, norm, keep)
        self.described.expert, self.described.dtype = expert, int(DTYPES[dtype])
        if parts.weight is not None:
            gate, router = weights_of([parts.weight]), ffi.new("zmoe_router *")
            router.input, router.gate = self.described.input, gate
            router.kind, router.top_k = int(RouteKind.SIGMOID_TOP_K), 1
            self.described.weight = router
            keep += [gate, router]
        self.sublayer = Sublayer.of("mlp", self.described, [*keep, expert])
        pool.reserve(lib.zmoe_mlp_scratch(self.described))
        self._pool, self._chain = pool, Chain([self.sublayer], pool)

    def __call__(self, h: CData, memory: Floats) -> None:
        """Change h (tokens, hidden_size) f32 in place, as C and as numpy see it."""
        self._chain(h, len(memory))

    def output(self, h: CData, out: Floats) -> Floats:
        """`out` (tokens, hidden_size) = mlp(norm(h)), for h likewise f32. Raises ZmoeError."""
        target = ffi.from_buffer("float[]", out, require_writable=True)
        pool, rows = self._pool, len(out)
        status = lib.zmoe_mlp_output(pool.handle, self.described, h, rows, target, pool.precision)
        if status != Status.OK:
            raise ZmoeError(f"an MLP failed: {Status(status).name}")
        return out
