"""The library's door on a single node: what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from zmoe.cluster.cluster import Cluster
from zmoe.cluster.hosts import Host, HostList
from zmoe.cluster.launch import divide_cores
from zmoe.cluster.leader import ClusterSpec
from zmoe.config import Sampling
from zmoe.errors import InputError, ZmoeError


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("zmoe-tiny") as alone:
        yield alone


@pytest.mark.parametrize("ids", [[], [999999], [-1]])
def test_token_ids_that_are_none(cluster: Cluster, ids: list[int]) -> None:
    with pytest.raises(InputError, match="prompt"):
        cluster.generate(ids)


def test_token_ids_of_numpy_are_fine(cluster: Cluster) -> None:
    ids = np.array([5, 6, 7])
    wanted = [token.id for token in cluster.generate([5, 6, 7], max_tokens=4)]
    assert [token.id for token in cluster.generate(ids, max_tokens=4)] == wanted


def test_options_come_once(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="sampling or temp, not both"):
        cluster.generate("x", Sampling(), temp=1.0)
    with pytest.raises(TypeError, match="heat"):
        cluster.generate("x", heat=1.0)


def test_a_newer_generation_ends_the_older(cluster: Cluster) -> None:
    older = cluster.generate("ROMEO:", max_tokens=9)
    next(older)
    newer = cluster.generate("JULIET:", max_tokens=3)
    next(newer)
    with pytest.raises(ZmoeError, match="another generation"):
        next(older)
    assert len(list(newer)) == 2


def test_addresses_that_others_cannot_reach() -> None:
    hosts = HostList((Host("a", "127.0.1.1"), Host("b", "10.1.2.3")))
    words = "the first host, a, is this machine at 127.0.1.1, where b cannot reach it"
    with pytest.raises(InputError, match=words):
        ClusterSpec(nodes=2, hosts=hosts)
    for address in ("0.0.0.0", "no address", "::1"):
        with pytest.raises(InputError, match=f"--bind {address}"):
            ClusterSpec(nodes=2, bind=address)


def test_addresses_of_other_machines() -> None:
    """192.0.2.1 is kept for documentation: no machine has it."""
    elsewhere = Host("a", "192.0.2.1")
    words = "the first host, a, has to be this machine: .* does not have the address 192.0.2.1"
    with pytest.raises(InputError, match=words):
        ClusterSpec(nodes=2, hosts=HostList((elsewhere, Host("b", "192.0.2.2"))))
    with pytest.raises(InputError, match="--bind: .* does not have the address 192.0.2.1"):
        ClusterSpec(nodes=2, bind="192.0.2.1")
    ClusterSpec(nodes=1, hosts=HostList((elsewhere,)))  # where nobody listens


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin")
def test_cores_are_divided_among_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2, 10)))
    assert divide_cores(1) == [list(range(2, 10))]
    assert divide_cores(3) == [[2, 3], [4, 5], [6, 7]]
    assert divide_cores(9)[-2:] == [[9], [2]]
