"""The programs in bench/, with little to measure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.bench.programs import BENCH, DEADLINE_S, END_S, call, processes, report_of, run

QUICK = ("--nodes", "2", "--bytes", "64,4096", "--iterations", "20", "--rounds", "1")


def test_exchange_gives_a_row_for_each_combination() -> None:
    transports = ["raw-tcp", "zmoe-c", "zmoe", "pyzmq"]
    report = report_of("exchange.py", *QUICK, "--transports", ",".join(transports))
    assert report["absent"] == {}
    rows = report["results"]
    found = {(row["transport"], row["nodes"], row["bytes"]) for row in rows}
    assert found == {(name, 2, size) for name in transports for size in (64, 4096)}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)


def test_exchange_times_our_ways_side_by_side() -> None:
    ways = ("--algorithm", "auto,scatter", "--wire-dtype", "f32,q8")
    report = report_of("exchange.py", *QUICK, "--transports", "zmoe-c", *ways)
    found = {row["transport"] for row in report["results"]}
    assert found == {"zmoe-c", "zmoe-c-q8", "zmoe-c-scatter", "zmoe-c-scatter-q8"}


def test_attention_has_a_row_for_each_kind_and_context() -> None:
    little = ("--rounds", "1", "--budget", "0.01", "--megabytes", "1", "--cores", "1")
    report = report_of("attention.py", "--contexts", "64,192", "--rows", "1,3", *little)
    rows = report["results"]
    found = [(row["kind"], row["rows"], row["context"]) for row in rows]
    kinds = ("bf16", "8bit", "latent")
    assert found == [(kind, n, context) for kind in kinds for n in (1, 3) for context in (64, 192)]
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 and row["gflop_per_s"] > 0 for row in rows)


def test_graph_has_a_row_for_each_form(tmp_path: Path) -> None:
    shape = ("--layers", "2", "--hidden", "64", "--heads", "4", "--vocab", "1024")
    made = call("make_model.py", str(tmp_path / "m"), "--family", "qwen3_moe", *shape)
    assert made.returncode == 0, made.stderr
    report = report_of("graph.py", str(tmp_path / "m"), "--runs", "1", "-m", "2")
    rows = {row["row"]: row for row in report["results"]}
    assert list(rows) == ["mlx-lm", "one node", "a slice", "evaluated", "zmq", "ring"]
    assert rows["mlx-lm"]["to_mlx_lm"] == rows["ring"]["to_ring"] == 1.0
    assert all(row["ms"] == row["runs"][0] > 0 for row in rows.values())
    zmq, beyond_ms = rows["zmq"], rows["zmq"]["ms"] - rows["a slice"]["ms"]
    assert zmq["beyond_us_per_layer"] == pytest.approx(1e3 * beyond_ms / 2, abs=2)  # layers
    host = zmq["beyond_us_per_layer"] - zmq["exchange_us_per_layer"]
    assert zmq["host_us_per_layer"] == pytest.approx(host, abs=2)


def test_what_is_not_installed_is_named_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("raise ImportError('not here')")
    names = ("--transports", "grpc,mpi", "--json")
    path = {"PYTHONPATH": str(tmp_path), "PATH": str(tmp_path)}
    done = run("exchange.py", *QUICK, *names, env=path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["results"] == []
    assert set(report["absent"]) == {"grpc", "mpi"}
    assert "not here" in report["absent"]["grpc"]


def test_what_fails_is_named_and_an_error(tmp_path: Path) -> None:
    package = tmp_path / "grpc"
    package.mkdir()
    (package / "__init__.py").write_text("")  # imports, and then has nothing to offer
    path = {"PYTHONPATH": str(tmp_path)}
    done = run("exchange.py", *QUICK, "--transports", "grpc,raw-tcp", "--json", env=path)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert {row["transport"] for row in report["results"]} == {"raw-tcp"}
    assert report["absent"]["grpc"].startswith("failed: ")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("exchange.py", "--transports", "carrier-pigeon"), "carrier-pigeon"),
        (("exchange.py", "--nodes", "1"), "--nodes"),
        (("exchange.py", "--bytes", "13"), "--bytes"),
        (("exchange.py", "--round", "1"), "--round"),
        (("exchange.py", "--algorithm", "ring"), "ring"),
        (("exchange.py", "--wire-dtype", "auto"), "auto"),
        (("decode.py", "--runs", "0"), "--runs"),
        (("loading.py",), "model"),
        (("make_model.py", "anywhere", "--heads", "3"), "--heads"),
        (("decode.py", "--nodes", "0"), "--nodes"),
        (("decode.py", "--contexts", "0,100"), "100"),
        (("decode.py", "--contexts", "64", "--prompt", "a"), "--contexts"),
        (("decode.py", "--families", "qwen3_moe,unicorn"), "unicorn"),
        (("decode.py", "--families", "mixtral", "--gguf", "a.gguf"), "--gguf"),
        (("attention.py", "--kinds", "q4"), "q4"),
        (("decode.py", "--nodes", "1x"), "--nodes"),
        (("decode.py", "one", "another"), "another"),
        (("decode.py", "--add", "--kept"), "--kept"),
        (("matmul.py", "--isa", "AVX3"), "AVX3"),
        (("matmul.py", "--outs", "100"), "--outs"),
        (("decode.py", "--peers", "carrier-pigeon"), "carrier-pigeon"),
        (("decode.py", "--prompt", "a", "--peers", "mlx-lm"), "--prompt"),
        (("ladder.py", "zmoe-tiny", "--nodes", "1"), "--nodes"),
        (("ladder.py", "zmoe-tiny", "--rungs", "snake"), "snake"),
        (("ladder.py", "zmoe-tiny", "--kept", "--save"), "--kept"),
        (("perplexity.py", "nowhere"), "nowhere"),
        (("perplexity.py", __file__, "--weights", "9"), "--weights"),
        (("perplexity.py", __file__, "--compute", "mlx", "--activations", "int8"), "int8"),
    ],
)
def test_bad_usage_is_exit_2_and_names_the_culprit(arguments: Sequence[str], culprit: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert culprit in done.stderr.strip().splitlines()[-1]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder whose path is short enough for a Unix socket's."""
    with tempfile.TemporaryDirectory(prefix="zb", dir="/tmp") as folder:
        yield folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_run(short_folder: str, number: signal.Signals) -> None:
    arguments = ["--nodes", "3", "--rounds", "100000", "--transports", "raw-tcp,zmoe,pyzmq"]
    program = subprocess.Popen(
        [sys.executable, str(BENCH / "exchange.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": short_folder},
    )
    try:
        assert program.stderr is not None
        assert b"3 nodes, 64 bytes" in program.stderr.readline()
        assert len(processes(short_folder)) == 9
        program.send_signal(number)
        program.communicate(timeout=DEADLINE_S)
    finally:
        program.kill()
    until = time.monotonic() + END_S
    while processes(short_folder) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes(short_folder) == []


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of make_model.py's."""
    folder = tmp_path_factory.mktemp("bench") / "mixtral"
    sizes = {"--layers": 2, "--hidden": 64, "--heads": 4, "--ffn": 128, "--vocab": 1024}
    words = [word for pair in sizes.items() for word in map(str, pair)]
    done = run("make_model.py", str(folder), *words)
    assert done.returncode == 0, done.stderr
    return folder


def test_loading_accounts_for_every_node(mixtral: Path) -> None:
    # Not in this process: a child's peak counts from that of the process that forked it.
    done = run("loading.py", str(mixtral), "--nodes", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [(row["nodes"], row["rank"]) for row in rows] == [(2, 0), (2, 1)]
    dense = 2 * 1024 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 64 + 8 * 64)
    experts = 2 * 8 * 3 * 64 * 128
    assert [row["share_bytes"] for row in rows] == [4 * (dense + experts // 2)] * 2
    assert all(0 < row["peak_bytes"] <= row["allowed_bytes"] for row in rows)


def test_decode_and_first_token(mixtral: Path) -> None:
    few = ("-m", "4", "--prompt", "a", "--runs", "1", "--no-warm-up")
    (row,) = report_of("decode.py", str(mixtral), "--nodes", "2", *few)["results"]
    assert row["generation_tokens"] == 4
    assert row["generation_tps"] > 0
    one = ("--nodes", "1", "--runs", "1")
    (row,) = report_of("first_token.py", "--model", str(mixtral), *one)["results"]
    assert len(row["runs_s"]) == 1


def test_strangers_has_a_row_for_each_kind() -> None:
    rows = report_of("strangers.py", "--rounds", "2", "--tokens", "4")["results"]
    assert [row["strangers"] for row in rows] == ["silent", "50", "200"]
    assert all(ratio > 0 for row in rows for ratio in row["ratios"] + row["ratios_to_none"])


def test_a_lost_node_ends_a_program(mixtral: Path) -> None:
    few = ("--nodes", "2", "-m", "20", "--prompt", "a", "--runs", "1", "--no-warm-up")
    with patch.dict(os.environ, {"ZMOE_FAIL": "1.before-step:10=kill"}):
        done = call("decode.py", str(mixtral), *few)
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]  # after those that tell what is being measured
    assert "a node was lost, so nothing is measured: node 1 on this machine" in line


def test_a_model_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    for program, nodes in (("decode.py", "1"), ("loading.py", "1"), ("ladder.py", "2")):
        done = call(program, str(tmp_path / "nothing"), "--nodes", nodes)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "nothing" in done.stderr
