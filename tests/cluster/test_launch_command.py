"""zmoe-launch as a user calls it, with a program of MLX and one of mlx-lm."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests.cluster.conftest import PATIENCE_S, Commands
from tests.families import build
from zmoe.checkpoint.hub import resolve_model
from zmoe.cli import launch
from zmoe.exchange.keys import write_new_key

SCRIPT = Path(__file__).with_name("launched.py")
PROMPT = [(7 * i + 3) % 90 for i in range(40)]
TOKENS = 8


def launched(commands: Commands, *arguments: object, given: str = "") -> tuple[int, str, list[str]]:
    """The exit code, standard output, and lines of standard error."""
    process = subprocess.run(
        [sys.executable, "-m", "zmoe.cli.launch", *map(str, arguments)],
        env=commands.env,
        cwd=commands.folder,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process.returncode, process.stdout, process.stderr.splitlines()


def test_mlx_lms_tensor_parallelism_says_what_mlx_lm_says(
    commands: Commands, tmp_path: Path
) -> None:
    folder = build("qwen3_moe", tmp_path / "model", vocab_size=1024, moe_intermediate_size=256)
    tiny = resolve_model("zmoe-tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    model, _ = load_model(folder)
    steps: Any = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS)
    tokens = [int(token) for token, _ in steps]
    program = (SCRIPT, "generate", folder, json.dumps(PROMPT), TOKENS)
    code, out, errors = launched(commands, "-n", 2, *program, given="for rank 0")
    assert code == 0, errors
    first, last = out.splitlines()
    assert json.loads(first) == {"tokens": tokens, "size": 2, "input": "for rank 0"}
    said = [line.removeprefix("[1] ") for line in errors if line.startswith("[1] ")]
    assert json.loads(said[-2]) == {"tokens": tokens, "size": 2, "input": ""}
    assert said[-1] == last == "[2.0, 2.0, 2.0]"


@pytest.mark.parametrize(
    ("scenario", "code", "words"),
    [
        ("refused", 1, "zmoe's exchange does not do this: a send of float32"),
        ("apart", 1, "the ranks call different collectives, or in groups of some ranks"),
        ("exit", 3, "rank 1 ended with exit code 3"),
        ("early 1", 1, "rank 1 has ended, and rank 0 waits for it in a collective"),
        ("early 0", 1, "rank 0 has ended, and rank 1 waits for it in a collective"),
        ("killed", 1, "rank 1 on this machine (pid "),
    ],
)
def test_one_line_says_what_ends_all(
    commands: Commands, scenario: str, code: int, words: str
) -> None:
    found, out, errors = launched(commands, "-n", 2, SCRIPT, *scenario.split())
    assert (found, out, len(errors)) == (code, "", 1), errors
    assert errors[0].removeprefix("zmoe-launch: ").removeprefix("node 1: ").startswith(words)


def test_another_mpi_library_is_refused(commands: Commands) -> None:
    commands.env["MLX_MPI_LIBNAME"] = "libmpi.so"
    code, out, errors = launched(commands, "-n", 2, SCRIPT, "any")
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("zmoe-launch: MLX_MPI_LIBNAME is set")


def test_a_node_that_is_started_by_hand_and_an_error_of_the_program(
    commands: Commands, free_port: int, tmp_path: Path
) -> None:
    """With a key, which all that the two nodes send needs."""
    key = tmp_path / "key"
    write_new_key(key)
    where = ("-n", 2, "--manual", "--starting-port", free_port, "--key", key)
    leader = commands.start("launch", *where, SCRIPT, "raises")
    assert leader.stderr is not None
    assert "start each on its machine" in leader.stderr.readline()
    program, *arguments = shlex.split(leader.stderr.readline())
    assert program == "zmoe-launch" and str(key) in arguments
    commands.start("launch", *arguments)
    _, errors = leader.communicate(timeout=PATIENCE_S)
    assert leader.returncode == 1
    lines = errors.splitlines()
    assert lines[0].startswith("Traceback") and lines[1].endswith("in <module>")
    assert str(SCRIPT) in lines[1] and lines[-1] == "ValueError: of the program's own"


def test_ctrl_c_ends_all_while_a_collective_waits(commands: Commands) -> None:
    process = commands.start("launch", "-n", 2, SCRIPT, "waits")
    assert process.stderr is not None
    assert process.stderr.readline() == "[1] waiting\n"
    time.sleep(0.2)  # and rank 0 in its collective
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, "interrupted\n"), errors
    assert not errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no SCRIPT: give a program to run (see zmoe-launch --help)"),
        (("no.py",), "SCRIPT no.py: no such file"),
        (("-n", "2", "-m"), "no MODULE: give a program to run (see zmoe-launch --help)"),
        (("-n", "2", "-m", "no.such"), "-m no.such: no such module"),
        (("--temp", "1", str(SCRIPT)), "unrecognized arguments: --temp (see zmoe-launch --help)"),
        (("-n", "0", str(SCRIPT)), "--nodes is 0: expected a whole number from 1 to 64"),
        (("--leader", "a:1", str(SCRIPT)), "--leader is for a node that is started by hand"),
        (("--rank", "1", str(SCRIPT)), "--rank is for a node that is started by hand"),
        (("--rank", "1", "-n", "2", str(SCRIPT)), "--nodes is for the first node"),
        (("--rank", "1", "--ports", "8-9", str(SCRIPT)), "--ports is for the first node"),
        (
            ("--rank", "1", "--leader", "127.0.0.1:9", "--key", "no", str(SCRIPT)),
            "key file no cannot be read",
        ),
        (("--insecure", "-n", "2", str(SCRIPT)), "--insecure has no use on one machine"),
    ],
)
def test_bad_calls(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = launch.main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith(f"zmoe-launch: {words}") or said.err.startswith(
        f"zmoe-launch[1]: {words}"
    )
