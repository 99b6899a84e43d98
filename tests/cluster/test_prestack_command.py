"""zmoe-prestack as a user calls it, and zmoe-run on what it writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from tests.cluster.conftest import PATIENCE_S, Commands, wait_until
from tests.families import build

PROMPT = "ROMEO:"
GREEDY = ("--temp", 0, "-m", 24)


def prestack(commands: Commands, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, of a call in this process."""
    done = commands.call("prestack", *arguments)
    return done.returncode, done.stdout, done.stderr


def in_a_process(commands: Commands, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = commands.start("prestack", *arguments)
    out, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def refused(commands: Commands, *arguments: object) -> str:
    return commands.refusal(commands.call("prestack", *arguments))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "tiny"
    commands = Commands(tmp_path_factory.mktemp("commands"))
    done = in_a_process(commands, "zmoe-tiny", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder}: 0.01 GB in 5 files, 92 ranges: complete\n"
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the model itself writes."""
    return Commands(tmp_path_factory.mktemp("commands")).call("run", *GREEDY, PROMPT).stdout


@pytest.mark.parametrize(
    ("nodes", "compute"), [(1, "native"), (1, "mlx"), (2, "mlx"), (3, "native")]
)
def test_a_store_is_taken_wherever_a_model_is(
    commands: Commands, store: Path, text: str, nodes: int, compute: str
) -> None:
    done = commands.call(
        "run", "--model", store, "-n", nodes, "--compute", compute, *GREEDY, PROMPT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text and len(text) > 24


def test_quantised(commands: Commands, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, _, errors = prestack(commands, "zmoe-tiny", store, "--bits", 8, "--group-size", 32)
    assert (code, errors) == (0, "")
    config = json.loads((store / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    texts = {
        commands.call("run", "--model", store, "-n", n, *GREEDY, PROMPT).stdout for n in (1, 2)
    }
    assert len(texts) == 1 and len(texts.pop()) > 24
    assert prestack(commands, "zmoe-tiny", tmp_path / "fp4", "--mode", "mxfp4")[0] == 0
    config = json.loads((tmp_path / "fp4" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_bad_input(commands: Commands, tmp_path: Path, store: Path) -> None:
    out = tmp_path / "out"
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "no_such_model"}')
    file = tmp_path / "file"
    file.write_text("x")
    for arguments, words in [
        ((tmp_path / "no", out), "MODEL"),
        ((dense, out), "no weights"),
        (("zmoe-tiny", file), f"{file} is a file"),
        (("zmoe-tiny", dense), f"{dense} is not empty"),
        (("zmoe-tiny", store, "--bits", 4), f"{store} holds the store of another model"),
        (("zmoe-tiny", out, "--mode", "nvfp4", "--group-size", 64), "--group-size is 64"),
        (("--verify", tmp_path / "no"), "MODEL"),
        (("--verify", store, "--bits", 4), "no OUT"),
    ]:
        assert words in refused(commands, *arguments), words
    done = in_a_process(commands, "some-org/some-model", out)  # offline from its start on
    assert "MODEL some-org/some-model: not in the local" in commands.refusal(done)
    assert not out.exists()


def test_a_model_without_experts(commands: Commands, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    from tests.families import save
    from tests.unit.loading.test_inspect import DENSE

    model = llama.Model(llama.ModelArgs.from_dict(DENSE))
    folder = save(tmp_path / "llama", DENSE, dict(tree_flatten(model.parameters())))
    line = refused(commands, folder, tmp_path / "out")
    assert "no Mixture of Experts: type llama" in line
    assert not (tmp_path / "out").exists()


def test_damage_is_named(commands: Commands, store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(store, tmp_path / "store"))
    code, out, errors = prestack(commands, "--verify", store)
    assert (code, errors) == (0, "") and out.endswith("every checksum matches\n")
    path = store / "experts-00002.safetensors"
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"!")
    assert f"{path} is damaged: expert 15 (bytes" in refused(commands, "--verify", store)
    for nodes in (1, 2):  # the leader's own expert, and the other node's
        assert f"{path} is damaged: expert 15" in commands.refused(
            "--model", store, "-n", nodes, *GREEDY, PROMPT
        )
    # The command again leaves it alone, and says so when asked.
    code, out, errors = prestack(commands, "zmoe-tiny", store, "--verify")
    assert (code, out) == (2, "") and "expert 15" in errors
    os.truncate(path, 100_000)
    for line in (
        refused(commands, "--verify", store),
        commands.refused("--model", store, "-n", 2, *GREEDY, PROMPT),
    ):
        assert f"{path} is truncated: 100000 bytes of" in line


# Python runs this first where it finds it as sitecustomize.py.
HOLD = """
import time
from zmoe.store.journal import Journal
add = Journal.add
def add_and_hold(self, file, part, checksum):
    add(self, file, part, checksum)
    if file.startswith("experts-00000") and part.expert == 2:
        time.sleep(3600)
Journal.add = add_and_hold
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on(commands: Commands, tmp_path: Path, how: signal.Signals) -> None:
    source = build("mixtral", tmp_path / "source")
    store, journal = tmp_path / "store", tmp_path / "store" / "zmoe-store.journal"
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    path = os.environ.get("PYTHONPATH", "")
    with mock.patch.dict(commands.env, PYTHONPATH=f"{tmp_path}{os.pathsep}{path}"):
        process = commands.start("prestack", source, store)
    # The dense tensors come first; then a header and some experts of the first layer.
    wait_until(
        lambda: journal.exists() and journal.read_text().count("experts-00000") == 4,
        PATIENCE_S,
        "three experts are written",
    )
    process.send_signal(how)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (-how, 128 + how)
    assert not (store / "zmoe-store.json").exists()
    assert "is an unfinished store" in commands.refused("--model", store, PROMPT)
    written = journal.read_text()
    code, _, errors = prestack(commands, source, store, "--verify")
    assert (code, errors) == (0, "")
    assert not journal.exists()
    fresh = tmp_path / "fresh"
    assert prestack(commands, source, fresh)[0] == 0
    for path in fresh.iterdir():
        assert path.read_bytes() == (store / path.name).read_bytes()
    assert written.count("experts-00000") == 4  # it was stopped in the middle indeed


def test_a_terminal_shows_a_bar(commands: Commands, tmp_path: Path) -> None:
    shown = commands.on_a_terminal("prestack", "zmoe-tiny", tmp_path / "s", "--verify")
    assert b"writing" in shown and b"comparing" in shown


def test_help_stands_alone(commands: Commands) -> None:
    code, out, _ = prestack(commands, "--help")
    assert code == 0
    for flag in ("MODEL", "OUT", "--verify", "--bits", "--group-size", "--mode"):
        assert flag in out
