"""bench/planner.py: what is predicted beside what real nodes do."""

from __future__ import annotations

import importlib
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from tests.bench.programs import BENCH, call, report_of
from zmoe.calibration import matmuls
from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.config import POLICIES, SCHEDULES
from zmoe.perf.profile import Profile, read_profile, write_profile

FEW = ("-p", "4", "-m", "4", "--repetitions", "1")


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "here.json"
    write_profile(path, Profile(MACHINES["epyc"], LINKS["10gbe"]))
    return str(path)


def test_every_configuration_is_predicted_and_run(
    profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside each run little is measured: a small file's matmuls, once, in one process."""
    monkeypatch.syspath_prepend(str(BENCH))
    planner = importlib.import_module("planner")
    monkeypatch.setattr(planner, "ROUNDS", 1)
    monkeypatch.setattr(matmuls, "FILE_BYTES", 256 << 20)
    monkeypatch.setattr(matmuls, "core_sharings", partial(matmuls.core_sharings, 1))
    few = ("--nodes", "1,2", "--schedules", "centralized", "--policies", "selected")
    report = report_of("planner.py", "zmoe-tiny", *few, "--profile", profile, "--beside", *FEW)
    rows = report["results"]
    assert [(row["nodes"], row["schedule"], row["policy"]) for row in rows] == [
        (1, "centralized", "selected"),
        (2, "centralized", "selected"),
    ]
    assert [row["executed_experts"] for row in rows] == [4, 2.6462]
    for row in rows:
        assert row["measured_tps"] > 0
        assert row["error"] == pytest.approx(row["predicted_tps"] / row["measured_tps"] - 1, 0.1)
        parts = row["predicted"].values()
        assert 1000 / sum(parts) == pytest.approx(row["predicted_tps"], rel=0.02)
        assert row["beside_tps"] > 0
    for name in ("error", "beside_error"):
        each = [abs(row[name]) for row in rows]
        assert report[f"{name}s"] == {
            "configurations": 2,
            "median": statistics.median(each),
            "worst": max(each),
        }
    for show in (planner.markdown, planner.show):
        monkeypatch.setenv("COLUMNS", "300")
        show(report)
        text = capsys.readouterr().out
        assert text.count("selected") == 2 and "2 configurations" in text


def test_configurations_are_all_that_differ(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    planner = importlib.import_module("planner")
    monkeypatch.setattr(sys, "argv", ["planner.py", "zmoe-tiny", "--nodes", "1,2"])
    found = planner.configurations(planner.arguments(), read_profile(Path(profile)))
    assert [(each.nodes, each.schedule, each.policy) for each in found] == [
        (1, "decentralized", "selected"),
        (1, "decentralized", "busy-full"),
        *product((2,), SCHEDULES, POLICIES),
    ]


def test_bad_input_is_one_line(profile: str, tmp_path: Path) -> None:
    for arguments, status, words in (
        (("nowhere/at-all", "--profile", profile), 1, "nowhere/at-all"),
        (("zmoe-tiny", "--profile", str(tmp_path / "no.json")), 1, "no.json cannot be read"),
        (("zmoe-tiny", "--profile", profile, "--nodes", "17"), 1, "17 nodes are more than the 16"),
        (("zmoe-tiny", "--policies", "some"), 2, "'some' is none of selected"),
        (("zmoe-tiny", "-m", "1"), 2, "--max-tokens"),
        (("zmoe-tiny", "--markdown", "--json"), 2, "exclude each other"),
        (("never-measured", "--kept"), 1, "keeps no 'planner never-measured'"),
    ):
        done = call("planner.py", *arguments)
        assert done.returncode == status, done.stderr
        assert words in done.stderr.splitlines()[-1], done.stderr
        assert done.stdout == "" and "Traceback" not in done.stderr
