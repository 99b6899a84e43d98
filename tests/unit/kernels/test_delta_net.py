"""zmoe_delta_step against its definition in float64, and what its rows may depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from zmoe.kernels.threads import ThreadPool
from zmoe.native import Dtype, Isa, Precision, Status, ffi, lib

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ISAS = [isa for isa in Isa if isa.supported]
WIDTH = 24  # of h
BEFORE = 64  # bytes of a state that belong to other layers


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
    """Random weights and h (sequences, rows, WIDTH). Each output of a matmul has one term, so that
    it rounds alike however it is computed.
    """

    def __init__(self, net: Net, sequences: int, rows: int) -> None:
        draw = np.random.default_rng(net.channels)
        self.net = net
        self.h = draw.normal(size=(sequences, rows, WIDTH)).astype(np.float32)
        sizes = [net.keys * width for width in net.widths]
        sizes = [sum(sizes)] if net.beside else sizes
        self.projections = [sparse(draw, size, WIDTH) for size in sizes]
        self.output = sparse(draw, WIDTH, net.values * net.value_dim)
        self.conv = draw.normal(size=(net.taps, net.channels)).astype(np.float32)
        self.decay, self.offset = draw.uniform(0.1, 2, (2, net.values)).astype(np.float32)
        self.norm = draw.uniform(0.5, 1.5, net.value_dim).astype(np.float32)

    def parts(self) -> list[F64]:
        """(sequences, rows, heads of keys, width) each."""
        net, h = self.net, self.h.astype(np.float64)
        given = [
            (h @ w.T.astype(np.float64)).reshape(*h.shape[:2], net.keys, -1)
            for w in self.projections
        ]
        edges = np.cumsum(net.widths)[:-1]
        return np.split(given[0], edges, axis=-1) if net.beside else given

    def reference(self) -> F64:
        """What h is after the layer, all from nothing."""
        net = self.net
        q, k, v, z, b, a = self.parts()
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
        out = (out * z / (1 + np.exp(-z))).reshape(sequences, rows, -1)
        return self.h + out @ self.output.T.astype(np.float64)

    def describe(self) -> tuple[Any, list[Any]]:
        """The zmoe_delta_net, and what it points to."""
        net, keep = self.net, list[Any]()

        def kept(cdata: Any) -> Any:
            keep.append(cdata)
            return cdata

        def floats(array: F32) -> Any:
            return kept(ffi.from_buffer("float[]", array))

        def weights(arrays: list[F32]) -> Any:
            out = kept(ffi.new("zmoe_weight[]", len(arrays)))
            for to, array in zip(out, arrays):
                to.data, (to.out_features, to.in_features) = floats(array), array.shape
            return out

        raw = ffi.new("zmoe_delta_net *")
        raw.key_heads, raw.value_heads = net.keys, net.values
        raw.key_dim, raw.value_dim, raw.taps = net.key_dim, net.value_dim, net.taps
        raw.conv, raw.decay, raw.offset = map(floats, (self.conv, self.decay, self.offset))
        raw.norm.kind, raw.norm.width, raw.norm.eps = 1, net.value_dim, 1e-6
        raw.norm.weight = floats(self.norm)
        raw.projections, raw.n_projections = weights(self.projections), len(self.projections)
        raw.output = weights([self.output])
        at = [sum(net.widths[:part]) if net.beside else 0 for part in range(6)]
        strides = [sum(net.widths)] * 6 if net.beside else net.widths
        slices = [(0 if net.beside else part, at[part], strides[part]) for part in range(6)]
        raw.parts = kept(ffi.new("zmoe_slices[]", slices))
        raw.dtype, raw.state_at = Dtype.F32, BEFORE
        return raw, keep

    def run(self, pool: ThreadPool, *steps: dict[int, int]) -> F32:
        """What h is then of the sequences of `steps`: each is so many rows of some of them."""
        raw, keep = self.describe()
        pool.reserve(lib.zmoe_delta_scratch(raw, pool.threads))
        out, done, states = self.h.copy(), dict[int, int](), dict[int, Any]()
        for step in steps:
            spans, rows, before = ffi.new("zmoe_span[]", len(step)), [], dict(states)
            for span, (sequence, count) in zip(spans, step.items()):
                start = done.get(sequence, 0)
                done[sequence] = start + count
                rows.append(self.h[sequence, start : start + count])
                span.rows, span.position = count, start
                span.state_before = states.get(sequence, ffi.NULL)
                size = BEFORE + lib.zmoe_delta_state_bytes(raw)
                span.state_after = states[sequence] = ffi.new("unsigned char[]", b"\xff" * size)
            copies = {sequence: bytes(ffi.buffer(state)) for sequence, state in before.items()}
            h = np.concatenate(rows)
            memory = ffi.from_buffer("float[]", h, require_writable=True)
            given = (pool.handle, raw, spans, len(step), memory, Precision.EXACT)
            assert lib.zmoe_delta_step(*given) == Status.OK
            for sequence, state in before.items():
                assert bytes(ffi.buffer(state)) == copies[sequence]
            for (sequence, count), part in zip(
                step.items(), np.split(h, np.cumsum([*step.values()]))
            ):
                out[sequence, done[sequence] - count : done[sequence]] = part
        assert keep and set(done.values()) == {self.h.shape[1]}
        return out[sorted(done)]


def sparse(draw: np.random.Generator, outputs: int, inputs: int) -> F32:
    weights = np.zeros((outputs, inputs), np.float32)
    at = np.arange(outputs)
    weights[at, at * 7 % inputs] = draw.normal(size=outputs)
    return weights


@pytest.mark.parametrize("net", NETS, ids=str)
def test_rows_are_those_of_the_definition_whatever_runs_beside_them(net: Net) -> None:
    """The same to the bit in other steps, alone, on any threads and every instruction set; a state
    is left as it is by the step after it.
    """
    layer, everything = Layer(net, 3, 50), dict.fromkeys(range(3), 50)  # more than a block of rows
    want, first = layer.reference(), layer.run(ThreadPool(1, isa=ISAS[0]), everything)
    assert np.abs(first - want).max() <= 1e-5 * np.abs(want).max()
    apart = {2: 1, 0: 20}, {1: 7}, {0: 1, 1: 1, 2: 1}, {2: 48, 1: 42, 0: 29}
    for isa in ISAS:
        for threads in (1, 3):
            pool = ThreadPool(threads, isa=isa)
            assert (layer.run(pool, everything) == first).all()
            assert (layer.run(pool, *apart) == first).all()
            assert (layer.run(pool, {1: 49}, {1: 1}) == first[1:2]).all()


def test_what_is_refused() -> None:
    layer, pool = Layer(NETS[1], 1, 2), ThreadPool(1)
    raw, keep = layer.describe()
    pool.reserve(lib.zmoe_delta_scratch(raw, 1))
    state = ffi.new("unsigned char[]", BEFORE + lib.zmoe_delta_state_bytes(raw))
    h = ffi.new("float[]", 2 * WIDTH)
    span = {"rows": 2, "state_after": state}

    def status(net: dict[str, Any] | None = None, **changes: Any) -> int:
        changed = ffi.new("zmoe_delta_net *", raw[0])
        for name, value in (net or {}).items():
            setattr(changed, name, value)
        spans = ffi.new("zmoe_span[]", [span | changes])
        return int(lib.zmoe_delta_step(pool.handle, changed, spans, 1, h, Precision.EXACT))

    assert keep and status() == Status.OK
    for bad in (
        {"key_heads": 0},
        {"value_heads": 0},
        {"key_heads": 2},
        {"key_heads": 4, "value_heads": 4},  # the last one lies beyond its row
        {"key_dim": 18},
        {"value_dim": 0},
        {"value_dim": 6},
        {"taps": 0},
        {"n_projections": 0},
        {"n_projections": 5},  # the last part lies in the sixth
        {"n_projections": 7},
        {"dtype": Dtype.Q8},
        {"state_at": 2},
        {"parts": ffi.new("zmoe_slices[]", [(5, 0, 1)] * 6)},
    ):
        assert status(bad) == Status.INVALID, bad
    for bad in ({"rows": 0}, {"state_after": ffi.NULL}, {"state_before": state}):
        assert status(**bad) == Status.INVALID, bad
