"""Workers' processes that one leader leaves to the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from zmoe.cluster.crew import new_access
from zmoe.cluster.keeper import Keeper, Lender, LentProcess
from zmoe.cluster.spec import ClusterSpec
from zmoe.errors import LaunchError

SLEEP = [sys.executable, "-c", "import time; time.sleep(3600)"]


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()


def start(lender: Lender, line: str = "token") -> LentProcess:
    return lender.start(1, "this machine", SLEEP, {}, line)


def test_the_next_leader_gets_what_was_started_alike(keeper: Keeper) -> None:
    first = Lender(keeper.lend())
    assert first.access is None
    access = new_access(ClusterSpec(nodes=2, port=9))
    first.remember(access)
    process = start(first)
    assert (process.is_left, process.exit_code()) == (False, None)
    first._pipe.close()  # as it is when the leader ends, however

    second = Lender(keeper.lend())
    assert second.access == access
    left = start(second)
    assert (left.is_left, left.pid) == (True, process.pid)
    other = start(second, "another token")
    assert (other.is_left, other.pid == process.pid) == (False, False)
    other.kill()
    assert other.wait(float("inf"))
    assert other.exit_code() == -9
    assert f"(pid {other.pid}) was killed by SIGKILL" in other.ending()
    again = start(second, "another token")
    assert (again.is_left, again.exit_code()) == (False, None)

    keeper.close()
    assert again.exit_code() == -15
    with pytest.raises(LaunchError, match="the server is closing"):
        start(second)


def test_what_cannot_be_started_is_named(keeper: Keeper) -> None:
    with pytest.raises(LaunchError, match="cannot start node 1 on here: /no/such: No such file"):
        Lender(keeper.lend()).start(1, "here", ["/no/such"], {}, "token")
