"""The exchange between hosts as zmoe-plan --calibrate measures it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zmoe.calibration.link import Hosts, measure_link
from zmoe.cluster.hosts import Host, HostList, hosts_from_names
from zmoe.cluster.launch import RemoteOptions
from zmoe.errors import LaunchError


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ssh that logs its host, refuses one, and runs the command here."""
    log, script = tmp_path / "ssh.log", tmp_path / "ssh"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "*options, host, command = sys.argv[1:]\n"
        f"open({str(log)!r}, 'a').write(host + '\\n')\n"
        "if host == 'unreachable':\n"
        "    sys.exit('ssh: connect to host unreachable port 22: Connection timed out')\n"
        "os.execv('/bin/sh', ['sh', '-c', command])\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return log


def test_between_three_hosts(ssh: Path) -> None:
    said: list[str] = []
    names = "127.0.0.1,127.0.0.2,127.0.0.3"
    found = measure_link(Hosts(hosts_from_names(names)), said.append)
    assert found.name == names
    assert 0 < found.latency_s < 1 and found.bandwidth > 1e6 and found.per_peer_s >= 0
    assert sorted(ssh.read_text().split()) == sorted(["127.0.0.2", "127.0.0.3"] * 2)
    assert said == [
        "exchange with 127.0.0.2",
        "exchange with 127.0.0.3",
        "exchange of 3 nodes",
    ]


def test_a_host_that_does_not_answer_is_named() -> None:
    hosts = (Host("127.0.0.1", "127.0.0.1"), Host("unreachable", "127.0.0.2"))
    with pytest.raises(LaunchError, match="node 1 on unreachable ended: .*Connection timed out"):
        measure_link(Hosts(HostList(hosts)), lambda text: None)


def test_an_interpreter_that_is_not_there() -> None:
    given = Hosts(hosts_from_names("127.0.0.1,127.0.0.2"), RemoteOptions("/no/python"))
    with pytest.raises(LaunchError, match="node 1 on 127.0.0.2 ended: .*/no/python"):
        measure_link(given, lambda text: None)
