"""Host lists of mlx.launch, and what is refused in them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from zmoe.cluster.hosts import Host, check_leader, hosts_from_file, hosts_from_names
from zmoe.errors import InputError


def write(folder: Path, data: object) -> Path:
    path = folder / "hosts.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_names_keep_their_order_and_user() -> None:
    found = hosts_from_names("127.0.0.1,me@127.0.0.2")
    assert found.hosts == (Host("127.0.0.1", "127.0.0.1"), Host("me@127.0.0.2", "127.0.0.2"))


def test_both_shapes_of_hostfile(tmp_path: Path) -> None:
    entries = [{"ssh": "a", "ips": ["127.0.0.1"]}, {"ssh": "b", "ips": ["127.0.0.2"], "rdma": []}]
    plain = hosts_from_file(write(tmp_path, entries))
    assert plain.hosts == (Host("a", "127.0.0.1"), Host("b", "127.0.0.2"))
    full = hosts_from_file(
        write(tmp_path, {"backend": "ring", "envs": ["A=1", "B=x=y"], "hosts": entries})
    )
    assert full.hosts == plain.hosts
    assert full.envs == ("A=1", "B=x=y")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "list of hosts"),
        ({"hosts": []}, "list of hosts"),
        ({"hosts": [{"ssh": "localhost"}], "speed": 1}, "unknown field 'speed'"),
        ({"hosts": [{"ssh": "localhost"}], "envs": 1}, '"envs" is no list'),
        ([{"ips": ["127.0.0.1"]}], "host 0"),
        ([{"ssh": "localhost", "port": 1}], "host 0: unknown field 'port'"),
        ([{"ssh": "localhost"}, {"ssh": "x", "ips": "127.0.0.1"}], "host 1.*no list"),
        ([{"ssh": "-oProxyCommand=x", "ips": ["127.0.0.1"]}], "no host name"),
        ({"hosts": [{"ssh": "localhost"}], "envs": ["1=2"]}, "NAME=VALUE"),
    ],
)
def test_bad_hostfiles_name_the_file_and_the_fault(tmp_path: Path, data: Any, reason: str) -> None:
    with pytest.raises(InputError, match=rf"hosts\.json.*{reason}"):
        hosts_from_file(write(tmp_path, data))


def test_a_missing_hostfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.json cannot be read: No such file"):
        hosts_from_file(tmp_path / "none.json")


@pytest.mark.parametrize("names", ["", "a,,b", "no-such-host.invalid"])
def test_bad_names_are_refused(names: str) -> None:
    with pytest.raises(InputError, match="--hosts"):
        hosts_from_names(names)


def test_ipv6_is_not_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--hosts: ::1 is not an IPv4 address; .* IPv6"):
        hosts_from_names("::1,127.0.0.1")
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(InputError, match="--hosts: 'modern' has no IPv4 address; .* IPv6"):
        hosts_from_names("modern")


@pytest.mark.parametrize(
    ("leader", "words"),
    [
        ("10.0.0.1", "expected HOST:PORT"),
        (":9700", "expected HOST:PORT"),
        ("10.0.0.1:0", "expected HOST:PORT"),
        ("10.0.0.1:99999", "expected HOST:PORT"),
        ("10.0.0.1:x", "expected HOST:PORT"),
        ("[::1]:9700", "IPv6"),
        ("no-such-host.invalid:9700", "cannot resolve 'no-such-host.invalid'"),
        ("a b:9700", "cannot resolve 'a b'"),
        (f"{'a' * 80}.b:9700", "cannot resolve"),
    ],
)
def test_leaders_that_cannot_be_found(leader: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_leader(leader, "--leader")
    assert str(caught.value).startswith(f"--leader {leader}: ")
