"""A run whose control link is broken, slowed down or taken over, by a relay in its way."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import zmoe
from tests.cluster.conftest import PATIENCE_S, Commands, wait_until
from tests.relay import Relay
from zmoe.cluster import crew
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.exchange.keys import Pinned
from zmoe.exchange.sockets import Context

TOKENS = 60


class Run:
    """A cluster of two nodes; the worker's control link, and no other, goes by `relay`."""

    def __init__(
        self,
        commands: Commands,
        port: int,
        stack: ExitStack,
        grace: float = 30.0,
        keep_alive: float = 0.0,
    ) -> None:
        timing = zmoe.Timing(join=PATIENCE_S, grace=grace)
        self.spec = zmoe.ClusterSpec(
            nodes=2, manual=True, port=port, timing=timing, keep_alive=keep_alive
        )
        self.relay = stack.enter_context(Relay(port))
        leader = f"127.0.0.1:{self.relay.port}"
        self.worker = commands.start("node", "--leader", leader, "--rank", 1, "--once")
        self.cluster = stack.enter_context(zmoe.Cluster(spec=self.spec))

    def ids(self, disturb: dict[int, object]) -> list[int]:
        """The tokens of one text; before its n-th one disturb[n] is called."""
        ids = []
        for token in self.cluster.generate("ROMEO:", max_tokens=TOKENS, temp=0.8, seed=3):
            ids.append(token.id)
            if callable(act := disturb.get(len(ids))):
                act()
        return ids


@pytest.fixture
def run(commands: Commands, free_port: int) -> Iterator[Run]:
    with ExitStack() as stack:
        yield Run(commands, free_port, stack)


def test_a_link_that_is_disturbed_changes_no_token(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one run, one after the other; then the worker ends as after any other run."""
    relay = run.relay

    def for_a_while(begin: object, seconds: float) -> object:
        """Calls `begin`; the relay is restored later, in mid-text, while steps wait for it."""

        def act() -> None:
            assert callable(begin)
            begin()
            threading.Timer(seconds, relay.restore).start()

        return act

    calm = run.ids({})
    for seconds in (0.4, 1.5):  # the second is longer than a worker would wait by default
        cut = for_a_while(lambda: relay.cut(refuse=True), seconds)
        assert run.ids({10: cut}) == calm
    cut = for_a_while(lambda: relay.cut(refuse=True), 0.02)
    assert run.ids({10: cut, 40: cut}) == calm
    in_a_step = {n: lambda: relay.cut_after(40, to_server=False) for n in (10, 30, 50)}
    assert run.ids({**in_a_step}) == calm
    assert run.ids({10: for_a_while(relay.hold, 0.5)}) == calm
    assert run.ids({10: lambda: relay.delay(0.01), 40: relay.restore}) == calm
    assert run.ids({10: lambda: relay.throttle(20_000), 40: relay.restore}) == calm
    assert relay.accepted >= 6
    monkeypatch.setattr(crew, "FAREWELL_S", PATIENCE_S)  # the machine may be busy
    relay.cut()
    run.cluster.close()  # waits until its Stop has arrived
    _, errors = run.worker.communicate(timeout=PATIENCE_S)
    assert run.worker.returncode == 0
    assert [line.partition(": ")[2].split()[0] for line in errors.splitlines()] == [
        "waiting",
        "began",
        "the",
    ]


def test_a_worker_whose_link_stays_half_open_is_given_up(
    commands: Commands, free_port: int
) -> None:
    with ExitStack() as stack:
        run = Run(commands, free_port, stack, grace=1.0)
        calm = run.ids({})
        assert run.ids({10: run.relay.hold}) == calm
        assert run.cluster.hosts == (0, 0)
    _, errors = run.worker.communicate(timeout=PATIENCE_S)
    assert run.worker.returncode == 1
    assert re.search(r"rank 0 .* is gone", errors), errors


def test_a_worker_whose_link_comes_back_returns_with_its_weights(
    commands: Commands, free_port: int
) -> None:
    with ExitStack() as stack:
        run = Run(commands, free_port, stack, grace=1.0, keep_alive=PATIENCE_S)
        calm = run.ids({})
        read_before = bytes_read(run.worker.pid)
        assert run.ids({10: run.relay.hold}) == calm
        assert run.cluster.hosts == (0, 0)
        run.relay.restore()
        until = time.monotonic() + PATIENCE_S
        while run.cluster.hosts != (0, 1):
            assert time.monotonic() < until
            run.cluster.step()
        assert run.ids({}) == calm
        weights = Path(run.cluster.info.path) / "model.safetensors"
        assert bytes_read(run.worker.pid) - read_before < weights.stat().st_size / 4
    _, errors = run.worker.communicate(timeout=PATIENCE_S)
    assert run.worker.returncode == 0, errors
    assert "is gone" in errors


def bytes_read(pid: int) -> int:
    """By a process, from files."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_another_run_on_the_leaders_port_is_named(commands: Commands, free_port: int) -> None:
    context = Context()
    options = {"session": 1, "nodes": 2, "grace": 1.0, "keys": Pinned.of_user()}
    other = LeaderBus(context, "127.0.0.1", 0, **options)
    with ExitStack() as stack:
        run = Run(commands, free_port, stack, grace=1.0)
        calm = run.ids({})

        def switch() -> None:
            run.relay._target = ("127.0.0.1", other.port)
            run.relay.cut()
            wait_until(lambda: other.hear() or other.dropped, PATIENCE_S, "the worker calls")

        assert run.ids({10: switch}) == calm
        assert run.cluster.hosts == (0, 0)
    _, errors = run.worker.communicate(timeout=PATIENCE_S)
    assert re.search(r"is gone: the leader of another run listens there", errors), errors
    other.close()
    context.term()


def test_a_second_worker_of_a_rank_is_told_and_harms_nobody(run: Run, commands: Commands) -> None:
    def second() -> subprocess.Popen[str]:
        leader = f"127.0.0.1:{run.spec.port}"
        return commands.start("node", "--leader", leader, "--rank", 1, "--once")

    calm = run.ids({})
    process = second()
    ids = calm
    while process.poll() is None:
        assert ids == calm
        ids = run.ids({})
    assert ids == calm
    assert process.returncode == 1
    assert process.stderr is not None
    assert "rank 1 is taken by a worker on" in process.stderr.read()
