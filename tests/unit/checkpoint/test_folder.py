"""Damaged checkpoints are told by name, whatever is wrong with them."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zmoe.checkpoint.folder import read_config, read_tensors
from zmoe.checkpoint.safetensors import read_header
from zmoe.errors import ModelError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_headers_are_read_as_mlx_writes_them(tmp_path: Path) -> None:
    arrays = {
        "a": mx.arange(6, dtype=mx.float32).reshape(2, 3),
        "b": mx.ones((4,), mx.bfloat16),
        "c": mx.zeros((), mx.uint8),
        "empty": mx.zeros((0, 5), mx.float16),
    }
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    tensors = {t.name: t for t in read_header(path)}
    assert {n: (t.shape, t.nbytes) for n, t in tensors.items()} == {
        n: (a.shape, a.nbytes) for n, a in arrays.items()
    }
    raw = path.read_bytes()
    a = tensors["a"]
    assert raw[a.start : a.start + a.nbytes] == bytes(memoryview(arrays["a"]))


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda p: (p.write_bytes(b"") and p) or p, "truncated"),
    "seven bytes": (lambda p: p.write_bytes(b"\1" * 7) and p, "truncated"),
    "header beyond the end": (
        lambda p: p.write_bytes(struct.pack("<Q", 1 << 62) + b"{}") and p,
        "truncated or corrupt: header",
    ),
    "not JSON": (lambda p: write(p, b"{nonsense"), "not JSON"),
    "nested too deep": (lambda p: write(p, b"[" * 100_000), "not JSON"),
    "not UTF-8": (lambda p: write(p, b"\xff\xfe{}"), "not JSON"),
    "not an object": (lambda p: write(p, [1, 2]), "not a JSON object"),
    "no offsets": (lambda p: write(p, {"w": {"dtype": "F32", "shape": [2]}}), "tensor w"),
    "offsets of three": (
        lambda p: write(p, {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}),
        "tensor w",
    ),
    "entry is a number": (lambda p: write(p, {"w": 7}), "tensor w"),
    "negative dimension": (lambda p: write(p, {"w": entry(0, 8, shape=(-2,))}, bytes(8)), "w"),
    "negative offset": (lambda p: write(p, {"w": entry(-8, 0)}, bytes(8)), "tensor w"),
    "fractional shape": (lambda p: write(p, {"w": entry(0, 8, shape=(2.0,))}, bytes(8)), "w"),
    "unknown dtype": (lambda p: write(p, {"w": entry(0, 1, "F4")}, bytes(1)), "dtype F4"),
    "size contradicts shape": (lambda p: write(p, {"w": entry(0, 4)}, bytes(8)), "tensor w of 8"),
    "beyond the file": (lambda p: write(p, {"w": entry(0, 8)}, bytes(7)), "tensor w ends"),
    "overlap": (
        lambda p: write(p, {"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)),
        "tensor w overlaps v",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    make, reason = BROKEN[damage]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(ModelError) as raised:
        read_header(path)
    message = str(raised.value)
    assert str(path) in message and reason in message and "\n" not in message


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_garbage_never_escapes_as_anything_else(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        read_header(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["w", "dtype", "shape", "data_offsets"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_odd_headers_are_read_or_refused(header: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": header}, bytes(64))
    with contextlib.suppress(ModelError):
        assert all(t.nbytes <= 64 for t in read_header(path))


def test_a_folder_must_be_complete(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        read_config(tmp_path / "absent")
    with pytest.raises(ModelError, match="no config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": 3}')
    with pytest.raises(ModelError, match="no model_type"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        read_tensors(tmp_path)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), {"a": mx.zeros(1)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert set(read_tensors(tmp_path)) == {"a"}
    index.write_text(json.dumps({"weight_map": {"b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-2\.safetensors is missing"):
        read_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json is corrupt"):
        read_tensors(tmp_path)
