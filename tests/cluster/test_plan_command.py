"""zmoe-plan as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Commands
from zmoe.calibration import machine, matmuls, steps
from zmoe.checkpoint.hub import resolve_model
from zmoe.cli.plan.command import main
from zmoe.cli.plan.known_hardware import LINKS, MACHINES
from zmoe.cli.plan.known_models import MODELS
from zmoe.perf.hardware import Machine
from zmoe.perf.measured import MatmulRate
from zmoe.perf.profile import Profile, write_profile

DBRX = ("--model", "dbrx", "--hardware", "m2-ultra", "--link", "10gbe")
TINY = resolve_model("zmoe-tiny")
FEW_FORMATS = ("bf16", "affine-4-g64")


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


class Plan:
    """Runs zmoe-plan in this process: planning starts no other."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, patch

    def __call__(self, *arguments: object, columns: int = 100) -> Done:
        self._patch.setenv("COLUMNS", str(columns))
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
        return Done(code, *self._capsys.readouterr())


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    return Plan(capsys, monkeypatch)


def on_its_own(
    commands: Commands, *arguments: object, patience: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where what is imported depends on the environment."""
    return subprocess.run(
        [sys.executable, "-m", "zmoe.cli.plan.command", *map(str, arguments)],
        env={**commands.env, **env},
        cwd=commands.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience,
    )


def reported(done: Done | subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The object that --json printed."""
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"environment", "results"}
    assert isinstance(report, dict)
    return report


def answer(plan: Plan, *arguments: object) -> dict[str, Any]:
    return reported(plan(*arguments, "--json"))


def refusal(done: Done | subprocess.CompletedProcess[str]) -> str:
    """The one line that a command says which does nothing else."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def refused(plan: Plan, *arguments: object) -> str:
    return refusal(plan(*arguments))


def test_json_has_a_row_for_each_number_of_nodes(plan: Plan) -> None:
    report = answer(plan, *DBRX, "--nodes", "1-4")
    rows = report["results"]
    assert [row["nodes"] for row in rows] == [1, 2, 3, 4]
    assert [row["fits"] for row in rows] == [False, True, True, True]
    assert [round(row["executed_experts_per_node"], 4) for row in rows] == [
        4.0,
        2.6462,
        2.2582,
        1.9692,
    ]
    for row in rows:
        assert set(row["breakdown"]) == {
            f"{term}_ms" for term in ("load", "compute", "latency", "transfer", "overhead")
        }
        assert row["memory_per_node_bytes"] > 0
        assert row["price_usd"] == row["nodes"] * MACHINES["m2-ultra"].price_usd
    for row in rows[1:]:
        assert 1000 / sum(row["breakdown"].values()) == pytest.approx(row["tokens_per_second"])
        assert 0 < row["communication_share"] < 1
        assert row["tokens_per_second_per_usd"] > 0
    assert rows[0]["tokens_per_second"] is None
    environment = report["environment"]
    assert environment["best_nodes"] == 4
    assert environment["hardware"][0]["source"]
    assert environment["link"]["source"]


def test_nodes_take_a_number_a_list_or_a_range(plan: Plan) -> None:
    for text, expected in (("3", [3]), ("4,2", [2, 4]), ("1-2,5", [1, 2, 5])):
        rows = answer(plan, *DBRX, "--nodes", text)["results"]
        assert [row["nodes"] for row in rows] == expected


def test_flags_reach_the_model(plan: Plan) -> None:
    base = answer(plan, *DBRX, "--nodes", 2)["results"][0]

    def changed(*flags: object) -> dict[str, Any]:
        row = answer(plan, *DBRX, "--nodes", 2, *flags)["results"][0]
        assert isinstance(row, dict)
        return row

    assert changed("--bits", 4)["memory_per_node_bytes"] < base["memory_per_node_bytes"] / 3
    assert changed("--policy", "busy-full")["executed_experts_per_node"] == 8
    assert changed("--placement", "slices")["executed_experts_per_node"] == 2
    central = changed("--schedule", "centralized")["memory_by_node_bytes"]
    assert central[1] < central[0]
    assert changed("--batch", 4)["tokens_per_second"] > base["tokens_per_second"]
    assert changed("--context", 9)["breakdown"]["load_ms"] < base["breakdown"]["load_ms"]
    assert changed("--latency-us", 1000)["breakdown"]["latency_ms"] == pytest.approx(41)
    assert changed("--efficiency", 1)["breakdown"]["load_ms"] == pytest.approx(
        0.7 * base["breakdown"]["load_ms"]
    )
    assert changed("--wiring", 100)["breakdown"]["overhead_ms"] > 400
    assert changed("--wire-bits", 32)["breakdown"]["transfer_ms"] == pytest.approx(
        2 * base["breakdown"]["transfer_ms"]
    )
    assert changed("--prompt", 512)["prompt_tokens_per_second"] > base["prompt_tokens_per_second"]


def test_unequal_nodes_and_profiles(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    write_profile(path, Profile(MACHINES["epyc"], LINKS["25gbe"]))
    mixed = answer(plan, "--model", "olmoe", "--hardware", f"m4-max,{path}", "--nodes", 3)
    assert mixed["results"][0]["machines"] == ["m4-max", "epyc", "m4-max"]
    assert mixed["environment"]["link"]["name"] == "25gbe"
    both = answer(plan, "--model", "olmoe", "--hardware", path, "--link", path, "--one-machine")
    prices = {row["price_usd"] for row in both["results"]}
    assert max(prices) == pytest.approx(MACHINES["epyc"].price_usd)


def test_models_by_folder_and_from_the_hubs_cache(
    plan: Plan, commands: Commands, tmp_path: Path
) -> None:
    rest = ("--hardware", "epyc", "--link", "1gbe", "--nodes", 2)
    named = answer(plan, "--model", "zmoe-tiny", *rest)
    assert named["environment"]["model"]["experts"] == 16
    assert answer(plan, "--model", TINY, *rest)["results"] == named["results"]
    cached = tmp_path / "hub" / "models--org--some-moe"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text((TINY / "config.json").read_text())
    named_there = ("--model", "org/some-moe", *rest, "--json")
    hub = reported(on_its_own(commands, *named_there, HF_HOME=str(tmp_path)))
    assert hub["results"] == named["results"]


def test_one_node_needs_no_link(plan: Plan) -> None:
    report = answer(plan, "--model", "olmoe", "--hardware", "epyc", "--nodes", 1)
    assert report["environment"]["link"] is None
    (row,) = report["results"]
    tokens, seconds = report["environment"]["workload"]["prompt"], row["first_token_seconds"]
    assert row["prompt_tokens_per_second"] == pytest.approx(tokens / seconds)


def test_the_default_is_as_many_nodes_as_there_are_experts(plan: Plan, tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text())
    config["ffn_config"]["moe_num_experts"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    few = ("--model", tmp_path, "--hardware", "epyc", "--link", "1gbe")
    assert [row["nodes"] for row in answer(plan, *few)["results"]] == [1, 2, 3, 4, 5]
    assert "6 nodes are more than the 5 experts" in refused(plan, *few, "--nodes", "1-6")
    config["ffn_config"]["moe_num_experts"] = config["ffn_config"]["moe_top_k"] - 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "field moe_top_k is 4: more experts per token than the 3" in refused(plan, *few)


def test_the_default_is_as_many_nodes_as_an_expert_has_slices(plan: Plan) -> None:
    """An expert of zmoe-tiny is 64 wide, which is one slice."""
    tiny = ("--model", "zmoe-tiny", "--hardware", "epyc", "--link", "1gbe", "--placement", "slices")
    assert [row["nodes"] for row in answer(plan, *tiny)["results"]] == [1]
    assert "64 wide and cut in steps of 64" in refused(plan, *tiny, "--nodes", 2)


def test_a_hub_out_of_reach_is_told_at_once(commands: Commands, tmp_path: Path) -> None:
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    rest = ("--model", "org/some-moe", "--hardware", "epyc", "--nodes", 1)
    for env in ({}, nowhere):  # it may not be asked, or does not answer
        line = refusal(on_its_own(commands, *rest, HF_HOME=str(tmp_path), **env))
        assert "--model org/some-moe" in line and "the hub is out of reach" in line


def test_the_table_fits_a_terminal(plan: Plan) -> None:
    lines = plan(*DBRX, columns=80).stdout.splitlines()
    heads = "nodes tok/s load compute latency transfer overhead comm. TTFT GiB kUSD"
    assert heads.split() in [line.split() for line in lines]
    assert not any("…" in line for line in lines)


def test_the_table_and_plain_sentences(plan: Plan) -> None:
    done = plan(*DBRX, "--nodes", "1,2", "--target", 5)
    assert done.returncode == 0 and done.stderr == ""
    assert "no fit" in done.stdout
    words = " ".join(done.stdout.split())
    assert "GiB are missing per node; 2 nodes or 8 bits on 1 node would do." in words
    assert "Fastest: 2 nodes, " in words
    assert "Cheapest for 5 tokens/s over 10gbe: " in words


def test_more_nodes_that_are_slower(plan: Plan) -> None:
    done = plan("--model", "qwen3-30b-a3b", "--hardware", "m3-ultra", "--link", "1gbe")
    assert "More nodes are slower: " in done.stdout


def test_a_plot(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, magic in (("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")):
        path = tmp_path / name
        assert plan(*DBRX, "--plot", path).returncode == 0
        assert path.read_bytes().startswith(magic)
    none = tmp_path / "none.png"
    done = plan(*DBRX, "--nodes", 1, "--plot", none)
    assert (
        done.returncode == 0
        and done.stderr == f"--plot {none}: nothing fits, so nothing is drawn\n"
    )
    assert not none.exists()


def test_a_plot_without_matplotlib(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError")
    plot = (*DBRX, "--plot", tmp_path / "x.png")
    line = refusal(on_its_own(commands, *plot, PYTHONPATH=str(tmp_path)))
    assert "pip install 'zmoe[plot]'" in line
    assert not (tmp_path / "x.png").exists()


def test_unknown_names_list_the_known_ones(plan: Plan) -> None:
    for flag, close, known in (
        ("--model", "dbxr", MODELS),
        ("--hardware", "m2ultra", MACHINES),
        ("--link", "10gb", LINKS),
    ):
        line = refused(plan, *DBRX, flag, close)
        assert f'{flag} "{close}" is unknown; did you mean ' in line
        assert all(name in line for name in known)


def test_bad_flags(plan: Plan, tmp_path: Path) -> None:
    for arguments, words in (
        ((), "--model and --hardware are needed"),
        (DBRX[:4], "no --link"),
        ((*DBRX[:4], "--nodes", "1,2"), "no --link"),
        ((*DBRX[:4], "--nodes", "1", "--target", "3"), "no --link"),
        ((*DBRX, "--nodes", "4-2"), "--nodes 4-2"),
        ((*DBRX, "--nodes", "two"), "--nodes two"),
        ((*DBRX, "--nodes", "0"), "--nodes 0"),
        ((*DBRX, "--nodes", "17"), "17 nodes are more than the 16 experts"),
        ((*DBRX, "--bits", "7"), "--bits is 7"),
        ((*DBRX, "--bits", "4", "--group-size", "10"), "--group-size is 10"),
        ((*DBRX, "--group-size", "64"), "--group-size has no use without --bits"),
        ((*DBRX, "--bits", "16", "--group-size", "64"), "--group-size has no use without --bits"),
        ((*DBRX, "--batch", "0"), "--batch is 0"),
        ((*DBRX, "--context", "-1"), "--context is -1"),
        ((*DBRX, "--prompt", "0"), "--prompt is 0"),
        ((*DBRX, "--target", "nan"), "--target is nan"),
        ((*DBRX, "--efficiency", "1.5"), "--efficiency is 1.5"),
        ((*DBRX, "--wire-bits", "7"), "--wire-bits"),
        ((*DBRX, "--schedule", "chaotic"), "--schedule"),
        ((*DBRX, "--one-machine", "--hardware", "epyc,epyc"), "--one-machine"),
        ((*DBRX, "--plot", "plan.pdf"), "--plot plan.pdf"),
        ((*DBRX, "--plot", tmp_path / "no" / "x.png"), "no such folder"),
        ((*DBRX, "--model", tmp_path), "holds no config.json"),
        ((*DBRX, "--model", tmp_path / "nowhere"), "no such folder"),
        ((*DBRX, "--hardware", tmp_path / "absent.json"), "absent.json cannot be read"),
        (("--calibrate", tmp_path / "no" / "p.json"), "no such folder"),
        (("--calibrate", tmp_path / "p.json", "--hosts", "127.0.0.1"), "at least two"),
        (("--calibrate", tmp_path / "p.json", "--python", "x"), "--python is for --hosts"),
        (("--calibrate", tmp_path / "p.json", "--hosts", "127.0.0.1,192.0.2.1"), "the first host"),
        (("--calibrate", tmp_path / "p.json", "--hostfile", tmp_path / "no.json"), "no.json"),
        ((*DBRX, "--hosts", "a,b"), "--hosts is for --calibrate"),
    ):
        assert words in refused(plan, *arguments), arguments


def test_only_a_profile_is_overwritten(plan: Plan, tmp_path: Path) -> None:
    precious = tmp_path / "precious.json"
    precious.write_text('{"mine": 1}')
    assert "unknown field mine" in refused(plan, "--calibrate", precious)
    assert precious.read_text() == '{"mine": 1}'


class FewMatmuls(matmuls.Matmuls):
    """In the first round a plain format, in the second a quantised one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._turns = iter(FEW_FORMATS)

    def measure(self, formats: Iterable[str] = ()) -> None:
        super().measure([next(self._turns)])

    def rates(
        self, formats: Iterable[str] = FEW_FORMATS, rounds: int = 0
    ) -> tuple[MatmulRate, ...]:
        return super().rates(formats, rounds)


def few_cases(nodes: int) -> Iterator[steps.Case]:
    """The default schedule and policy, and of two nodes another of each."""
    yield steps.Case(nodes)
    if nodes > 1:
        yield steps.Case(nodes, "centralized", "busy-full")


@pytest.mark.slow
def test_a_calibrated_profile_plans(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds of measurements, few of each, with few repetitions, of 1 and 2 nodes only."""
    monkeypatch.setattr(machine, "MOST_NODES", 2)
    monkeypatch.setattr(machine, "Matmuls", FewMatmuls)
    alone, *_, together = matmuls.core_sharings(2)
    monkeypatch.setattr(matmuls, "core_sharings", lambda: [alone, together])
    monkeypatch.setattr(matmuls, "FILE_BYTES", 256 << 20)  # 4 experts in float32 for each process
    few = {"STEPS": 16, "FAR": 300, "FEW": 1, "MANY": 2, "HIDDEN": 128, "cases": few_cases}
    for name, value in few.items():
        monkeypatch.setattr(steps, name, value)
    path = tmp_path / "here.json"
    done = plan("--calibrate", path)
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stdout and str(path) in done.stdout
    record = json.loads(path.read_text())
    assert set(record["machine"]) == {field.name for field in fields(Machine)}
    assert "measured" in record["machine"]["source"]
    assert [p.name for p in tmp_path.iterdir()] == ["here.json"]
    report = answer(plan, "--model", "zmoe-tiny", "--hardware", path, "--one-machine")
    assert report["environment"]["link"]["name"] == "loopback"
    formats = {rate["format"] for rate in record["machine"]["rates"]}
    assert formats == {*FEW_FORMATS, "cache"}
    assert {rate["nodes"] for rate in record["machine"]["rates"]} >= {1, 2}
    assert {step["nodes"] for step in record["machine"]["steps"]} == {1, 2}
    assert "steps: 2 nodes, centralized, busy-full" in done.stderr
    assert all(row["tokens_per_second"] > 0 for row in report["results"])


def test_help_stands_alone(plan: Plan) -> None:
    done = plan("--help")
    assert done.returncode == 0
    for flag in ("--model", "--hardware", "--link", "--nodes", "--calibrate", "--target"):
        assert flag in done.stdout


def test_placement_files(plan: Plan, tmp_path: Path) -> None:
    """A file that has all on both nodes is --placement replicas; others are as they say."""
    file = tmp_path / "mine.json"
    mixtral = ("--model", "mixtral-8x7b", "--hardware", "m2-ultra", "--link", "10gbe")
    everything = {"experts": 8, "nodes": 2, "owned": [list(range(8))] * 2}
    file.write_text(json.dumps(everything))
    (row,) = answer(plan, *mixtral, "--placement", file)["results"]
    assert row["placement"] == str(file)
    (same,) = answer(plan, *mixtral, "--placement", "replicas", "--nodes", 2)["results"]
    assert {**row, "placement": "replicas"} == same
    file.write_text(json.dumps({**everything, "slices": [[0, 3584], [3584, 14336]]}))
    (row,) = answer(plan, *mixtral, "--placement", file)["results"]
    assert row["executed_experts_per_node"] == pytest.approx(0.75 * 2)
    for arguments, words in (
        (("--placement", file, "--nodes", "1-2"), f"{file} is for 2 nodes, not for 1"),
        (("--placement", file, "--target", 9), "--target and a placement file exclude"),
        (("--placement", "copies"), 'placement "copies" is unknown (known: auto, experts, rep'),
        (("--placement", tmp_path / "no.json"), "no.json cannot be read"),
    ):
        assert words in refused(plan, *mixtral, *arguments)
    file.write_text(json.dumps({**everything, "owned": [[0, 1, 2], [3, 4, 5, 7]]}))
    line = refused(plan, *mixtral, "--placement", file)
    assert f"placement {file}: layer 0: no node owns expert 6" in line
