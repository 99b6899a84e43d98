"""zmoe_delta_step against its definition in float64, and what its rows may depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from zmoe.kernels.threads import ThreadPool
from zmoe.native import Dtype, Isa, Status, ffi, lib

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ISAS = [isa for isa in Isa if isa.supported]


@dataclass(frozen=True)
class Net:
    """`keys` heads of keys, `values` of values, whose parts lie `beside` each other or apart."""

    keys: int
    values: int
    key_dim: int
    value_dim: int
    taps: int
    beside: bool

    @property
    def channels(self) -> int:
        return 2 * self.keys * self.key_dim + self.values * self.value_dim

    @property
    def widths(self) -> list[int]:
        """Of a head of keys: queries, keys, values, gates, b, a."""
        count = self.values // self.keys
        return [self.key_dim, self.key_dim, *[count * self.value_dim] * 2, count, count]


NETS = [Net(2, 4, 32, 24, 4, True), Net(3, 3, 17, 5, 2, False), Net(1, 3, 128, 64, 4, False)]


class Layer:
    """Random weights and inputs: `parts` (sequences, rows, heads of keys, width) each."""

    def __init__(self, net: Net, sequences: int, rows: int) -> None:
        draw = np.random.default_rng(net.channels)
        self.net = net
        self.parts = [
            draw.normal(size=(sequences, rows, net.keys, width)).astype(np.float32)
            for width in net.widths
        ]
        self.conv = draw.normal(size=(net.taps, net.channels)).astype(np.float32)
        self.decay, self.offset = draw.uniform(0.1, 2, (2, net.values)).astype(np.float32)
        self.norm = draw.uniform(0.5, 1.5, net.value_dim).astype(np.float32)

    def reference(self) -> F64:
        """(sequences, rows, values * value_dim), all from nothing."""
        net = self.net
        q, k, v, z, b, a = (part.astype(np.float64) for part in self.parts)
        sequences, rows = q.shape[:2]
        x = np.concatenate([part.reshape(sequences, rows, -1) for part in (q, k, v)], axis=-1)
        padded = np.pad(x, ((0, 0), (net.taps - 1, 0), (0, 0)))
        x = sum(self.conv[t] * padded[:, t : t + rows] for t in range(net.taps))
        x = x / (1 + np.exp(-x))
        edge = net.keys * net.key_dim
        q, k = (
            part.reshape(sequences, rows, net.keys, -1)
            for part in np.split(x, [edge, 2 * edge], -1)[:2]
        )
        v = x[..., 2 * edge :].reshape(sequences, rows, net.values, net.value_dim)
        q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
        q, k = (
            np.repeat(part, net.values // net.keys, axis=2) for part in (q / net.key_dim**0.5, k)
        )
        z, b, a = (part.reshape(sequences, rows, net.values, -1) for part in (z, b, a))
        out = np.empty_like(v)
        state = np.zeros((sequences, net.values, net.value_dim, net.key_dim))
        for t in range(rows):
            decay = np.exp(-self.decay * np.log1p(np.exp(a[:, t, :, 0] + self.offset)))
            state = state * decay[..., None, None]
            held = (state * k[:, t, :, None]).sum(-1)
            new = (v[:, t] - held) / (1 + np.exp(-b[:, t]))
            state = state + new[..., None] * k[:, t, :, None]
            out[:, t] = (state * q[:, t, :, None]).sum(-1)
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * self.norm
        return (out * z / (1 + np.exp(-z))).reshape(sequences, rows, -1)

    def run(self, pool: ThreadPool, *chunks: int, sequence: int | None = None) -> F32:
        """The rows in chunks of these sizes; of one sequence alone, or of all at once."""
        net, keep = self.net, []

        def floats(array: F32) -> Any:
            keep.append(np.ascontiguousarray(array))
            return ffi.from_buffer("float[]", keep[-1])

        raw = ffi.new("zmoe_delta_net *")
        raw.key_heads, raw.value_heads = net.keys, net.values
        raw.key_dim, raw.value_dim, raw.taps = net.key_dim, net.value_dim, net.taps
        raw.conv, raw.decay, raw.offset = map(floats, (self.conv, self.decay, self.offset))
        raw.norm.kind, raw.norm.width, raw.norm.eps = 1, net.value_dim, 1e-6
        raw.norm.weight = floats(self.norm)
        pool.reserve(lib.zmoe_delta_scratch(raw, pool.threads))
        chosen = slice(None) if sequence is None else slice(sequence, sequence + 1)
        parts = [part[chosen] for part in self.parts]
        count = len(parts[0])
        outs, start, before = [], 0, (ffi.NULL, ffi.NULL)
        for rows in chunks:
            slices = ffi.new("zmoe_slices[]", lib.ZMOE_DELTA_PARTS)
            mine = [part[:, start : start + rows] for part in parts]
            if net.beside:
                data, at = floats(np.concatenate(mine, axis=-1)), 0
                for to, width in zip(slices, net.widths):
                    to.data, to.width, to.at = data, net.keys * sum(net.widths), at
                    to.stride, at = sum(net.widths), at + width
            else:
                for to, width, part in zip(slices, net.widths, mine):
                    to.data, to.width, to.stride = floats(part), net.keys * width, width
            out = np.empty((count, rows, net.values * net.value_dim), np.float32)
            after = (
                floats(np.empty((count, net.taps - 1, net.channels), np.float32)),
                floats(np.empty((count, net.values, net.value_dim, net.key_dim), np.float32)),
            )
            status = lib.zmoe_delta_step(
                pool.handle,
                raw,
                slices,
                Dtype.F32,
                count,
                rows,
                before[0],
                after[0],
                before[1],
                after[1],
                ffi.from_buffer("float[]", out, require_writable=True),
            )
            assert status == Status.OK
            outs.append(out)
            before, start = after, start + rows
        return np.concatenate(outs, axis=1)


@pytest.mark.parametrize("net", NETS, ids=str)
def test_rows_are_those_of_the_definition_whatever_runs_beside_them(net: Net) -> None:
    """The same to the bit in chunks, for one sequence of three, and on every instruction set."""
    layer = Layer(net, 3, 21)
    want, first = layer.reference(), layer.run(ThreadPool(1, isa=ISAS[0]), 21)
    assert np.abs(first - want).max() <= 1e-5 * np.abs(want).max()
    for isa in ISAS:
        for threads, chunks in ((1, (1, 1, 7, 12)), (3, (21,)), (2, (20, 1))):
            pool = ThreadPool(threads, isa=isa)
            assert (layer.run(pool, *chunks) == first).all()
            assert (layer.run(pool, *chunks, sequence=1) == first[1:2]).all()


def test_what_is_refused() -> None:
    raw, pool = ffi.new("zmoe_delta_net *"), ThreadPool(1)
    slices, floats = ffi.new("zmoe_slices[]", lib.ZMOE_DELTA_PARTS), ffi.new("float[]", 64)
    pool.reserve(1 << 16)
    raw.conv = raw.decay = raw.offset = floats
    for to in slices:
        to.data, to.width, to.stride = floats, 4, 4

    def status(**changes: int) -> int:
        good = dict(key_heads=1, value_heads=2, key_dim=4, value_dim=2, taps=2)
        for name, value in (good | changes).items():
            setattr(raw, name, value)
        raw.norm.kind, raw.norm.width = 1, changes.get("value_dim", 2)
        given = (raw, slices, Dtype.F32, 1, 1, ffi.NULL, floats, ffi.NULL, floats, floats)
        return int(lib.zmoe_delta_step(pool.handle, *given))

    assert status() == Status.OK
    for bad in (
        {"key_heads": 0},
        {"value_heads": 0},
        {"key_heads": 2, "value_heads": 3},
        {"key_heads": 2},  # the second one lies beyond its row
        {"key_dim": 5},
        {"value_dim": 0},
        {"value_dim": 3},
        {"taps": 0},
    ):
        assert status(**bad) == Status.INVALID, bad
