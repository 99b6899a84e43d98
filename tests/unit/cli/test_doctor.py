"""zmoe-doctor's checks, processes and tables, without the runs of a self-test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import stand_in_for_ssh
from zmoe.calibration.link import Hosts
from zmoe.cli.doctor import command, hosts, machine
from zmoe.cli.doctor.check import Check, Result, output, results
from zmoe.cli.doctor.report import show
from zmoe.cli.doctor.selftest import SelfTest, compared
from zmoe.cluster.hosts import Host, hosts_from_names
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import ZmoeError

HOST = Host("127.0.0.2", "127.0.0.2")


def quiet(text: str) -> None:
    """Say nothing."""


def fail(error: Exception) -> str:
    raise error


def test_a_failed_check_is_one_line_and_the_others_go_on() -> None:
    checks = (
        Check("first", lambda: fail(ZmoeError("a line\nand another"))),
        Check("second", lambda: fail(KeyError("x"))),
        Check("third", lambda: "found"),
    )
    found = [(r.check, r.ok, r.value) for r in results(checks, quiet)]
    assert found == [
        ("first", False, "a line and another"),
        ("second", False, "KeyError: 'x'"),
        ("third", True, "found"),
    ]


def test_the_table_is_markdown_with_a_line_for_each_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "[bold]x[/bold] " + 30 * "word "
    show([Result("a|b", True, long, 1.0), Result("c", False, "lost", 0.25)])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 4
    cells = [[cell.strip() for cell in line.replace(r"\|", "¦").split("|")] for line in lines]
    assert cells[0] == ["", "check", "", "found", "s", ""]
    assert cells[2] == ["", "a¦b", "ok", long.strip(), "1.0", ""]
    assert cells[3] == ["", "c", "FAILED", "lost", "0.2", ""]


def test_a_process_that_fails_and_one_that_hangs(tmp_path: Path) -> None:
    said = "import sys; print('first', file=sys.stderr); sys.exit('the reason')"
    with pytest.raises(ZmoeError, match="^the reason$"):
        output([sys.executable, "-c", said], 60)
    pid = tmp_path / "pid"
    hangs = f"open({str(pid)!r}, 'w').write(str(__import__('os').getpid())); input_ = 1\n"
    hangs += "import time\nwhile True: time.sleep(60)"
    with pytest.raises(ZmoeError, match="not done within 2 s"):
        output([sys.executable, "-c", hangs], 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    out, _ = output([sys.executable, "-c", "import os; print(os.environ['X'])"], 60, {"X": "1"})
    assert out == "1\n"


def test_other_tokens_are_told() -> None:
    assert compared([1, 2], [1, 2]) == "the same 2 tokens"
    for tokens, words in (([1, 3], r"token 1 is \[3\], and \[2\] with"), ([1], r"token 1 is \[\]")):
        with pytest.raises(ZmoeError, match=words):
            compared(tokens, [1, 2])
    with pytest.raises(ZmoeError, match="no tokens of mlx-lm"):
        SelfTest(Path()).mode(())


def test_a_host_that_is_not_reached_or_has_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    stand_in_for_ssh(tmp_path)
    with pytest.raises(ZmoeError, match="Connection timed out"):
        hosts.reached(Host("unreachable", "127.0.0.3"), RemoteOptions())
    monkeypatch.setattr(hosts, "version", lambda name: "0.0.0")
    with pytest.raises(ZmoeError, match=r"has zmoe .*, and this machine 0\.0\.0"):
        hosts.reached(HOST, RemoteOptions())
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho Welcome!\n")
    other.chmod(0o755)
    with pytest.raises(ZmoeError, match="prints 'Welcome!' before"):
        hosts.reached(HOST, RemoteOptions(str(other)))
    names = [check.name for check in hosts.checks(Hosts(hosts_from_names("127.0.0.1,127.0.0.2")))]
    assert names == ["exchange on this machine", "host 127.0.0.2", "exchange with the hosts"]


def test_the_command_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No device: what depends on one is left out, and everything else is there."""
    monkeypatch.setattr(machine, "device", lambda: fail(ZmoeError("wedged")))
    monkeypatch.setattr(hosts, "checks", lambda given: [])
    assert command.main(["--json"]) == 1
    out, errors = capsys.readouterr()
    report = json.loads(out)
    found = {result["check"]: result for result in report["results"]}
    assert report["environment"]["failed"] == 1
    assert found["device"]["value"] == "wedged" and not found["device"]["ok"]
    assert "Python 3." in found["versions"]["value"]
    assert "lo 127.0.0.1 (MTU " in found["interfaces"]["value"]
    assert "GENERIC" in found["instruction sets"]["value"]
    assert "mlx-lm" not in found
    assert errors.splitlines()[-1] == "zmoe-doctor: failed: device"


def test_bad_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, words in (
        (["--hostfile", str(tmp_path / "no.json")], "no.json"),
        (["--hosts", "127.0.0.1"], "at least two"),
        (["--python", "x"], "--python is for --hosts"),
        (["extra"], "extra"),
    ):
        try:
            code = command.main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, errors = capsys.readouterr()
        assert (code, out) == (2, "") and words in errors.splitlines()[-1]
