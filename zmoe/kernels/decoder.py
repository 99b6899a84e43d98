"""What follows attention in a decoder layer without MLX: router, own experts, exchange.

The plain way, layer by layer in MLX with native matmuls, stays beside it and
is what the tests compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from zmoe.exchange.base import Call
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import as_array, empty, writable
from zmoe.kernels.attention import fill_norm
from zmoe.kernels.chain import Chain, Sublayer
from zmoe.kernels.experts import NativeExperts
from zmoe.kernels.mlp import NativeMlp
from zmoe.kernels.paged import PagedStep
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import Matrices
from zmoe.moe.adapter import Adapter, Block, Routing
from zmoe.moe.block import Layer, Routed, forward
from zmoe.native import Extent, RouteKind, ffi, lib
from zmoe.placement.pairs import Floats, Ints, no_experts

if TYPE_CHECKING:
    from zmoe.native import CData


_NO_PADDING = no_experts()


@dataclass(frozen=True)
class RouterParts:
    """A block's router taken apart: the matrix of its gate, and how k experts are chosen.

    `bias` (experts,) adds to the scores for the choice alone. Of `groups` of experts, all but the
    `kept` best are chosen from as if their scores were 0. `scale` multiplies the weights.
    """

    gate: Matrices
    kind: RouteKind
    top_k: int
    normalize: bool = False
    bias: mx.array | None = None
    groups: int = 0
    kept: int = 0
    scale: float = 1.0


class NativeMoE:
    """h += experts(router(norm(h))), summed over the nodes."""

    def __init__(
        self,
        norm: Any,
        router: RouterParts,
        block: Block,
        adapter: Adapter,
        experts: NativeExperts,
        layer: Layer,
        pool: ThreadPool,
        buffers: BufferPool,
        shared: NativeMlp | None = None,
    ) -> None:
        """`shared` is all that the block computes beside its routed experts; None: as the
        adapter says, in MLX. `norm` None: what h is given is normed already, and not added to.
        """
        self._block, self._adapter, self._layer, self._shared = block, adapter, layer, shared
        self._experts, self._pool, self._buffers = experts, pool, buffers
        self._top_k, own = router.top_k, layer.ownership
        self._keep: list[Any] = [router.gate]
        self._router = ffi.new("zmoe_router *")
        self._describe_router(norm, router)
        pool.reserve(lib.zmoe_route_scratch(self._router))
        described = ffi.new("zmoe_moe *")
        described.router, described.experts = self._router, experts.raw
        described.local, described.n_experts = own.local_pointer, own.experts
        described.shared = ffi.NULL if shared is None else shared.described
        described.dtype = int(DTYPES[buffers.dtype])
        keep = [*self._keep, self._router, experts, own, shared and shared.sublayer]
        self.sublayer = Sublayer.of("moe", described, keep)
        self._finds_pairs = own.is_fixed
        in_c = norm is not None and (shared is not None or not adapter.has_shared)
        self.is_whole = layer.reducer.nodes == 1 and self._finds_pairs and in_c
        if self.is_whole:
            pool.reserve(lib.zmoe_moe_scratch(described))
        self._chain = Chain([self.sublayer], pool, spans=layer.spans)

    def _describe_router(self, norm: Any, router: RouterParts) -> None:
        raw = self._router
        fill_norm(raw.input, norm, self._keep)
        raw.gate = router.gate.array
        raw.kind, raw.top_k, raw.normalize = int(router.kind), router.top_k, router.normalize
        raw.groups, raw.kept, raw.scale = router.groups, router.kept, router.scale
        if router.bias is not None:
            bias = np.array(router.bias.astype(mx.float32))
            self._keep.append(bias)
            raw.bias = ffi.from_buffer("float[]", bias)

    def follow(self, sublayers: Sequence[Sublayer], step: PagedStep) -> None:
        """Run `sublayers` before, on the spans of `step`."""
        self._chain = Chain([*sublayers, self.sublayer], self._pool, step, self._layer.spans)

    def __call__(self, h: Any, memory: Any) -> None:
        """Change h (tokens, hidden_size) f32 in place, as C and as numpy see it."""
        if self.is_whole:
            self._chain(h, len(memory))
        else:
            forward(self, self._layer, h, memory)

    def route(self, h: CData, memory: Floats) -> Buffers:
        """See zmoe.moe.block.Backend."""
        rows, width = memory.shape
        layer = self._layer
        at = self._buffers.of(rows, width, self._top_k)
        extent = Extent.ROUTE
        if self._finds_pairs:
            call = Call(layer.ordinal, rows, width, layer.dtype, 0)
            extent = Extent.SUM if layer.reducer.takes_whole(call) else Extent.PAIRS
        self._chain(h, rows, extent, at.raw)
        if self._finds_pairs:
            at.pad(_NO_PADDING)
        else:
            self._find_pairs(at, rows)
        at.digest, at.memory, at.h = int(at.pairs.digest), memory, h
        at.has_sum = extent is Extent.SUM
        return at

    def _find_pairs(self, at: Buffers, rows: int) -> None:
        """What this node has to compute of the routing, and what it runs besides."""
        own = self._layer.ownership
        lib.zmoe_own_pairs(
            at.raw.ids,
            at.raw.weights,
            rows,
            self._top_k,
            own.local_pointer,
            own.experts,
            own.assign(at.ids),
            own.rank,
            at.raw.sorted,
            at.pairs,
        )
        at.pad(own.padding(at.ids, at.experts[: at.pairs.count]))

    def partial(self, routed: Buffers, start: int, stop: int) -> Floats | None:
        """See zmoe.moe.block.Backend."""
        if routed.has_sum:
            return routed.partial[: stop - start] if routed.pairs.count else None
        part = routed.between(start, stop)
        if part.pairs.count:
            with self._layer.spans.span("experts"):
                self._experts.sum_pairs(part.x, routed.x_dtype, part.rows, part.pairs, part.out)
        return part.out[: stop - start] if part.assigned else None

    def shared(self, routed: Buffers) -> mx.array | Floats | None:
        """See zmoe.moe.block.Backend; evaluated."""
        if self._shared is not None:
            return self._shared.output(routed.h, routed.beside)
        if not self._adapter.has_shared:
            return None
        x = as_array(routed.x, routed.x_dtype, (1, *routed.x.shape))
        ids, weights = mx.array(routed.ids)[None], mx.array(routed.weights)[None]
        part = self._adapter.shared(self._block, x, Routing(x, ids, weights))
        if part is not None:
            mx.eval(part)
        return part

    def finish(self, routed: Buffers, total: Floats, shared: mx.array | Floats | None) -> None:
        """Add the sum over the nodes and the shared part to h."""
        memory = routed.memory
        memory += total
        if isinstance(shared, np.ndarray):
            memory += shared
        elif shared is not None:
            memory += np.asarray(shared.astype(mx.float32)).reshape(memory.shape)


class NativeMoEBlock(Module):
    """Stands in for a MoE block in a layer that MLX runs: `moe` has no norm of its own."""

    def __init__(self, block: Block, moe: NativeMoE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self._moe = moe

    def __call__(self, x: mx.array) -> mx.array:
        """The block's output for x (..., hidden_size), alike; evaluates x."""
        rows: Any = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        out = np.zeros_like(rows)
        self._moe(ffi.from_buffer("float[]", rows), out)
        return mx.array(out).reshape(x.shape).astype(x.dtype)


class Part(NamedTuple):
    """Some tokens of a routing as the experts take them: x, pairs and their sums.

    `rows` and `out` have one more at the end where padding is run; `assigned`:
    whether there is any other pair.
    """

    x: Any
    rows: int
    pairs: Any
    out: Floats
    assigned: bool


class _Memory:
    """What Buffers are slices of: for up to `rows` tokens and `padding` experts besides."""

    def __init__(self, rows: int, width: int, top_k: int, padding: int, dtype: mx.Dtype) -> None:
        self.rows, self.padding = rows, padding
        self.x = empty((rows + 1, width), dtype)
        self.out, self.partial, self.beside = (
            np.empty((rows + 1, width), np.float32) for _ in range(3)
        )
        self.ids, self.weights = (
            np.empty((rows, top_k), np.int32),
            np.empty((rows, top_k), np.float32),
        )
        count = rows * top_k + padding
        self.pair_rows, self.some_rows, self.experts, self.order = np.empty((4, count), np.int32)
        self.pair_weights = np.empty(count, np.float32)


class Buffers(Routed):
    """What a layer's routing and sums of `rows` tokens go into, reused by all layers.

    One row of x more, of zeros, and one of the partial sum are for the
    experts that are run on no token of the routing.
    """

    def __init__(self, rows: int, memory: _Memory, dtype: mx.Dtype) -> None:
        self.rows = rows
        x, out = memory.x[: rows + 1], memory.out[:rows]
        x[rows] = 0
        super().__init__(x[:rows], dtype, memory.ids[:rows], memory.weights[:rows], 0, out)
        self.memory, self.h = out, ffi.NULL  # that of h, once there is a routing
        self.has_sum = False  # whether `partial` is there
        self.partial, self.beside = memory.partial[: rows + 1], memory.beside[:rows]
        self.x_pointer = writable(x)
        self._pair_rows, self._some_rows = memory.pair_rows, memory.some_rows
        self.experts, self._pair_weights = memory.experts, memory.pair_weights
        self.pairs, self._some_pairs = ffi.new("zmoe_pairs *"), ffi.new("zmoe_pairs *")
        self.pairs.rows = ffi.from_buffer("int32_t[]", self._pair_rows)
        self.pairs.experts = ffi.from_buffer("int32_t[]", self.experts)
        self.pairs.weights = ffi.from_buffer("float[]", self._pair_weights)
        self._some_pairs.rows = ffi.from_buffer("int32_t[]", self._some_rows)
        self.raw = ffi.new("zmoe_routing *")
        self.raw.x, self.raw.sum = self.x_pointer, ffi.from_buffer("float[]", self.partial)
        self.raw.ids, self.raw.weights = (
            ffi.from_buffer("int32_t[]", self.ids),
            ffi.from_buffer("float[]", self.weights),
        )
        self.raw.sorted = ffi.from_buffer("int32_t[]", memory.order)
        self.raw.pairs = self.pairs
        self._padded = 0

    def pad(self, experts: Ints) -> None:
        """Add pairs of the row of zeros with each of `experts`."""
        self._padded = len(experts)
        if len(experts):
            new = slice(self.pairs.count, self.pairs.count + len(experts))
            self._pair_rows[new], self.experts[new] = self.rows, experts
            self._pair_weights[new] = 0
            self.pairs.count = new.stop

    def between(self, start: int, stop: int) -> Part:
        """The tokens [start, stop), which count from 0 then; the last have the padding."""
        padded = self._padded if stop == self.rows else 0
        rows = stop - start + (padded > 0)
        if stop - start == self.rows:
            count = self.pairs.count
            return Part(self.x_pointer, rows, self.pairs, self.partial[:rows], count > padded)
        some, of = self._some_pairs, self._pair_rows[: self.pairs.count]
        begin, end = (int(edge) for edge in np.searchsorted(of, (start, start + rows)))
        np.subtract(of[begin:end], start, out=self._some_rows[: end - begin])
        some.experts, some.weights = self.pairs.experts + begin, self.pairs.weights + begin
        some.count = end - begin
        x = self.x_pointer + start * (len(self.x_pointer) // (self.rows + 1))
        return Part(x, rows, some, self.partial[start : start + rows], end - begin > padded)


class BufferPool:
    """Buffers that the layers share: slices of memory for the most tokens so far.

    `padding`: the most experts that any layer runs on no token.
    """

    def __init__(self, dtype: mx.Dtype, padding: int = 0) -> None:
        self.dtype, self._padding = dtype, padding
        self._memory: dict[tuple[int, int], _Memory] = {}
        self._known: dict[tuple[int, int], Buffers] = {}

    def of(self, rows: int, width: int, top_k: int) -> Buffers:
        """The buffers for `rows` tokens, until it is asked for another number of them."""
        key = (width, top_k)
        found = self._known.get(key)
        if found is None or found.rows != rows:
            memory = self._memory.get(key)
            if memory is None or memory.rows < rows:
                memory = _Memory(rows, width, top_k, self._padding, self.dtype)
                self._memory[key] = memory
            found = self._known[key] = Buffers(rows, memory, self.dtype)
        return found


class MlxFeedForward:
    """h += module(norm(h)) by MLX: for dense layers and routers of another kind."""

    def __init__(self, norm: Module, module: Module, pool: ThreadPool, dtype: mx.Dtype) -> None:
        self._norm, self._module, self._dtype = norm, module, dtype
        self._pool, self._chain = pool, Chain([], pool)

    def follow(self, sublayers: Sequence[Sublayer], step: PagedStep) -> None:
        """Run `sublayers` before, on the spans of `step`."""
        self._chain = Chain(sublayers, self._pool, step)

    def __call__(self, h: Any, memory: Any) -> None:
        """Of h (tokens, hidden_size) f32 in place, as C and as numpy see it."""
        self._chain(h, len(memory))
        x = self._norm(mx.array(memory)[None]).astype(self._dtype)
        y = self._module(x).astype(mx.float32)
        memory += np.asarray(y).reshape(memory.shape)


FeedForward = NativeMoE | NativeMlp | MlxFeedForward
