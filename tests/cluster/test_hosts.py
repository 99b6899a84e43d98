"""Several machines: here other loopback addresses, reached through a stand-in for ssh."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cluster.conftest import Commands, stand_in_for_ssh

GREEDY = ("--temp", 0, "-m", 16, "ROMEO:")


@pytest.fixture
def ssh(commands: Commands, tmp_path: Path) -> Path:
    """The log of a stand-in for ssh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands.env["PATH"] = f"{folder}:{commands.env['PATH']}"
    return stand_in_for_ssh(folder)


def test_hosts_over_ssh_write_the_same_text(commands: Commands, ssh: Path, tmp_path: Path) -> None:
    alone = commands.call("run", *GREEDY).stdout
    hosts = "127.0.0.1,127.0.0.2,127.0.0.3"
    done = commands.call("run", "--hosts", hosts, *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
    calls = sorted(ssh.read_text().splitlines())  # they start at once
    assert len(calls) == 2
    assert "'127.0.0.2'" in calls[0]
    assert "BatchMode=yes" in calls[0]


def test_a_hostfile_brings_names_and_environment(
    commands: Commands, ssh: Path, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hosts.json"
    hosts = [{"ssh": "me", "ips": ["127.0.0.1"]}, {"ssh": "you@other", "ips": ["127.0.0.2"]}]
    hostfile.write_text(json.dumps({"envs": ["ZMOE_GREETING=hi there"], "hosts": hosts}))
    flags = ("--hostfile", hostfile, "--cwd", tmp_path, "--env", "A=1")
    done = commands.call("run", *flags, *GREEDY)
    assert done.returncode == 0, done.stderr
    call = ssh.read_text()
    assert "you@other" in call
    assert f"cd {tmp_path} && env" in call
    assert "ZMOE_GREETING=hi there" in call


def test_an_unreachable_host_is_named_with_what_ssh_said(commands: Commands, ssh: Path) -> None:
    hostfile = ssh.parent / "hosts.json"
    hosts = [{"ssh": "me", "ips": ["127.0.0.1"]}, {"ssh": "unreachable", "ips": ["127.0.0.2"]}]
    hostfile.write_text(json.dumps(hosts))
    line = commands.refused("--hostfile", hostfile, "x")
    assert "node 1 on unreachable" in line
    assert "Connection timed out" in line


def test_an_interpreter_that_is_not_there(commands: Commands, ssh: Path) -> None:
    line = commands.refused("--hosts", "127.0.0.1,127.0.0.2", "--python", "/no/python", "x")
    assert "node 1 on 127.0.0.2" in line
    assert "/no/python" in line


def test_without_ssh_the_launch_says_so(commands: Commands, tmp_path: Path) -> None:
    commands.env["PATH"] = os.fspath(tmp_path)
    line = commands.refused("--hosts", "127.0.0.1,127.0.0.2", "x")
    assert "node 1 on 127.0.0.2" in line
    assert "ssh" in line
