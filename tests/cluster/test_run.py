"""zmoe-run on the embedded model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from tests.cluster.conftest import Commands
from zmoe import __version__
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.cluster import Cluster

PROMPT = "ROMEO:"
GREEDY = ("--temp", 0, "-m", 48)
LONG = "To be, or not to be, that is the question. " * 8
SAMPLE: dict[str, Any] = {"temp": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "max_tokens": 24}


@pytest.fixture(scope="module")
def alone() -> str:
    """What mlx-lm writes in one process, without zmoe."""
    model, tokenizer = mlx_lm.load(str(resolve_model("zmoe-tiny")))
    return str(mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=48)) + "\n"


@pytest.fixture(scope="module")
def by_two_nodes() -> tuple[str, str]:
    """What a cluster of two nodes samples, and what it writes after a long prompt."""
    with Cluster("zmoe-tiny", 2) as cluster:
        sample = cluster.generate(PROMPT, seed=7, **SAMPLE)
        sampled = "".join(token.text for token in sample) + "\n"
        return sampled, "".join(t.text for t in cluster.generate(LONG, max_tokens=8)) + "\n"


@pytest.mark.parametrize("nodes", [1, 4])
def test_any_number_of_nodes_writes_what_mlx_lm_writes(
    commands: Commands, alone: str, nodes: int
) -> None:
    done = commands.call("run", "--nodes", nodes, *GREEDY, PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == alone
    assert len(re.findall(r"[A-Za-z]{2,}", alone)) > 10


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_centralised_schedule_writes_the_same(
    commands: Commands, alone: str, nodes: int
) -> None:
    done = commands.call("run", "--schedule", "centralized", "--nodes", nodes, *GREEDY, PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone


def test_a_process_writes_the_same(commands: Commands, alone: str) -> None:
    done = commands.run("--nodes", 2, *GREEDY, PROMPT)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", alone)


def test_json_and_stats_together(commands: Commands, alone: str) -> None:
    """One object with the documented fields, and a table on standard error."""
    done = commands.call("run", "--nodes", 2, "--json", "--stats", *GREEDY, PROMPT)
    assert done.returncode == 0, done.stderr
    for words in ("time to first token", "prefill", "decode", "exchange", "buffers locked"):
        assert words in done.stderr
    assert "peak memory, node 1" in done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {
        "text",
        "tokens",
        "prompt_tokens",
        "generation_tokens",
        "prompt_tps",
        "generation_tps",
        "finish_reason",
        "nodes",
        "breakdown",
        "peak_memory",
        "load_seconds",
    }
    assert found["text"] + "\n" == alone
    assert found["nodes"] == 2
    assert found["generation_tokens"] == len(found["tokens"]) == 48
    assert found["finish_reason"] == "length"
    assert set(found["breakdown"]) == {"experts_ms", "exchange_ms", "other_ms"}
    assert all(v > 0 for v in found["breakdown"].values())
    assert len(found["peak_memory"]) == 2
    assert min(found["peak_memory"]) > 8 << 20
    assert found["prompt_tokens"] > 0
    assert min(found["prompt_tps"], found["generation_tps"], found["load_seconds"]) > 0


def test_partial_sums_may_travel_in_8_bits(commands: Commands) -> None:
    done = commands.call("run", "--nodes", 3, "--wire-dtype", "q8", "--json", *GREEDY, PROMPT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["generation_tokens"] == 48
    assert len(re.findall(r"[A-Za-z]{2,}", found["text"])) > 10


def test_stats_leave_the_text_alone(commands: Commands, alone: str) -> None:
    done = commands.call("run", "--stats", *GREEDY, PROMPT)
    assert done.stdout == alone
    assert "time to first token" in done.stderr


def test_a_prompt_goes_on_from_a_file(commands: Commands, tmp_path: Path) -> None:
    """The second run has the keys and values of the first, on other nodes."""
    file, prompt = tmp_path / "prompt", 40 * PROMPT
    flags = ("--compute", "native", "--prompt-cache-file", str(file), "--stats", "-m", "20", prompt)
    first = commands.call("run", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]
    second = commands.call("run", "-n", "2", *flags)
    assert second.stdout == first.stdout
    cached = [
        int(re.search(r"prompt tokens in the cache\D*(\d+)", done.stderr)[1])  # type: ignore[index]
        for done in (first, second)
    ]
    assert cached[0] == 0 and cached[1] >= 64
    short = commands.call("run", "--prompt-cache-file", str(tmp_path / "no"), PROMPT)
    assert "was not written: the prompt has" in short.stderr and not (tmp_path / "no").exists()


def test_a_run_that_was_killed_goes_on_from_its_journal(commands: Commands, tmp_path: Path) -> None:
    """On another number of nodes, behind what the crash has left of a line."""
    file = tmp_path / "journal"
    flags = ("--compute", "native", "--temp", 0.8, "--frequency-penalty", 0.2, "-m", 300, PROMPT)
    whole = commands.call("run", "--seed", 3, *flags)
    with commands.start("run", "-n", 2, "--journal", file, "--seed", 3, *flags) as cut_short:
        assert cut_short.stdout is not None
        begun = cut_short.stdout.read(40)
        cut_short.kill()
    assert whole.stdout.startswith(begun)
    with file.open("a") as journal:
        journal.write('{"token": 1')
    done = commands.call("run", "--compute", "native", "--resume", file)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", whole.stdout)
    again = commands.call("run", "--compute", "native", "--resume", file)
    assert (again.returncode, again.stdout) == (2, "")
    assert f"journal {file} is of a text that has ended" in again.stderr


def test_a_terminal_shows_a_bar_for_each_node(commands: Commands) -> None:
    shown = commands.on_a_terminal("run", "-n", "2", "-m", "2", 200 * PROMPT)
    assert b"loading node 0" in shown
    assert b"loading node 1" in shown
    assert re.search(rb"reading the prompt, tokens .*\d+/400", shown)
    assert b"\x1b[?25l" not in shown  # whoever is interrupted cannot bring back a hidden cursor


def test_a_seed_repeats_a_sample(commands: Commands, by_two_nodes: tuple[str, str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLE.items()]
    first, other = (commands.call("run", "--seed", seed, *flags, PROMPT).stdout for seed in (7, 8))
    assert by_two_nodes[0] == first
    assert first != other


def test_the_prompt_can_come_from_standard_input(commands: Commands, alone: str) -> None:
    assert commands.run(*GREEDY, "-", stdin=PROMPT).stdout == alone
    assert commands.call("run", "-p", "-", *GREEDY, stdin=PROMPT).stdout == alone
    assert commands.call("run", "--prompt", PROMPT, *GREEDY).stdout == alone


def test_a_long_prompt_is_prefilled_in_chunks(
    commands: Commands, by_two_nodes: tuple[str, str]
) -> None:
    texts = {
        commands.call("run", "-n", nodes, "-m", 8, "--prefill-step-size", chunk, LONG).stdout
        for nodes, chunk in ((1, 512), (2, 7))
    }
    assert texts == {by_two_nodes[1]}


def test_help_and_version(commands: Commands) -> None:
    helped = commands.call("run", "--help")
    assert helped.returncode == 0
    assert "--hostfile" in helped.stdout
    assert commands.call("run", "--version").stdout == f"zmoe {__version__}\n"
