"""What bad input gets: one line naming the culprit, exit code 2, nothing left behind.

What needs no model and no nodes is in tests/unit/cli/test_refusals.py.
"""

from __future__ import annotations

import json
import shutil
import socket
import struct
from pathlib import Path

import pytest

from tests.cluster.conftest import Commands
from zmoe.checkpoint.hub import resolve_model

TINY = resolve_model("zmoe-tiny")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_a_prompt_that_is_too_long(commands: Commands) -> None:
    context = json.loads((TINY / "config.json").read_text())["max_seq_len"]
    line = commands.refused("word " * (2 * context))
    assert f"context {context}" in line


def test_models_that_are_none(commands: Commands, copy: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in commands.refused("--model", empty, "x")
    assert "nowhere" in commands.refused("--model", tmp_path / "nowhere", "x")
    done = commands.run("--model", "some-org/some-model", "x")  # offline from its start on
    assert "some-org/some-model" in commands.refusal(done)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    assert str(copy) in commands.refused("--model", copy, "x")


def test_models_of_another_kind(commands: Commands, copy: Path) -> None:
    llama = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32,
    }
    (copy / "config.json").write_text(json.dumps(llama))
    assert "llama" in commands.refused("--model", copy, "x")
    (copy / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    assert "no_such_model" in commands.refused("--model", copy, "x")
    (copy / "config.json").write_text("{")
    assert "config.json" in commands.refused("--model", copy, "x")


def test_unknown_quantisation(commands: Commands, copy: Path) -> None:
    """Refused before any weight is looked at; the tensor and its mode are named."""
    file = copy / "config.json"
    config = json.loads(file.read_text())
    for settings, words in [
        ({"bits": 4, "group_size": 64, "mode": "fp3"}, "mode 'fp3'"),
        ({"bits": 4, "group_size": 48}, "groups of 48 in mode affine"),
        ({"bits": 7, "group_size": 64}, "bits 7 in mode affine"),
        ({"bits": 4, "group_size": 64, "lm_head": {"mode": "mxfp5"}}, "lm_head has the unknown"),
        ([4], "quantization is not an object"),
    ]:
        file.write_text(json.dumps({**config, "quantization": settings}))
        line = commands.refused("--model", copy, "x")
        assert words in line and str(file) in line


def test_damaged_weights(commands: Commands, copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", whole[:8])
    for damaged in (
        whole[: len(whole) // 2],
        whole[:100],
        b"",
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"\0" * header_bytes + whole[8 + header_bytes :],
    ):
        file.write_bytes(damaged)
        assert "model.safetensors" in commands.refused("--nodes", 2, "--model", copy, "x")


def test_a_missing_tensor_is_named(commands: Commands, copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + header_bytes])
    name = next(n for n in header if "router" in n)
    del header[name]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + header_bytes :])
    assert name.rpartition("blocks.")[2] in commands.refused("--nodes", 2, "--model", copy, "x")


def test_more_nodes_than_experts(commands: Commands) -> None:
    assert "16 experts" in commands.refused("--nodes", 17, "x")


def test_a_port_in_use(commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in commands.refused("-n", 2, "--starting-port", port, "x")


def test_nodes_that_do_not_come(commands: Commands, free_port: int) -> None:
    """The user is told how to start them."""
    manual = ("--manual", "--starting-port", free_port, "--join-timeout", 0.5)
    done = commands.run("-n", 3, *manual, "x")
    assert done.returncode == 2
    *wanted, line = done.stderr.splitlines()
    start = f"zmoe-node --leader 127.0.0.1:{free_port} --bind 127.0.0.1 --rank"
    assert wanted[1:] == [f"{start} 1", f"{start} 2"]
    assert "node 1, 2 has not joined" in line


def test_loading_that_takes_too_long(commands: Commands) -> None:
    """The leader's own loading counts as everybody's does."""
    line = commands.refused("-n", 2, "--model", TINY, "--load-timeout", 0.0001, "x")
    assert "node 0 has not loaded its share within 0.0001 s" in line
