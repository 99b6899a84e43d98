"""Sublayers of consecutive decoder layers as one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zmoe.errors import ZmoeError
from zmoe.kernels.paged import PagedStep
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Extent, Status, ffi, lib
from zmoe.obs import Spans

if TYPE_CHECKING:
    from zmoe.native import CData


_FEW_ROWS = 32  # up to so many, all sublayers are one call
_AT_A_TIME = 2  # sublayers otherwise: Ctrl-C waits for the end of a call


@dataclass(frozen=True)
class Sublayer:
    """h += part(norm(h)), as a zmoe_sublayer, and what keeps alive what that points to."""

    raw: CData
    keep: Sequence[Any]

    @staticmethod
    def of(kind: str, described: CData, keep: Sequence[Any]) -> Sublayer:
        """That of one of the kinds of zmoe_sublayer, by the name of its field."""
        raw = ffi.new("zmoe_sublayer *")
        setattr(raw, kind, described)
        return Sublayer(raw, [described, *keep])


class Chain:
    """Sublayers that run one after the other, or none; attention runs on the spans of `step`.

    `spans` gets the time of the experts.
    """

    def __init__(
        self,
        sublayers: Sequence[Sublayer],
        pool: ThreadPool,
        step: PagedStep | None = None,
        spans: Spans | None = None,
    ) -> None:
        self._keep, self._pool = sublayers, pool
        self._step, self._spans = step or PagedStep(()), spans or Spans()
        self._raw = ffi.new("zmoe_sublayer[]", len(sublayers))
        for i, sublayer in enumerate(sublayers):
            self._raw[i] = sublayer.raw[0]
        self._experts_ns = ffi.new("uint64_t *")

    def __call__(
        self, h: CData, rows: int, extent: Extent = Extent.ALL, routing: CData = ffi.NULL
    ) -> None:
        """Change h (rows, hidden_size) f32 in place; `routing` is a zmoe_routing for what the
        last sublayer, if it is routed experts, computes up to `extent`. Raises ZmoeError.
        """
        count = len(self._keep)
        most = max(1, count) if rows <= _FEW_ROWS else _AT_A_TIME
        self._experts_ns[0] = 0
        for first in range(0, count, most):
            some = min(most, count - first)
            is_last = first + some == count
            self._run(first, some, h, rows, extent if is_last else Extent.ALL, routing)
        if self._experts_ns[0]:
            self._spans.add("experts", self._experts_ns[0] * 1e-9)

    def _run(
        self, first: int, count: int, h: CData, rows: int, extent: Extent, routing: CData
    ) -> None:
        step, pool = self._step, self._pool
        status = lib.zmoe_chain(
            pool.handle,
            self._raw + first,
            count,
            step.raw,
            step.count,
            h,
            rows,
            extent,
            routing,
            self._experts_ns,
            pool.precision,
        )
        if status != Status.OK:
            raise ZmoeError(f"the kernels failed within a layer: {Status(status).name}")
