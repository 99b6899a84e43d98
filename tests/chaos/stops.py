"""Nodes that hang, and links that are cut: `python -m tests.chaos.stops [KIND ...]`.

Each kind runs on three nodes, two of which were started by hand, and the text must be that of an
undisturbed run. The kinds with links need namespaces of their own, and therefore root.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.conftest import PATIENCE_S, Commands, commands_in, first_output, wait_until
from tests.conftest import unused_port
from tests.namespaces import LINK, A, B, C, ip, namespaces, stand_in_for_ssh
from zmoe import Cluster, ClusterSpec

OPTIONS: dict[str, Any] = {"max_tokens": 120, "temp": 0.8, "seed": 4, "ignore_eos": True}
SHORT_S, LONG_S = 3.0, 10.0  # within and beyond the silence for which a link is given up
RUN = ("-m", "400", "--temp", "0.8", "--seed", "5", "--placement", "experts", "ROMEO:")


@contextlib.contextmanager
def by_hand(
    commands: Commands, told: list[str]
) -> Iterator[tuple[Cluster, list[subprocess.Popen[str]]]]:
    """Three nodes, of which this process is the leader; and the processes of the others."""
    port = unused_port()
    workers = [
        commands.start("node", "--leader", f"127.0.0.1:{port}", "--rank", rank) for rank in (1, 2)
    ]
    spec = ClusterSpec(nodes=3, manual=True, port=port)
    with Cluster(spec=spec, on_notice=told.append) as cluster:
        yield cluster, workers


def generate(cluster: Cluster, at: int = 0, then: Callable[[], object] = bool) -> list[int]:
    """A text; `then` is called after the token `at`."""
    found = []
    for token in cluster.generate("ROMEO:", **OPTIONS):
        found.append(token.id)
        if len(found) == at:
            then()
    return found


def stopped_for_a_moment(commands: Commands) -> None:
    """SIGSTOP for less than a link may be silent: nobody is evicted."""
    told: list[str] = []
    with by_hand(commands, told) as (cluster, workers):
        whole = generate(cluster)
        again = threading.Timer(SHORT_S, workers[0].send_signal, (signal.SIGCONT,))

        def stop() -> None:
            workers[0].send_signal(signal.SIGSTOP)
            again.start()

        assert generate(cluster, 50, stop) == whole
        again.join()
        assert (cluster.hosts, told) == ((0, 1, 2), [])


def stopped_for_long(commands: Commands) -> None:
    """SIGSTOP for longer: it is evicted, is let do nothing after SIGCONT, and comes back."""
    told: list[str] = []
    with by_hand(commands, told) as (cluster, workers):
        whole, began = generate(cluster), time.monotonic()
        assert generate(cluster, 50, lambda: workers[0].send_signal(signal.SIGSTOP)) == whole
        assert cluster.hosts == (0, 2, 2), told
        assert "node 1 did not halt in time" not in told  # its silence has told it before
        assert generate(cluster) == whole
        time.sleep(max(0.0, LONG_S - (time.monotonic() - began)))
        workers[0].send_signal(signal.SIGCONT)
        assert generate(cluster) == whole

        def all_here() -> bool:
            cluster.step()
            return cluster.hosts == (0, 1, 2)

        wait_until(all_here, PATIENCE_S, "the node is back")
        assert generate(cluster) == whole
        assert [worker.poll() for worker in workers] == [None, None]


def halting(commands: Commands) -> None:
    """SIGSTOP for most of the time, again and again: it is called slow until it runs freely, and
    nobody is evicted.
    """
    told: list[str] = []
    with by_hand(commands, told) as (cluster, workers):
        whole, is_over = generate(cluster), threading.Event()

        def halt() -> None:
            while not is_over.is_set():
                workers[0].send_signal(signal.SIGSTOP)
                time.sleep(0.09)
                workers[0].send_signal(signal.SIGCONT)
                is_over.wait(0.01)

        def becomes(line: str) -> bool:
            assert generate(cluster) == whole
            return any(each.startswith(line) for each in told)

        halter = threading.Thread(target=halt)
        halter.start()
        try:
            wait_until(lambda: becomes("node 1 is slow"), PATIENCE_S, "it is called slow")
        finally:
            is_over.set()
            halter.join()
        wait_until(lambda: becomes("node 1 is no longer slow"), PATIENCE_S, "it no longer is")
        assert cluster.hosts == (0, 1, 2) and len(told) == 2, told


def on_three_machines(commands: Commands, cut: Callable[[tuple[str, ...]], object]) -> str:
    """What zmoe-run says on standard error when `cut` is called with the names of its machines,
    after the first character of a text that must be that of an undisturbed run.
    """
    texts, errors = [], ""
    with namespaces() as names, tempfile.TemporaryDirectory() as folder:
        stand_in_for_ssh(Path(folder), names)
        commands.env["PATH"] = f"{folder}:{commands.env['PATH']}"
        for disturb in (False, True):
            leader = subprocess.Popen(
                [
                    *("ip", "netns", "exec", names[0], sys.executable, "-m", "zmoe.cli.run"),
                    *("--hosts", f"{A},{B},{C}", *RUN),
                ],
                env=commands.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            commands.started.append(leader)
            first_output(leader)
            if disturb:
                cut(names)
            text, errors = leader.communicate(timeout=PATIENCE_S)
            assert leader.returncode == 0, errors
            texts.append(text)
    whole, disturbed = texts
    assert disturbed == whole, errors
    return errors


def parted(commands: Commands) -> None:
    """Two workers do not reach each other any more, but both the leader: one goes."""

    def cut(names: tuple[str, ...]) -> None:
        ip("-n", names[1], "route", "add", "blackhole", f"{C}/32")
        ip("-n", names[2], "route", "add", "blackhole", f"{B}/32")

    errors = on_three_machines(commands, cut)
    assert "node 2 and node 1 cannot reach each other" in errors, errors
    assert "node 1 computes the share of node 2" in errors or "node 0 computes" in errors, errors


def silent(commands: Commands) -> None:
    """The link of a machine goes down: nothing says so but its silence."""
    errors = on_three_machines(
        commands, lambda names: ip("-n", names[1], "link", "set", LINK, "down")
    )
    assert "computes the share of node 1" in errors, errors


KINDS: dict[str, Callable[[Commands], None]] = {
    "moment": stopped_for_a_moment,
    "long": stopped_for_long,
    "halting": halting,
    "parted": parted,
    "silent": silent,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tests.chaos.stops", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"Of {', '.join(KINDS)}")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    for kind in args.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder, commands_in(Path(folder)) as commands:
            began = time.monotonic()
            KINDS[kind](commands)
            print(f"{kind}: the text went on, {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
