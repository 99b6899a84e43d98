"""A node reads exactly its share, and gets it right."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from zmoe.checkpoint.folder import read_tensors
from zmoe.checkpoint.safetensors import MLX_DTYPES
from zmoe.checkpoint.select import Reader, layer_of, placeholder, select
from zmoe.errors import ModelError

EXPERTS = 6


def checkpoint(folder: Path, arrays: dict[str, mx.array], files: int = 2) -> Path:
    names = sorted(arrays)
    for number in range(files):
        part = {name: arrays[name] for name in names[number::files]}
        mx.save_safetensors(str(folder / f"model-{number}.safetensors"), part)
    return folder


def random(*shape: int) -> mx.array:
    return mx.random.normal(shape)


@pytest.fixture
def arrays() -> dict[str, mx.array]:
    mx.random.seed(1)
    layer = "model.layers.1.mlp"
    found = {
        "model.embed_tokens.weight": random(9, 8),
        "model.layers.0.mlp.gate_proj.weight": random(EXPERTS, 8),
        f"{layer}.gate.weight": random(EXPERTS, 8),
        f"{layer}.gate.e_score_correction_bias": random(EXPERTS),
        f"{layer}.experts.e_score_correction_bias": random(EXPERTS),
        f"{layer}.switch_mlp.up_proj.weight": random(EXPERTS, 4, 8),
        f"{layer}.shared_experts.up_proj.weight": random(EXPERTS, 8),
        "transformer.blocks.2.ffn.experts.mlp.w1": random(EXPERTS * 4, 8),
    }
    for expert in range(EXPERTS):
        found[f"model.layers.3.mlp.experts.{expert}.up_proj.weight"] = random(4, 8)
    return found


def load(folder: Path, owned: dict[int, tuple[int, ...]], count: int) -> tuple[int, dict]:
    """Bytes read, and the arrays by name."""
    pieces = select(read_tensors(folder), EXPERTS, owned, count)
    with Reader() as reader:
        return_value = {piece.name: reader.read(piece) for piece in pieces}
        for piece in pieces:
            array = placeholder(piece)
            assert (array.shape, array.dtype) == (piece.shape, return_value[piece.name].dtype)
    assert reader.bytes_read == sum(piece.nbytes for piece in pieces)
    return reader.bytes_read, return_value


@pytest.mark.parametrize("ids", [(0, 1, 2), (5,), (0, 2, 5), (1, 2, 4, 5), ()])
def test_own_experts_are_renumbered_and_the_rest_is_whole(
    ids: tuple[int, ...], arrays: dict[str, mx.array], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, arrays)
    count = max(1, len(ids))
    bytes_read, loaded = load(folder, {1: ids, 2: ids, 3: ids}, count)
    own = list(ids)
    want = {name: np.array(a) for name, a in arrays.items()}

    def padded(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.zeros((count - len(own), *rows.shape[1:]), np.float32)])

    name = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    want[name] = padded(want[name][own])
    name = "transformer.blocks.2.ffn.experts.mlp.w1"
    want[name] = padded(want[name].reshape(EXPERTS, 4, 8)[own]).reshape(-1, 8)
    stack = [want.pop(f"model.layers.3.mlp.experts.{e}.up_proj.weight") for e in range(EXPERTS)]
    for local, rows in enumerate(padded(np.stack(stack)[own])):
        want[f"model.layers.3.mlp.experts.{local}.up_proj.weight"] = rows
    assert loaded.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(np.array(loaded[name]), value, err_msg=name)
    dense = sum(a.nbytes for n, a in arrays.items() if "w1" not in n and "switch" not in n)
    dense -= EXPERTS * 4 * 8 * 4
    assert bytes_read == dense + len(own) * 3 * (4 * 8 * 4)


def test_a_missing_expert_is_named_as_the_checkpoint_would(arrays: dict, tmp_path: Path) -> None:
    del arrays["model.layers.3.mlp.experts.4.up_proj.weight"]
    tensors = read_tensors(checkpoint(tmp_path, arrays))
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.experts\.4\.up_proj\.weight"):
        select(tensors, EXPERTS, {3: (3, 4)}, 2)
    select(tensors, EXPERTS, {3: (3, 5)}, 2)  # whoever does not own it does not care


def test_a_file_that_shrinks_meanwhile_is_an_error(arrays: dict, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, arrays, files=1)
    pieces = select(read_tensors(folder), EXPERTS, {}, 1)
    path = folder / "model-0.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with Reader() as reader, pytest.raises(ModelError, match=r"model-0\.safetensors is truncated"):
        for piece in pieces:
            reader.read(piece)


def test_a_file_that_vanishes_meanwhile_is_an_error(arrays: dict, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, arrays, files=1)
    pieces = select(read_tensors(folder), EXPERTS, {}, 1)
    (folder / "model-0.safetensors").unlink()
    with Reader() as reader, pytest.raises(ModelError, match="cannot be read at tensor"):
        reader.read(pieces[0])


@pytest.mark.parametrize("dtype", sorted(MLX_DTYPES))
def test_every_dtype_arrives_as_mlx_itself_would_load_it(dtype: str, tmp_path: Path) -> None:
    """Scalars and empty tensors included."""
    header: dict[str, object] = {}
    rng = np.random.default_rng(0)
    data = b""
    for name, shape in {"scalar": (), "empty": (0, 3), "matrix": (EXPERTS, 5)}.items():
        size = math.prod(shape) * MLX_DTYPES[dtype].size
        values = rng.integers(0, 2 if dtype == "BOOL" else 100, size, np.uint8)
        span = [len(data), len(data) + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += values.tobytes()
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    _, loaded = load(tmp_path, {}, 1)
    for name, theirs in mx.load(str(path)).items():
        assert loaded[name].dtype == theirs.dtype and loaded[name].shape == theirs.shape
        assert mx.array_equal(loaded[name], theirs, equal_nan=True)


def test_the_layer_is_the_first_number_of_a_name() -> None:
    assert layer_of("language_model.model.layers.12.mlp.experts.3.w1") == 12
    assert layer_of("transformer.h.0.moe.mlp.3.fc1.weight") == 0
    assert layer_of("lm_head.weight") is None
