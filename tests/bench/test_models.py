"""What bench/make_model.py writes."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from tests.bench.programs import call, make_model


def header(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor in `folder`."""
    with (folder / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__")
    return {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("qwen3_moe", ("--bits", "4", "--group-size", "64"), ("-q", "--q-bits", "4")),
        ("qwen3_moe", ("--mode", "mxfp4"), ("-q", "--q-mode", "mxfp4")),
        (
            "mixtral",
            ("--bits", "8", "--group-size", "32"),
            ("-q", "--q-bits", "8", "--q-group-size", "32"),
        ),
        ("dbrx", ("--bits", "16"), ()),
        ("qwen3_next", ("--bits", "4"), ("-q",)),
        ("qwen3_5_moe", ("--bits", "4"), ("-q",)),
    ],
)
def test_checkpoints_are_what_mlx_lm_converts_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    ours: Sequence[str],
    theirs: Sequence[str],
) -> None:
    flags = ("--family", family, "--dtype", "bfloat16")
    plain = make_model(tmp_path / "plain", *flags)
    made = make_model(tmp_path / "made", *flags, *ours)
    words = ["--hf-path", str(plain), *theirs, "--mlx-path", str(tmp_path / "converted")]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.convert", *words])
    importlib.import_module("mlx_lm.convert").main()
    assert header(made) == header(tmp_path / "converted")
    assert config(made) == config(tmp_path / "converted")


@pytest.mark.parametrize("flags", [("--bits", "4"), ("--mode", "mxfp4"), ("--dtype", "float32")])
def test_random_models_compute_finite_numbers_and_differ_by_expert(
    tmp_path: Path, flags: Sequence[str]
) -> None:
    folder = make_model(tmp_path / "made", "--family", "qwen3_moe", *flags)
    model = mlx_lm.load(str(folder))[0]
    logits = model(mx.array([[1, 2, 3, 4]])).astype(mx.float32)
    assert mx.isfinite(logits).all().item()
    assert 0.05 < logits.std().item() < 5
    experts = model.model.layers[0].mlp.switch_mlp.gate_proj.weight
    assert not any((experts[0] == other).all().item() for other in experts[1:])


class Recorder(nn.Module):
    """Stands in for a linear layer and keeps what it puts out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(self.layer(x))
        return self.seen[-1]


def test_random_routers_go_on_to_use_all_experts(tmp_path: Path) -> None:
    flags = ("--family", "qwen3_moe", "--layers", "8", "--experts", "16", "--top-k", "4")
    model = mlx_lm.load(str(make_model(tmp_path / "made", *flags)))[0]
    gates = [Recorder(layer.mlp.gate) for layer in model.layers]
    for layer, gate in zip(model.layers, gates):
        layer.mlp.gate = gate
    model(mx.random.randint(0, 1024, (1, 256), key=mx.random.key(0)))
    for gate in gates:
        (logits,) = gate.seen
        chosen = np.argsort(np.array(logits[0]))[:, -4:]
        uses = np.bincount(chosen.ravel(), minlength=16)  # 64 each, were they even
        assert uses.min() > 24 and uses.max() < 128


def test_a_shape_is_a_preset_that_flags_change(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    done = call(
        "make_model.py", str(folder), "--shape", "medium", "--layers", "1", "--experts", "8"
    )
    assert done.returncode == 0, done.stderr
    read = config(folder)
    assert read["model_type"] == "qwen3_moe" and read["torch_dtype"] == "bfloat16"
    assert (read["num_hidden_layers"], read["num_experts"]) == (1, 8)
    assert (read["hidden_size"], read["head_dim"], read["num_key_value_heads"]) == (2048, 128, 16)
    assert (read["moe_intermediate_size"], read["vocab_size"]) == (1024, 16384)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (("--bits", "7"), "bits 7"),
        (("--bits", "16", "--mode", "mxfp4"), "--mode"),
        (("--bits", "16", "--dtype", "float32"), "float32"),
        (("--bits", "4", "--group-size", "48"), "group size 48"),
        (("--mode", "mxfp4", "--bits", "3"), "mxfp4"),
        (("--mode", "ternary"), "ternary"),
        (("--shape", "large"), "large"),
        (("--seed", "-1"), "--seed"),
        (("--family", "dbrx", "--head-dim", "64"), "--head-dim"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_no_folder(
    tmp_path: Path, flags: Sequence[str], culprit: str
) -> None:
    done = call("make_model.py", str(tmp_path / "made"), *flags)
    assert done.returncode == 2
    assert culprit in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "made").exists()


def test_no_folder_is_overwritten(tmp_path: Path) -> None:
    done = call("make_model.py", str(tmp_path))
    assert done.returncode == 2
    assert "exists already" in done.stderr
