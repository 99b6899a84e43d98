"""bench/decode.py beside other engines, and bench/perplexity.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.programs import BENCH, DEADLINE_S, END_S, make_model, report_of, run

FEW = ("-p", "8", "-m", "4", "--runs", "1")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantised Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("bench") / "qwen"
    return make_model(folder, "--family", "qwen3_moe", "--dtype", "bfloat16", "--bits", "4")


@pytest.fixture(scope="module")
def converted(qwen: Path) -> Path:
    """The same with its GGUF file beside it; skipped where llama.cpp is not installed."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    path = qwen.with_name("qwen.gguf")
    if not path.exists():
        done = run("peers/gguf_model.py", str(qwen), str(path))
        assert done.returncode == 0, done.stderr
    return qwen


def by_engine(report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["engine"], row["nodes"]): row for row in report["results"]}


def test_engines_stand_in_one_report(converted: Path) -> None:
    peers = ("--peers", "llama.cpp,llama.cpp-rpc,mlx-lm")
    report = report_of("decode.py", str(converted), "--nodes", "1,2", *FEW, *peers)
    if "RPC" in report["absent"].get("llama.cpp-rpc", ""):
        pytest.skip("llama-cpp-python was built without RPC")
    assert report["absent"] == {}
    rows = by_engine(report)
    expected = {("zmoe", 1), ("zmoe", 2), ("llama.cpp", 1), ("llama.cpp-rpc", 2), ("mlx-lm", 1)}
    assert set(rows) == expected
    for row in rows.values():
        assert (row["prompt_tokens"], row["generation_tokens"]) == (8, 4)
        assert row["prompt_tps"] > 0 and row["generation_tps"] > 0 and row["peak_memory"] > 0
        assert row["generation_ratio"] > 0
    assert {"experts_ms", "exchange_ms", "other_ms", "spans_ms"} <= set(rows["zmoe", 2])
    assert set(report["environment"]["builds"]) == {"llama.cpp", "llama.cpp-rpc", "mlx-lm"}


def test_without_its_file_llama_cpp_is_absent_and_that_is_no_error(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "made")
    report = report_of("decode.py", str(folder), "--nodes", "1", *FEW, "--peers", "llama.cpp")
    assert "no made.gguf" in report["absent"]["llama.cpp"]
    (row,) = report["results"]
    assert row["engine"] == "zmoe" and "generation_ratio" not in row


def test_what_is_not_installed_is_absent(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')")
    (tmp_path / "any.gguf").write_text("")
    peers = ("--peers", "llama.cpp", "--gguf", str(tmp_path / "any.gguf"), "--json")
    path = {"PYTHONPATH": str(tmp_path)}
    done = run("decode.py", str(qwen), "--nodes", "1", *FEW, *peers, env=path)
    assert done.returncode == 0, done.stderr
    assert "not here" in json.loads(done.stdout)["absent"]["llama.cpp"]


def test_what_is_installed_and_fails_is_an_error(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("")  # imports, and then has nothing to offer
    (tmp_path / "any.gguf").write_text("")
    peers = ("--peers", "llama.cpp", "--gguf", str(tmp_path / "any.gguf"), "--json")
    path = {"PYTHONPATH": str(tmp_path)}
    done = run("decode.py", str(qwen), "--nodes", "1", *FEW, *peers, env=path)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["absent"]["llama.cpp"].startswith("failed: ")
    assert [row["engine"] for row in report["results"]] == ["zmoe"]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
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


def test_perplexity_has_a_row_for_each_configuration(text: Path) -> None:
    some = ("--tokens", "100", "--context", "32", "--compute", "mlx", "--weights", "plain,8,mxfp4")
    rows = report_of("perplexity.py", str(text), *some)["results"]
    found = [(row["weights"], row["compute"], row["activations"]) for row in rows]
    assert found == [(name, "mlx", "exact") for name in ("plain", "8", "mxfp4")]
    plain, eight, four = (row["nats_per_token"] for row in rows)
    assert rows[0]["tokens"] == 99
    assert 0.5 < plain < 6  # a guess among all tokens would be 6.9
    assert abs(eight - plain) < abs(four - plain)


def test_kernels_lose_what_mlx_loses_and_int8_little_more(text: Path) -> None:
    some = ("--tokens", "60", "--context", "32", "--weights", "4")
    rows = report_of("perplexity.py", str(text), *some, "--compute", "mlx,native")["results"]
    found = {(row["compute"], row["activations"]): row["nats_per_token"] for row in rows}
    assert set(found) == {("mlx", "exact"), ("native", "exact"), ("native", "int8")}
    assert found["native", "exact"] == pytest.approx(found["mlx", "exact"], abs=1e-3)
    assert found["native", "int8"] == pytest.approx(found["mlx", "exact"], abs=0.1)


def test_perplexity_is_the_same_token_by_token(text: Path) -> None:
    some = ("--tokens", "40", "--context", "16", "--compute", "mlx", "--weights", "plain")
    (whole,) = report_of("perplexity.py", str(text), *some)["results"]
    (stepped,) = report_of("perplexity.py", str(text), *some, "--step-by-step")["results"]
    assert whole["nats_per_token"] == pytest.approx(stepped["nats_per_token"], abs=1e-4)
    assert whole["tokens"] == stepped["tokens"] == 39
