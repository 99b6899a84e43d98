"""Machines that share only a network: network namespaces joined by a bridge."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.conftest import PATIENCE_S, Commands, first_output
from tests.namespaces import LINK, A, B, C, Unavailable, ip, namespaces, stand_in_for_ssh
from zmoe.exchange.keys import write_new_key

PROGRAM = Path(__file__).with_name("launched.py")
GREEDY = ("--temp", "0", "-m", "16", "ROMEO:")


@pytest.fixture
def hosts() -> Iterator[tuple[str, ...]]:
    """See namespaces()."""
    try:
        with namespaces() as names:
            yield names
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture
def ssh(commands: Commands, hosts: tuple[str, ...], tmp_path: Path) -> None:
    """An `ssh` into these."""
    stand_in_for_ssh(tmp_path, hosts)
    commands.env["PATH"] = f"{tmp_path}:{commands.env['PATH']}"


def start(
    commands: Commands, host: str, *arguments: str, **variables: str
) -> subprocess.Popen[str]:
    """Start Python with `arguments` in a namespace."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *arguments],
        env={**commands.env, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    commands.started.append(process)
    return process


def leader(commands: Commands, host: str, *arguments: str) -> subprocess.Popen[str]:
    return start(commands, host, "-m", "zmoe.cli.run", *arguments)


CAPTURE = """
import select, socket, sys
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
print("on", flush=True)
with open(sys.argv[1], "wb") as file:
    while sys.stdin not in select.select([sniffer, sys.stdin], [], [])[0]:
        file.write(sniffer.recv(1 << 16))
"""


@contextlib.contextmanager
def captured(commands: Commands, host: str, file: Path) -> Iterator[None]:
    """Write all that passes the network of `host`, which the nodes share, to `file`."""
    process = start(commands, host, "-c", CAPTURE, str(file))
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    yield
    process.communicate(timeout=PATIENCE_S)  # closes its standard input
    assert process.returncode == 0


@pytest.mark.usefixtures("ssh")
def test_no_byte_between_three_machines_is_in_clear(
    commands: Commands, hosts: tuple[str, ...], tmp_path: Path
) -> None:
    alone = commands.call("run", *GREEDY).stdout
    seen = []
    for flags in (("--insecure",), ()):
        with captured(commands, hosts[0], tmp_path / "packets"):
            process = leader(commands, hosts[0], *flags, "--hosts", f"{A},{B},{C}", *GREEDY)
            text, errors = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, errors
            assert text == alone
            assert ("links are not encrypted" in errors) == bool(flags)
        seen.append((tmp_path / "packets").read_bytes())
    clear, encrypted = seen
    # The same run sends the same plans and the same partial sums: what is found in one capture,
    # behind the headers of control messages and frames, must not be in the other.
    steps = set(re.findall(rb"zmoe\x01\0{7}.{24}\x92\xa4Step.{12}", clear, re.DOTALL))
    payloads = set(re.findall(rb"ZMOE.{60}(.{24})", clear, re.DOTALL))
    assert len(steps) >= 16
    assert len(payloads) >= 16 * 4
    for step in steps:
        assert step[-16:] not in encrypted
    for payload in payloads:  # some are zeros, as padding is
        assert payload not in encrypted or not any(payload)
    for word in (b"ROMEO", b"\xa5Setup", b"zmoe\x01\0\0\0", b"zmoe-tiny", b"ZMOE\x03"):
        assert word not in encrypted, word


def test_by_hand_and_with_a_stranger(
    commands: Commands, hosts: tuple[str, ...], tmp_path: Path
) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    public, others = write_new_key(ours).public, write_new_key(other).public
    run = ("--manual", "--starting-port", "9700", "--hosts", f"{A},{B},{C}", "--key", str(ours))
    process = leader(commands, hosts[0], *run, "--ports", "9700-9702", "--explain", *GREEDY)

    def node(rank: int, address: str, *flags: str, **variables: str) -> subprocess.Popen[str]:
        flags = ("-m", "zmoe.cli.node", "--once", "--bind", address, *flags)
        return start(commands, hosts[rank], *flags, **variables)

    first = ("--leader", f"{A}:9700", "--rank", "1", "--key")
    stranger = node(1, B, *first, str(other))
    _, errors = stranger.communicate(timeout=PATIENCE_S)
    assert stranger.returncode == 2
    why = f"does not answer by the public key that this node expects, {others}"
    assert errors.splitlines()[-1] == f"zmoe-node[1]: leader {A}:9700 {why}"
    told = {"ZMOE_LEADER": f"{A}:9700", "ZMOE_KEY_FILE": str(ours), "SLURM_PROCID": "2"}
    workers = [node(1, B, *first, str(ours)), node(2, C, "--rank-env", "SLURM_PROCID", **told)]
    text, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert f"--rank 2 --key {ours}" in errors
    assert public not in errors
    assert "links: encrypted\n" in errors
    listening = re.findall(r"  node [0-2]: (\S+), ports (.+)", errors)
    workers_listen = [(address, "9700, 9701") for address in (B, C)]
    assert listening == [(A, "9700, 9701, 9702"), *workers_listen]
    assert text == commands.call("run", *GREEDY).stdout
    for worker in workers:
        _, errors = worker.communicate(timeout=PATIENCE_S)
        assert worker.returncode == 0, errors


@pytest.mark.usefixtures("ssh")
def test_a_launched_program_sends_no_byte_in_clear(
    commands: Commands, hosts: tuple[str, ...], tmp_path: Path
) -> None:
    seen = []
    for flags in (("--insecure",), ()):
        launch = ("-m", "zmoe.cli.launch", *flags, "--hosts", f"{A},{B},{C}", str(PROGRAM), "any")
        with captured(commands, hosts[0], tmp_path / "packets"):
            process = start(commands, hosts[0], *launch)
            text, errors = process.communicate(timeout=PATIENCE_S)
            assert (process.returncode, text) == (0, "[3.0, 3.0, 3.0]\n"), errors
        seen.append((tmp_path / "packets").read_bytes())
    clear, encrypted = seen
    for word in (b"\xa7Program", b"zmoe\x01\0\0\0", b"ZMOE\x03", np.ones(3, np.float32).tobytes()):
        assert word in clear, word
        assert word not in encrypted, word


@pytest.mark.usefixtures("ssh")
def test_a_cut_cable_is_missed_by_nobody(commands: Commands, hosts: tuple[str, ...]) -> None:
    asked = ("-m", "400", "--temp", "0.8", "--seed", "5", "ROMEO:")
    whole, _ = commands.start("run", *asked).communicate(timeout=PATIENCE_S)
    process = leader(commands, hosts[0], "--hosts", f"{A},{B}", *asked)
    first_output(process)
    ip("-n", hosts[1], "link", "set", "zmoe0", "down")
    rest, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert "the run goes on; besides its own, node 0 computes the share of node 1" in errors
    assert whole.endswith(rest) and len(rest) > len(whole) // 2


CONTROL_LINK = """
import sys, time
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.cluster.messages import Join, Loading, Setup
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.errors import PeerError
from zmoe.exchange.sockets import Context

role, address = sys.argv[1:]
if role == "worker":
    join = Join(PROTOCOL_VERSION, 1, "", "there", "")
    bus = WorkerBus(Context(), f"{address}:9700", join, grace=60)
    while True:
        bus.take()
        if bus.has_session:
            bus.note(Loading(1, 2))
        time.sleep(0.02)
bus = LeaderBus(Context(), address, 9700, session=5, nodes=2, grace=1)
joined = talks = False
while True:
    try:
        heard = bus.hear()
    except PeerError as lost:
        sys.exit(str(lost))
    if heard and not joined:
        bus.broadcast(Setup(2, "m", EngineConfig(), Timing(), None))
        joined = True
    elif heard and not talks:
        print("talks", flush=True)
        talks = True
    bus.probe()
    time.sleep(0.1)
"""


def test_a_control_link_is_missed_whatever_came_last(
    commands: Commands, hosts: tuple[str, ...]
) -> None:
    """A heartbeat or, nearly always here, something else."""
    process = start(commands, hosts[0], "-c", CONTROL_LINK, "leader", A)
    start(commands, hosts[1], "-c", CONTROL_LINK, "worker", A)
    assert process.stdout is not None
    assert process.stdout.readline() == "talks\n"
    ip("-n", hosts[1], "link", "set", LINK, "down")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert errors == "rank 1 (there) cannot be reached between layers, step 0\n"
