"""Host lists of mlx.launch, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zmoe.cluster.hosts import Host, hosts_from_file, hosts_from_names
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
        ("{", "not JSON"),
        ([], "list of hosts"),
        ({"hosts": []}, "list of hosts"),
        ({"hosts": [{"ssh": "localhost"}], "speed": 1}, "unknown field 'speed'"),
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
    with pytest.raises(InputError, match="none.json: No such file"):
        hosts_from_file(tmp_path / "none.json")


@pytest.mark.parametrize("names", ["", "a,,b", "no-such-host.invalid"])
def test_bad_names_are_refused(names: str) -> None:
    with pytest.raises(InputError, match="--hosts"):
        hosts_from_names(names)
