"""Two machines that share only a network: network namespaces joined by a veth pair."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import PATIENCE_S, Commands, first_output

A, B = "10.213.7.1", "10.213.7.2"
GREEDY = ("--temp", "0", "-m", "16", "ROMEO:")


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=PATIENCE_S)


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with addresses A and B."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = tuple(f"zmoe{os.getpid()}{side}" for side in "ab")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError:
            pytest.skip("this system does not allow network namespaces")
        ip(
            "link",
            "add",
            "zmoe0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "zmoe0",
            "netns",
            names[1],
        )
        for name, address in zip(names, (A, B)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "zmoe0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "zmoe0", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@pytest.fixture
def ssh(commands: Commands, two_hosts: tuple[str, str], tmp_path: Path) -> None:
    """An `ssh` that enters the second namespace."""
    script = tmp_path / "ssh"
    enter = f"ip netns exec {two_hosts[1]} sh -c"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {enter} "$last"\n')
    script.chmod(0o755)
    commands.env["PATH"] = f"{tmp_path}:{commands.env['PATH']}"


def leader(commands: Commands, host: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "zmoe.cli.run", *arguments],
        env=commands.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    commands.started.append(process)
    return process


@pytest.mark.usefixtures("ssh")
def test_two_machines_write_the_same_text(commands: Commands, two_hosts: tuple[str, str]) -> None:
    alone = commands.call("run", *GREEDY).stdout
    process = leader(commands, two_hosts[0], "--hosts", f"{A},{B}", *GREEDY)
    text, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert text == alone
    assert f"listening on {A}; links are not yet encrypted" in errors


@pytest.mark.usefixtures("ssh")
def test_a_cut_cable_is_a_lost_peer(commands: Commands, two_hosts: tuple[str, str]) -> None:
    process = leader(
        commands,
        two_hosts[0],
        "--hosts",
        f"{A},{B}",
        "-m",
        "100000",
        "ROMEO:",
    )
    first_output(process)
    ip("-n", two_hosts[1], "link", "set", "zmoe0", "down")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, errors
    assert re.search(r"zmoe-run: rank 1 .*step \d+", errors)
