"""The exchange between hosts as zmoe-plan --calibrate measures it."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest

from tests.cluster.conftest import stand_in_for_ssh
from zmoe.calibration import link
from zmoe.calibration.link import Hosts, measure_link
from zmoe.cluster.hosts import Host, HostList, hosts_from_names
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import LaunchError
from zmoe.exchange.local import join


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a stand-in for ssh."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return stand_in_for_ssh(tmp_path)


def test_between_three_hosts(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as other machines, so that a key goes to each through its ssh."""
    said: list[str] = []
    monkeypatch.setattr(link, "is_loopback", lambda address: False)
    made = []
    monkeypatch.setattr(link, "join", lambda *a, **k: made.append(join(*a, **k)) or made[-1])
    names = "127.0.0.1,127.0.0.2,127.0.0.3"
    found = measure_link(Hosts(hosts_from_names(names)), said.append)
    assert found.name == names
    assert all(exchange.is_encrypted for exchange in made)
    assert len({exchange.endpoint.key for exchange in made}) == 3
    assert not any(exchange.endpoint.key in ssh.read_text() for exchange in made)
    assert 0 < found.latency_s < 1 and found.bandwidth > 1e6 and found.per_peer_s >= 0
    reached = (host for _, host, _ in map(literal_eval, ssh.read_text().splitlines()))
    assert sorted(reached) == sorted(["127.0.0.2", "127.0.0.3"] * 2)
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
