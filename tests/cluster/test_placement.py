"""Placements in real runs: the same text whoever owns what, explained, recorded, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Commands
from zmoe.checkpoint.hub import resolve_model
from zmoe.loading import Skeleton, describe

TINY = describe(Skeleton(resolve_model("zmoe-tiny")))
RECORD = ("--speculate", "off", "--record-usage")  # wrong drafts are run, and counted, as well
RUN = ("--temp", 0, "-m", 24, "ROMEO:")


def text(commands: Commands, *arguments: object) -> tuple[str, str]:
    """What a run prints on standard output, and on standard error."""
    done = commands.call("run", *arguments, *RUN)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def alone(commands: Commands) -> str:
    return text(commands)[0]


def test_whoever_owns_what(commands: Commands, alone: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    layers = [[[*range(10)], [], [8, 9, *range(10, 16)]], [[*range(16)], [3], [4, 5, 15]]]
    record = {"experts": 16, "nodes": 3, "owned": layers * 2, "speeds": [1, 5, 3]}
    file.write_text(json.dumps(record))
    found, said = text(commands, "-n", 3, "--placement", file, "--explain")
    assert found == alone
    assert f"placement: {file} (as the file says)" in said
    assert "node 1: 0 to 1 experts per layer (the first layer: none)" in said
    assert "node 2: 3 to 8 experts per layer (the first layer: 8-15), 2.5 of them also" in said


def test_the_default_explained(commands: Commands, alone: str) -> None:
    found, said = text(commands, "-n", 2, "--explain", "--memory-limit", 4)
    assert found == alone
    lines = said.splitlines()
    assert lines[0] == "placement: experts (no other is predicted to be 3% faster)"
    assert lines[1].startswith("  node 0: 8 experts per layer (each layer: 0-7); 3 MiB of")
    assert lines[2].startswith("  node 1: 8 experts per layer (each layer: 8-15); 3 MiB of")
    labels = [line.split("  ")[1] for line in lines[4:8]]
    assert labels == ["experts", "experts by speed", "replicas", "slices"]
    assert lines[8] == "links: not encrypted"
    assert [line.split(", ports ")[0] for line in lines[9:]] == [
        "  node 0: 127.0.0.1",
        "  node 1: 127.0.0.1",
    ]


def test_usage_is_recorded_added_up_and_taken(
    commands: Commands, alone: str, tmp_path: Path
) -> None:
    file = tmp_path / "usage.json"
    counts, rows = [], 0
    for nodes in (1, 2):
        run = json.loads(text(commands, "-n", nodes, *RECORD, file, "--json")[0])
        rows += run["prompt_tokens"] + run["generation_tokens"] - 1  # the last is not run
        record = json.loads(file.read_text())
        assert record["fingerprint"] == TINY.fingerprint
        counts.append(record["counts"])
    one, both = counts
    assert both == [[2 * count for count in layer] for layer in one]
    assert len(one) == 4 and all(len(layer) == 16 for layer in one)
    assert [sum(layer) for layer in both] == [rows * TINY.top_k] * 4
    hottest = max(range(16), key=lambda expert: both[0][expert])
    # Room for 11 of the 16 experts of each layer: 256 MiB for the program, 1.8 for the rest.
    limit = (256 * 2**20 + TINY.dense_bytes + 44.5 * TINY.expert_bytes) / 2**30
    arguments = ("-n", 2, "--placement", "replicas", "--memory-limit", limit, "--explain")
    found, said = text(commands, *arguments, "--usage", file)
    assert found == alone
    owned = [line.partition("the first layer: ")[2] for line in said.splitlines()[1:3]]
    for ids in owned:
        ranges = ids.partition(")")[0].split(", ")
        assert any(int(r.split("-")[0]) <= hottest <= int(r.split("-")[-1]) for r in ranges)


GOOD: dict[str, Any] = {"experts": 16, "nodes": 2, "owned": [[*range(8)], [*range(8, 16)]]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**GOOD, "owned": [[*range(8)], [*range(9, 16)]]}, "layer 0: no node owns expert 8"),
        ({**GOOD, "owner": 1}, "unknown field owner"),
        ({**GOOD, "nodes": 3}, "is for 3 nodes, the run has 2"),
        ({**GOOD, "experts": 8}, "of 8 experts in 4 layers does not fit"),
        (
            {**GOOD, "slices": [[0, 32], [32, 64]]},
            "this model's experts are cut at multiples of 64",
        ),
        ("{", "is not JSON"),
    ],
)
def test_files_that_are_refused(
    commands: Commands, tmp_path: Path, record: Any, words: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(record if isinstance(record, str) else json.dumps(record))
    line = commands.refused("-n", 2, "--placement", file, "x")
    assert words in line and str(file) in line


def test_what_does_not_fit(commands: Commands, tmp_path: Path) -> None:
    line = commands.refused("-n", 2, "--memory-limit", 0.25, "x")
    assert "zmoe-tiny does not fit 2 nodes" in line and "MiB are missing per node" in line
    file = tmp_path / "greedy.json"
    file.write_text(json.dumps({**GOOD, "owned": [[*range(16)], [0]]}))
    limit = (256 * 2**20 + TINY.dense_bytes + 40.5 * TINY.expert_bytes) / 2**30
    line = commands.refused("-n", 2, "--memory-limit", limit, "--placement", file, "x")
    assert f"placement {file}: node 0 has no room for expert 8 of layer 2" in line


def test_flags_that_are_refused(commands: Commands, tmp_path: Path) -> None:
    profile = tmp_path / "usage.json"
    counts = [[1] * 16] * 4
    profile.write_text(json.dumps({"zmoe_usage": 1, "fingerprint": "beef", "counts": counts}))
    for arguments, words in (
        (
            ("--placement", "copies"),
            "--placement is copies: expected auto, experts, replicas, slices",
        ),
        (("--placement", "slices"), "cut in steps of 64: 1 slices at most, not 2"),
        (("--usage", profile), f"usage profile {profile} is of another model"),
        (("--usage", profile, "--placement", "experts"), "--usage has no use"),
        (("--record-usage", profile), f"usage profile {profile} is of another model"),
        (("--record-usage", tmp_path / "no" / "u"), "no such folder"),
        (("--memory-limit", 0), "--memory-limit is 0"),
        (("--memory-limit", "nan"), "--memory-limit is nan"),
    ):
        assert words in commands.refused("-n", 2, *arguments, "x")
