"""The README's snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cluster.conftest import Commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = PYTHON.findall(README)
SHELL = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def written(commands: Commands, prompt: str, count: int) -> str:
    """What zmoe-run writes; here on one node, as nodes change nothing."""
    return commands.call("run", "-m", count, prompt).stdout


def test_the_cluster_snippet(commands: Commands) -> None:
    assert len(SNIPPETS[0].strip().splitlines()) < 15
    process = commands.python("-c", SNIPPETS[0])
    text, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert text == written(commands, "ROMEO:", 32).removesuffix("\n")


def test_the_snippet_of_many_prompts(commands: Commands) -> None:
    assert len(SNIPPETS[1].strip().splitlines()) < 15
    process = commands.python("-c", SNIPPETS[1])
    text, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    romeo, juliet = (written(commands, f"{name}:", 32) for name in ("ROMEO", "JULIET"))
    assert text == romeo + juliet + romeo.removesuffix("\n")


def test_the_snippets_of_batching(commands: Commands) -> None:
    generations, stream = PYTHON.findall((ROOT / "docs" / "batching.md").read_text())
    for snippet, prompts, count in (
        (generations, ["ROMEO:", "JULIET:"], 64),
        (stream, ["ROMEO:"], 32),
    ):
        process = commands.python("-c", snippet)
        text, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert text == "".join(written(commands, prompt, count) for prompt in prompts)


def test_the_exchange_snippet(commands: Commands) -> None:
    assert len(SNIPPETS[2].strip().splitlines()) < 15
    ranks = [commands.python("-c", SNIPPETS[2], rank) for rank in range(2)]
    for process in ranks:
        text, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert text == "[[3. 3. 3. 3.]]\n"


def test_every_flag_that_the_readme_shows_exists(commands: Commands) -> None:
    helped = commands.call("run", "--help").stdout
    for line in "".join(SHELL).splitlines():
        if "zmoe-run" in line:
            for flag in re.findall(r"(?<!\S)(--[a-z-]+)", line):
                assert flag in helped, flag
