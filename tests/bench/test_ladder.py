"""bench/ladder.py: its rungs, its sums, and the paper's starting point."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from tests.bench.programs import BENCH, call, make_model, report_of, run
from zmoe import config

PROMPT = "ROMEO:\nBut soft, "
TINY = BENCH.parent / "zmoe" / "data" / "zmoe-tiny"
FEW = ("-p", "8", "-m", "4", "--runs", "1")


@pytest.fixture
def rungs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("rungs")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    return importlib.import_module("recording")


def greedy(folder: Path, prompt: str, count: int) -> list[int]:
    """mlx-lm's own continuation, in this process."""
    model, tokenizer, *_ = mlx_lm.load(str(folder))
    ids = mx.array(tokenizer.encode(prompt))
    return [int(token) for token, _ in generate_step(ids, model, max_tokens=count)]


def test_naive_writes_what_mlx_lm_writes() -> None:
    words = ("--nodes", "3", "--prompt", PROMPT, "-n", "16", "-r", "1", "--no-warm-up")
    done = run("peers/naive.py", str(TINY), *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tokens"] == greedy(TINY, PROMPT, 16)
    assert len(told["peak_memory"]) == 3


def test_every_rung_that_can_run_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "ladder.svg"
    few = ("--nodes", "2", "--rungs", "naive,P,D,slices,int8", *FEW, "--plot", str(plot))
    report = report_of("ladder.py", "zmoe-tiny", *few)
    rows: dict[str, dict[str, Any]] = {row["rung"]: row for row in report["results"]}
    assert list(rows) == ["naive", "P", "D", "int8"]  # experts of one step
    assert list(report["absent"]) == ["slices, 2 nodes"]
    assert "1 slices at most, not 2" in report["absent"]["slices, 2 nodes"]
    for row in rows.values():
        assert (row["prompt_tokens"], row["generation_tokens"]) == (8, 4)
        parts = [row[f"layer_{part}_ms"] for part in ("experts", "exchange", "other")]
        assert sum(parts) == pytest.approx(row["layer_ms"], abs=1e-3)
        assert row["layer_experts_ms"] > 0
        assert row["exchange_share"] == pytest.approx(parts[1] / row["layer_ms"], abs=1e-3)
    against = {name: row.get("generation_ratio") for name, row in rows.items()}
    assert against["naive"] is None
    ratio = rows["P"]["generation_tps"] / rows["naive"]["generation_tps"]
    assert against["P"] == pytest.approx(ratio, abs=1e-2)
    assert ("P", "D") in {
        (pair["centralized"], pair["decentralized"]) for pair in report["exchange_ratios"]
    }
    assert report["limits"]["read_gb_per_s"]["1"] > 0
    assert {row["transport"] for row in report["limits"]["exchange_us"]} >= {"raw-tcp", "zmoe"}
    assert plot.read_text().startswith("<?xml")
    monkeypatch.syspath_prepend(str(BENCH))
    shown = importlib.import_module("ladder_report")
    for show in (shown.markdown, shown.show):
        show(report)
        text = capsys.readouterr().out
        assert all(text.count(name) >= 2 for name in rows)


def test_a_layer_is_its_busiest_node_and_the_rest_is_exchange(recording: ModuleType) -> None:
    log = [("exchange", 1.0), ("experts", 4.0), ("exchange", 2.0)]  # scatter, own, gather
    log += [("exchange", 1.0), ("exchange", 6.0)]  # none of the chosen experts is its own
    leader = recording.by_layer(log, exchanges=2)
    assert leader.tolist() == [[4.0, 3.0], [0.0, 7.0]]
    told = recording.summary(leader, [leader[:, 0], [5.0, 3.0]])
    # The busiest took 5 and 3 of the leader's 7 and 7.
    assert told == {"experts_ms": 4000.0, "exchange_ms": 3000.0, "exchange_p50_ms": 3000.0}


def test_bytes_are_those_of_the_files(rungs: ModuleType, tmp_path: Path) -> None:
    flags = ("--family", "dbrx", "--experts", "16", "--top-k", "4", "--dtype", "float32")
    info, sizes = rungs.model_bytes(make_model(tmp_path / "made", *flags))
    width, ffn, vocabulary, layers = 128, 128, 1024, 2
    assert sizes.expert == 4 * 3 * width * ffn
    assert sizes.head == 4 * vocabulary * width
    qkv = width * (width + 2 * 64)
    layer = 2 * width + qkv + width * width + 16 * width
    assert sizes.dense == 4 * (layers * layer + width)
    ladder = rungs.RUNGS
    assert sizes.of_all(ladder["P"], info, 2) == sizes.dense + sizes.head + 8 * sizes.expert
    whole = 2 * sizes.dense + sizes.head + layers * 16 * sizes.expert
    assert sizes.of_all(ladder["D"], info, 2) == whole - layers * 12 * sizes.expert


def test_executed_experts_are_the_papers(rungs: ModuleType, tmp_path: Path) -> None:
    flags = ("--family", "dbrx", "--experts", "16", "--top-k", "4")
    info, _ = rungs.model_bytes(make_model(tmp_path / "made", *flags))
    expected = {("P", 2): 2.6462, ("P", 4): 1.9692, ("P+L_B", 4): 4, ("slices", 4): 1}
    for (name, nodes), count in expected.items():
        assert rungs.RUNGS[name].executed(info, nodes) == pytest.approx(count, abs=1e-4)
    assert rungs.RUNGS["P+L_R"].executed_by_all(info, 2) == pytest.approx(2 * 2.6462, abs=1e-3)
    assert rungs.RUNGS["replicas"].executed(info, 2) is None


def told_to(peer: ModuleType, rung: Any, patch: pytest.MonkeyPatch) -> Any:
    """What bench/peers/zmoe_cluster.py makes of the flags of `rung`."""
    flags = ["zmoe-tiny", "--nodes", "2", "--about", *rung.flags()]
    patch.setattr(sys, "argv", ["zmoe_cluster.py", *flags])
    return peer.program()


def test_zmoe_has_every_rung_and_refuses_what_it_does_not_have(
    rungs: ModuleType, recording: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, process = (importlib.import_module(name) for name in ("zmoe_cluster", "process"))
    for rung in rungs.RUNGS.values():
        if rung.settings:
            assert "zmoe" in told_to(peer, rung, monkeypatch)["build"]
    monkeypatch.setattr("zmoe.config.ACTIVATIONS", ("exact",))
    monkeypatch.setattr("zmoe.config._fields_of", config._fields_of.__wrapped__)
    with pytest.raises(process.PeerFailure, match="activations is 'int8'") as failure:
        told_to(peer, rungs.RUNGS["int8"], monkeypatch)
    assert failure.value.status in importlib.import_module("ladder").REFUSED


def test_nothing_kept_is_one_line() -> None:
    done = call("ladder.py", "never-measured", "--kept")
    assert done.returncode == 1
    assert "never-measured" in done.stderr and "Traceback" not in done.stderr
