"""Bad calls of every command: one line that names the culprit, exit code 2, nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmoe.cli import keys, node, prestack, run
from zmoe.cli.plan import command as plan

COMMANDS = {"run": run, "node": node, "keys": keys, "plan": plan, "prestack": prestack}
LEADER = ("--leader", "127.0.0.1:9")
DBRX = ("--model", "dbrx", "--hardware", "m2-ultra", "--link", "10gbe")
# Command, arguments, words of the line; {tmp} is an empty folder.
CALLS: list[tuple[str, tuple[str, ...], str]] = [
    ("run", ("-m", "-5", "x"), "--max-tokens is -5"),
    ("run", ("-m", "five", "x"), "--max-tokens"),
    ("run", ("--temp", "-1", "x"), "--temp is -1"),
    ("run", ("--temp", "hot", "x"), "--temp"),
    ("run", ("--top-p", "0", "x"), "--top-p is 0"),
    ("run", ("--top-k", "-1", "x"), "--top-k is -1"),
    ("run", ("--min-p", "2", "x"), "--min-p is 2"),
    ("run", ("--seed", "-1", "x"), "--seed is -1"),
    ("run", ("--repetition-penalty", "-1", "x"), "--repetition-penalty is -1"),
    ("run", ("--repetition-context-size", "0", "x"), "--repetition-context-size is 0"),
    ("run", ("--presence-penalty", "3", "x"), "--presence-penalty is 3"),
    ("run", ("--frequency-penalty", "often", "x"), "--frequency-penalty"),
    ("run", ("-n", "0", "x"), "--nodes is 0"),
    ("run", ("-n", "2.5", "x"), "--nodes"),
    ("run", ("--no-such-flag", "x"), "--no-such-flag"),
    ("run", ("--max-token", "3", "x"), "--max-token"),  # no abbreviations
    ("run", ("one", "two"), "two"),
    ("run", (), "no prompt"),
    ("run", ("",), "prompt is empty"),
    ("run", ("-",), "prompt is empty"),
    ("run", ("a\udcff",), "the prompt is not UTF-8 text"),
    ("run", ("--system-prompt", "a\udcff", "x"), "--system-prompt is not UTF-8 text"),
    ("run", ("--system-prompt", "be brief", "x"), "--system-prompt"),
    ("run", ("--chat-template-config", "[", "x"), "--chat-template-config is not JSON"),
    ("run", ("--chat-template-config", "[]", "x"), "--chat-template-config: expected a JSON"),
    ("run", ("--peer-timeout", "nan", "x"), "--peer-timeout is nan"),
    ("run", ("--join-timeout", "0", "x"), "--join-timeout is 0"),
    ("run", ("--load-timeout", "-1", "x"), "--load-timeout is -1"),
    ("run", ("--starting-port", "70000", "x"), "--starting-port is 70000"),
    ("run", ("--hosts", "127.0.0.1", "--hostfile", "f", "x"), "exclude each other"),
    ("run", ("--hostfile", "{tmp}/hosts.json", "x"), "hosts.json"),
    ("run", ("-n", "3", "--hosts", "127.0.0.1,127.0.0.1", "x"), "3 nodes on 2 hosts"),
    ("run", ("--hosts", "127.0.0.1,127.0.0.1", "--env", "=x", "x"), "--env"),
    ("run", ("--compute", "cuda", "x"), "--compute"),
    ("run", ("--policy", "greedy", "x"), "--policy"),
    ("run", ("--activations", "int4", "x"), "--activations"),
    ("run", ("--activations", "int8", "--compute", "mlx", "x"), "--activations is int8"),
    ("run", ("--wire-dtype", "int4", "x"), "--wire-dtype"),
    ("run", ("--schedule", "federal", "x"), "--schedule"),
    ("run", ("--prefill-step-size", "0", "x"), "--prefill-step-size is 0"),
    ("run", ("--max-kv-size", "8", "x"), "--max-kv-size is 8"),
    ("run", ("--kv-bits", "4", "x"), "--kv-bits is 4: expected 8"),
    ("run", ("--kv-bits", "eight", "x"), "--kv-bits"),
    ("run", ("--kv-bits", "8", "--compute", "mlx", "x"), "--kv-bits is 8: expected none"),
    ("run", ("--memory-limit", "0", "x"), "--memory-limit is 0"),
    ("run", ("--placement", "copies", "x"), "copies"),
    ("run", ("--placement", "{tmp}/no.json", "x"), "--placement is {tmp}/no.json"),
    ("run", ("--usage", "{tmp}/no.json", "x"), "no.json cannot be read"),
    ("run", ("--record-usage", "{tmp}/no/u.json", "x"), "no such folder {tmp}/no"),
    ("run", ("--record-usage", "/proc/u.json", "x"), "/proc/u.json cannot be written"),
    ("run", ("--prompt-cache-file", "{tmp}/no/p", "x"), "no such folder {tmp}/no"),
    ("run", ("--prompt-cache-file", "/proc/p", "x"), "/proc/p cannot be written"),
    ("run", ("--prompt-cache-file", "{tmp}", "x"), "{tmp} cannot be read: Is a directory"),
    ("run", ("--journal", "{tmp}", "x"), "--journal {tmp} exists"),
    ("run", ("--journal", "{tmp}/no/j", "x"), "no such folder {tmp}/no"),
    ("run", ("--journal", "/proc/j", "x"), "/proc/j cannot be written"),
    ("run", ("--journal", "j", "--resume", "j"), "--resume: not allowed with"),
    ("run", ("--resume", "j", "x"), "--resume j has a prompt and settings of its own"),
    ("run", ("--resume", "j", "--temp", "1"), "leave out --temp"),
    ("run", ("--resume", "j", "--system-prompt", "x"), "leave out --system-prompt"),
    ("run", ("--resume", "{tmp}/no"), "journal {tmp}/no cannot be read"),
    ("run", ("--model", "{tmp}/no", "x"), "model {tmp}/no: no such folder"),
    ("run", ("--model", "{tmp}", "x"), "{tmp} holds no config.json"),
    ("run", ("--prompt", "one", "two"), "--prompt"),
    ("run", ("--model", "", "x"), "model is empty"),
    ("run", ("--manual", "x"), "--manual is for several nodes"),
    ("run", ("--key", "k", "-n", "2", "x"), "--key is for nodes that are started by hand"),
    ("run", ("--keep-alive", "1", "-n", "2", "x"), "--keep-alive is for nodes that are started by"),
    ("run", ("--keep-alive", "-1", "--manual", "-n", "2", "x"), "--keep-alive is -1.0: expected a"),
    ("run", ("--keep-alive", "nan", "--manual", "-n", "2", "x"), "--keep-alive is nan: expected a"),
    (
        "run",
        ("--keep-alive", "1e5", "--manual", "-n", "2", "x"),
        "expected a number of seconds from",
    ),
    ("run", ("--insecure", "-n", "2", "x"), "--insecure has no use on one machine"),
    ("run", ("--ports", "9-1", "-n", "2", "x"), "--ports is '9-1': expected a range of ports"),
    (
        "run",
        ("--ports", "90-99", "--starting-port", "89", "-n", "2", "x"),
        "--starting-port is 89: not one of --ports 90-99",
    ),
    ("run", ("--env", "A=1", "-n", "2", "x"), "--env is for nodes on other hosts"),
    ("run", ("--cwd", "/", "--hosts", "127.0.0.1,localhost", "x"), "--cwd is for nodes on other"),
    ("run", ("--python", "p", "--manual", "--hosts", "127.0.0.1,127.0.0.2", "x"), "--python is"),
    ("node", ("--rank", "1"), "--leader"),
    ("node", ("--leader", "x", "--rank", "1"), "--leader x"),
    ("node", ("--leader", "127.0.0.1:99999", "--rank", "1"), "--leader 127.0.0.1:99999"),
    ("node", ("--leader", "a b:9", "--rank", "1", "--once"), "--leader a b:9"),
    ("node", (*LEADER, "--rank", "0"), "--rank is 0"),
    ("node", (*LEADER, "--rank", "one"), "--rank"),
    ("node", (*LEADER, "--rank", "1", "--cores", "a"), "--cores a"),
    ("node", ("--leader", "127.0.0.1:9", "--rank", "1", "--cores", "0-9999"), "--cores 0-9999"),
    ("node", (*LEADER, "--rank", "1", "--memory-limit", "-1"), "--memory-limit is -1"),
    ("node", (*LEADER, "--rank", "1", "--what"), "--what"),
    ("node", ("--leader", "no-such-host.invalid:9", "--rank", "1"), "cannot resolve"),
    ("node", (*LEADER, "--rank", "1", "--bind", "192.0.2.1"), "--bind is 192.0.2.1"),
    ("node", (*LEADER, "--rank", "1", "extra"), "extra"),
    ("node", (*LEADER, "--rank", "1", "--rank-env", "X"), "--rank and --rank-env exclude"),
    ("node", (*LEADER, "--rank-env", "NOT_SET"), "no rank: give --rank, or set NOT_SET"),
    ("node", (*LEADER, "--rank-env", "HOME"), "expected a number from 1 to 63"),
    ("node", (*LEADER, "--rank", "1", "--insecure"), "--insecure has no use on one machine"),
    ("node", (*LEADER, "--rank", "1", "--key", "{tmp}/no"), "key file {tmp}/no cannot be read"),
    ("node", (*LEADER, "--rank", "1", "--ready-fd", "99"), "--ready-fd 99: Bad file descriptor"),
    ("keys", ("show", "{tmp}/no"), "key file {tmp}/no cannot be read: No such file"),
    ("keys", ("new", "{tmp}/no/key"), "key file {tmp}/no/key cannot be written: No such file"),
    ("keys", ("old", "{tmp}/key"), "old"),
    ("plan", (), "--model and --hardware are needed"),
    ("plan", (*DBRX, "extra"), "extra"),
    ("plan", (*DBRX, "--nodes", "4-2"), "--nodes 4-2"),
    ("plan", (*DBRX, "--nodes", "0"), "--nodes 0"),
    ("plan", (*DBRX, "--nodes", "17"), "17 nodes are more than the 16 experts"),
    ("plan", (*DBRX, "--bits", "7"), "--bits is 7"),
    ("plan", (*DBRX, "--bits", "4", "--group-size", "10"), "--group-size is 10"),
    ("plan", (*DBRX, "--batch", "0"), "--batch is 0"),
    ("plan", (*DBRX, "--context", "-1"), "--context is -1"),
    ("plan", (*DBRX, "--prompt", "0"), "--prompt is 0"),
    ("plan", (*DBRX, "--target", "nan"), "--target is nan"),
    ("plan", (*DBRX, "--efficiency", "1.5"), "--efficiency is 1.5"),
    ("plan", (*DBRX, "--latency-us", "0"), "--latency-us is 0"),
    ("plan", (*DBRX, "--wiring", "-1"), "--wiring is -1"),
    ("plan", (*DBRX, "--wire-bits", "7"), "--wire-bits"),
    ("plan", (*DBRX, "--schedule", "chaotic"), "--schedule"),
    ("plan", (*DBRX, "--plot", "plan.pdf"), "--plot plan.pdf"),
    ("plan", (*DBRX, "--plot", "{tmp}/no/x.png"), "no such folder"),
    ("plan", (*DBRX, "--model", "{tmp}"), "holds no config.json"),
    ("plan", (*DBRX, "--model", ""), "--model is empty"),
    ("plan", (*DBRX, "--hardware", "{tmp}/absent.json"), "absent.json cannot be read"),
    ("plan", (*DBRX, "--hosts", "a,b"), "--hosts is for --calibrate"),
    ("plan", ("--calibrate", "{tmp}/no/p.json"), "no such folder {tmp}/no"),
    ("plan", ("--calibrate", "/proc/p.json"), "--calibrate /proc/p.json cannot be written"),
    ("plan", ("--calibrate", "{tmp}/p.json", "--hosts", "127.0.0.1"), "at least two"),
    ("plan", ("--calibrate", "{tmp}/p.json", "--python", "x"), "--python is for --hosts"),
    ("prestack", (), "MODEL"),
    ("prestack", ("zmoe-tiny",), "no OUT"),
    ("prestack", ("nowhere/at/all", "{tmp}/out"), "MODEL nowhere/at/all: no such folder"),
    ("prestack", ("zmoe-tiny", "{tmp}/out", "--bits", "7"), "--bits is 7: expected 1 or 2 or 3"),
    ("prestack", ("zmoe-tiny", "{tmp}/out", "--bits", "four"), "--bits"),
    ("prestack", ("zmoe-tiny", "{tmp}/out", "--bits", "8", "--mode", "mxfp4"), "--bits is 8"),
    ("prestack", ("zmoe-tiny", "{tmp}/out", "--group-size", "0"), "--group-size is 0"),
    ("prestack", ("zmoe-tiny", "{tmp}/out", "--mode", "q4_0"), "--mode"),
    ("prestack", ("zmoe-tiny", "{tmp}/out", "--what"), "--what"),
    ("prestack", ("--verify", "zmoe-tiny"), "is no store"),
    ("prestack", ("--verify", "zmoe-tiny", "--bits", "4"), "no OUT"),
]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A command handles SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def refused(command: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the command refuses these arguments with."""
    try:
        code = COMMANDS[command].main(list(arguments))
    except SystemExit as end:  # what argparse refuses
        assert isinstance(end.code, int)
        code = end.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured.err
    line: str
    (line,) = captured.err.splitlines()
    assert line.startswith(f"zmoe-{command}")
    assert "Error:" not in line and "[Errno" not in line
    return line


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    CALLS,
    ids=[f"{command} {' '.join(arguments)!a}" for command, arguments, _ in CALLS],
)
def test_a_bad_call(
    command: str,
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    given = tuple(each.replace("{tmp}", str(tmp_path)) for each in arguments)
    assert words.replace("{tmp}", str(tmp_path)) in refused(command, given, capsys)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").mkdir()
    line = refused("run", ("--model", str(tmp_path), "x"), capsys)
    assert line == f"zmoe-run: {tmp_path}/config.json cannot be read: Is a directory"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused("prestack", (str(tmp_path), str(tmp_path / "out")), capsys)
    assert line == f"zmoe-prestack: MODEL {tmp_path}: cannot be read: Permission denied"
