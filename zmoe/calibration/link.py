"""The exchange among processes of this machine, or of several: latency and bandwidth.

Rank 0 is this process. Every other one is started here or over ssh, takes part in
a known series of exchanges and ends; it also ends when its standard input closes. Beyond this
machine the exchange is encrypted, as those of a run: a key that all have comes as the first line
of standard input.
"""

from __future__ import annotations

import os
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from zmoe.calibration.matmuls import Progress
from zmoe.cluster.hosts import Host, HostList
from zmoe.cluster.launch import NodeProcess, end_all, over_ssh
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import LaunchError, ZmoeError
from zmoe.exchange.keys import KeyPair, is_loopback
from zmoe.exchange.local import join
from zmoe.perf.links import PER_PEER_S, Link

EXCHANGES, WARM_UP = 300, 20
SIZES = (4 << 10, 1 << 20)  # bytes: of a decode step, and of a prompt
DEADLINE_S = 30.0
PORTS = (20_000, 32_000)
LOOPBACK = HostList((Host("localhost", "127.0.0.1"),) * 3)
_RANK = "import sys; sys.path = [p for p in sys.path if p]; from {} import main; sys.exit(main())"


@dataclass(frozen=True)
class Hosts:
    """Where the ranks run, this machine first, and how the others are started."""

    hosts: HostList = LOOPBACK
    remote: RemoteOptions = field(default_factory=RemoteOptions)

    @property
    def name(self) -> str:
        """Of the link between them."""
        names = [host.ssh for host in self.hosts.hosts]
        return "loopback" if self.hosts is LOOPBACK else ",".join(names)


def measure_link(given: Hosts, progress: Progress) -> Link:
    """Between rank 0 and each other one the slowest counts, since all wait for it; what a
    further peer adds is seen among all of them.

    Raises LaunchError, which names a host that did not take part.
    """
    hosts = given.hosts.hosts
    pairs = []
    for host in {host.ssh: host for host in hosts[1:]}.values():
        progress(f"exchange with {host.ssh}")
        pairs.append(_seconds([hosts[0], host], given.remote))
    small, large = (max(pair[size] for pair in pairs) for size in range(len(SIZES)))
    per_peer_s = PER_PEER_S
    if len(hosts) > 2:
        progress(f"exchange of {len(hosts)} nodes")
        everyone = _seconds(hosts, given.remote)
        per_peer_s = max(0.0, everyone[0] - small) / (len(hosts) - 2)
    return Link(
        name=given.name,
        latency_s=small,
        bandwidth=(SIZES[1] - SIZES[0]) / max(large - small, 1e-9),
        source=f"measured by zmoe-plan --calibrate between processes on {given.name}",
        per_peer_s=per_peer_s,
    )


def _seconds(hosts: Sequence[Host], remote: RemoteOptions) -> list[float]:
    """Median seconds of one all-reduce of each of SIZES among `hosts`, as the first sees it."""
    with others(hosts, remote, __name__) as (addresses, key, check):
        return _take_part(0, addresses, key, check)


@contextmanager
def others(
    hosts: Sequence[Host], remote: RemoteOptions, module: str
) -> Iterator[tuple[list[str], KeyPair | None, Callable[[], None]]]:
    """Have all `hosts` but the first run main() of `module`, with rank and addresses as arguments.

    Yields the addresses by rank, the key that all get where there are other machines, and what
    raises LaunchError if one of them has ended.
    """
    ports = free_port_pairs(len(hosts))
    addresses = [f"{host.address}:{port}" for host, port in zip(hosts, ports)]
    processes: list[NodeProcess] = []
    local_only = all(is_loopback(host.address) for host in hosts)
    key = None if local_only else KeyPair.fresh()

    def check() -> None:
        for process in processes:
            if process.exit_code() is not None:
                raise LaunchError(f"node {process.rank} {process.ending()}")

    try:
        for rank, host in enumerate(hosts[1:], 1):
            words = ["-c", _RANK.format(module), str(rank), *addresses]
            local = [sys.executable, *words]
            command = local if host.is_local else over_ssh(words, host, remote)
            line = key.secret if key is not None else ""
            processes.append(NodeProcess(rank, host.ssh, command, dict(os.environ), line))
        yield addresses, key, check
    except ZmoeError:
        check()  # what a process said of its end explains more
        raise
    finally:
        end_all(processes, patience=1.0)


def _take_part(
    rank: int, addresses: Sequence[str], key: KeyPair | None, tick: Callable[[], None]
) -> list[float]:
    """One rank's part of the measurement. Raises LaunchError, PeerError."""
    medians = []
    with join(rank, addresses, key=key, deadline_s=DEADLINE_S, tick=tick) as exchange:
        for size in SIZES:
            payload = np.ones((1, size // 4), np.float32)
            taken = []
            for _ in range(WARM_UP + EXCHANGES):
                begin = time.perf_counter()
                exchange.all_reduce_numpy(payload)
                taken.append(time.perf_counter() - begin)
            medians.append(statistics.median(taken[WARM_UP:]))
    return medians


def free_port_pairs(count: int) -> list[int]:
    """Ports that are free here, as is the one after each.

    Not from the range that systems give to outgoing connections: one of those
    could take a port before its rank, still starting, has bound it.
    """
    found: list[int] = []
    for port in random.sample(range(*PORTS, 2), (PORTS[1] - PORTS[0]) // 2):
        with socket.socket() as data, socket.socket() as control:
            try:
                data.bind(("", port))
                control.bind(("", port + 1))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise LaunchError(f"no free ports between {PORTS[0]} and {PORTS[1]}")


def end_with_input() -> None:
    """End this process when its standard input closes."""
    threading.Thread(target=_wait_for_input, daemon=True).start()


def _wait_for_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    """A rank other than 0: its number and all addresses are the arguments; its exit code."""
    line = sys.stdin.readline().strip()
    end_with_input()
    try:
        key = KeyPair.of(line) if line else None
        _take_part(int(sys.argv[1]), sys.argv[2:], key, lambda: None)
    except ZmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
