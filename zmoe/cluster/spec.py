"""What a user may say of a cluster: its nodes, their placement, a worker's leader."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from zmoe.cluster.hosts import HostList, check_address, check_listener, resolve
from zmoe.config import (
    SECONDS,
    Batching,
    EngineConfig,
    Limit,
    Setting,
    Settings,
    Timing,
    number,
    whole,
)
from zmoe.errors import InputError, SettingError
from zmoe.exchange.keys import KeyPair, Pinned, is_loopback, read_key

_WAY_HELP = (
    "Which node owns which experts. experts: whole experts, spread evenly, each on one node; "
    "replicas: whole experts, with copies as far as memory allows; slices: a part of every expert "
    "on every node; auto: the placement with the fastest predicted step; or a JSON file "
    "(docs/placement.md)"
)
_USAGE_HELP = "Replicate the experts that this usage profile shows as hottest"
_MEMORY_HELP = "Memory in GiB that each node may use (default: all of its machine's)"
_NODES = whole("a whole number from 1 to 64", 1, 64)
_RANK = whole("a number from 1 to 63", 1, 63)
_PORT = whole("0 to 65535", 0, 65535)
_BIND_HELP = "IPv4 address to listen on (default: 127.0.0.1, or the address of the first host)"
_ENV_HELP = "Environment variable for the other hosts; may be repeated"
PYTHON_HELP = "Python interpreter on the other hosts (default: the same path as on this machine)"
_OWN_MODEL_HELP = "Checkpoint on this machine (default: the one that the leader names)"
_OWN_MEMORY_HELP = "Memory in GiB that this node may use (default: as the leader says)"
_OWN_JOIN_HELP = f"With --once: seconds to wait for a leader (default: {Timing().join:g})"


def _is_range(value: str) -> bool:
    found = re.fullmatch("([0-9]{1,5})-([0-9]{1,5})", value)
    return found is not None and 0 < int(found[1]) <= int(found[2]) < 65536


_PORTS = Limit("a range of ports such as 9700-9799", _is_range)
KEY_VARIABLE = "ZMOE_KEY_FILE"
_KEY_HELP = (
    "With --manual: the key that encrypts links, as zmoe-keys makes it (default: the file that "
    f"{KEY_VARIABLE} names)"
)
_OWN_KEY_HELP = f"The leader's key file (default: the one that {KEY_VARIABLE} names)"
_PORTS_HELP = "Ports that every node may listen at, such as 9700-9799 (default: any)"
_KEEP_HELP = (
    "Seconds for which nodes keep their weights when the leader is gone, for the next leader at "
    "the same port (default: 60 under zmoe-serve, else 0)"
)
_KEEP = number("a number of seconds from 0 to 86400", lambda value: 0 <= value <= 86400)
INSECURE_HELP = "Do not encrypt links beyond this machine"


@dataclass(frozen=True)
class RemoteOptions(Settings):
    """How workers are started on other machines over ssh; `env` holds `K=V` settings."""

    python: Annotated[str | None, Setting(PYTHON_HELP)] = None
    cwd: Annotated[str | None, Setting("Working directory on the other hosts")] = None
    env: Annotated[tuple[str, ...], Setting(_ENV_HELP, metavar="K=V")] = ()


@dataclass(frozen=True)
class PlacementRequest(Settings):
    """What a user asks: `way` is one of zmoe.placement.build.WAYS, or a placement file.

    `usage`: a profile of which experts are selected, for replicas.
    `memory_limit`: bytes that a node may take, None: what its machine has.
    """

    way: Annotated[str, Setting(_WAY_HELP, flag="--placement", metavar="WAY")] = "auto"
    usage: Annotated[Path | None, Setting(_USAGE_HELP, metavar="FILE")] = None
    memory_limit: Annotated[int | None, Setting(_MEMORY_HELP, metavar="GIB", in_gib=True)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.usage is not None and self.way not in ("auto", "replicas"):
            raise SettingError("usage", f"has no use with placement {self.way}: it is for replicas")


@dataclass(frozen=True)
class ClusterSpec(Settings):
    """Which nodes, and how they come to be.

    `hosts` None: `nodes` processes on this machine. Otherwise one node per
    host, in rank order, the first being this machine. `manual`: start nothing;
    `zmoe-node` is started by hand, `nodes` - 1 times. `port` 0: any, of `ports` where given.
    `record_usage`: count which experts are selected. `keep_alive`: seconds for which nodes keep
    their weights when this leader is gone; those that it has started itself end with it, unless
    they belong to another process (zmoe.cluster.keeper). Links beyond this machine are
    encrypted unless `insecure`: by the key in the file `key` where nodes are started by hand,
    else by new ones, which the nodes get as they are started.
    Raises SettingError and InputError for what no leader on this machine could do.
    """

    nodes: Annotated[int, Setting("Number of nodes on this machine", _NODES, short="-n")] = 1
    hosts: HostList | None = None
    manual: Annotated[bool, Setting("Wait for nodes that are started by hand")] = False
    bind: Annotated[str | None, Setting(_BIND_HELP, metavar="ADDRESS")] = None
    port: Annotated[int, Setting("Port of the leader; 0: any", _PORT, "--starting-port")] = 0
    ports: Annotated[str | None, Setting(_PORTS_HELP, _PORTS, metavar="A-B")] = None
    key: Annotated[Path | None, Setting(_KEY_HELP, metavar="FILE")] = None
    insecure: Annotated[bool, Setting(INSECURE_HELP)] = False
    keep_alive: Annotated[float, Setting(_KEEP_HELP, _KEEP, metavar="S")] = 0.0
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    timing: Timing = field(default_factory=Timing)
    engine: EngineConfig = field(default_factory=EngineConfig)
    batching: Batching = field(default_factory=Batching)
    placement: PlacementRequest = field(default_factory=PlacementRequest)
    record_usage: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hosts is not None and len(self.hosts.hosts) != self.nodes:
            raise InputError(f"{self.nodes} nodes on {len(self.hosts.hosts)} hosts: give one each")
        check_address(self.address, "bind")
        if self.nodes > 1:
            check_listener(self.bind, self.hosts)
        if self.key is not None and not self.manual:
            raise SettingError(
                "key", "is for nodes that are started by hand: others get keys as they are started"
            )
        _check_insecure(self.insecure, self.key, self.address)
        if self.engine.backend not in ("auto", "zmq"):
            backend = self.engine.backend
            if self.encrypted:
                problem = f"is {backend}, which does not encrypt: --insecure allows it"
                raise SettingError("backend", problem)
            if self.ports is not None:
                raise SettingError("ports", f"has no use with backend {backend}, which takes any")
        if self.manual and self.insecure and self.hosts is None:
            problem = "needs --hosts with --manual: only who comes from their addresses gets in"
            raise SettingError("insecure", problem)
        if self.port_range is not None and self.port:
            first, last = self.port_range
            if not first <= self.port <= last:
                raise SettingError("port", f"is {self.port}: not one of --ports {self.ports}")
        if self.encrypted and self.manual:
            self.key_of_all()

    @property
    def address(self) -> str:
        """Where the leader listens: loopback unless hosts or `bind` say otherwise."""
        if self.bind is not None:
            return self.bind
        return self.hosts.hosts[0].address if self.hosts is not None else "127.0.0.1"

    @property
    def encrypted(self) -> bool:
        """Whether links are: beyond this machine, and where a key is given."""
        if self.nodes == 1 or self.insecure:
            return False
        return self.key is not None or not is_loopback(self.address)

    @property
    def port_range(self) -> tuple[int, int] | None:
        """The first and last port of `ports`."""
        if self.ports is None:
            return None
        first, last = map(int, self.ports.split("-"))
        return first, last

    @property
    def how_by_hand(self) -> tuple[str, ...]:
        """The flags of a node that is started by hand which say how links are encrypted."""
        if self.encrypted:
            return ("--key", str(_key_file(self.key)))
        return ("--insecure",) if self.insecure else ()

    def key_of_all(self) -> KeyPair:
        """What leader and workers have in common where these are started by hand.

        Raises InputError where there is no such file, or no key in it.
        """
        return _given_key(self.key, f"a run on {self.address} of nodes that are started by hand")


@dataclass(frozen=True)
class WorkerSpec(Settings):
    """How a worker finds its leader. `model`, `memory_limit` (bytes) None: as the leader says.

    `token` and `keys` are what the leader that started the worker wrote to its standard input;
    `key` is the file of a worker that is started by hand. `insecure`: links are not encrypted.
    `join_timeout`: seconds to wait for the leader, None for as long as it takes.
    """

    leader: Annotated[str, Setting("Where zmoe-run listens", metavar="HOST:PORT")]
    rank: Annotated[int, Setting("Rank of this node, counted from 1", _RANK)]
    bind: Annotated[str, Setting("IPv4 address to listen on", metavar="ADDRESS")] = "127.0.0.1"
    model: Annotated[str | None, Setting(_OWN_MODEL_HELP)] = None
    memory_limit: Annotated[int | None, Setting(_OWN_MEMORY_HELP, metavar="GIB", in_gib=True)] = (
        None
    )
    key: Annotated[Path | None, Setting(_OWN_KEY_HELP, metavar="FILE")] = None
    insecure: Annotated[bool, Setting(INSECURE_HELP)] = False
    token: str = ""
    keys: Pinned | None = None
    join_timeout: Annotated[float | None, Setting(_OWN_JOIN_HELP, SECONDS, metavar="S")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_insecure(self.insecure, self.key, self.bind)

    def pinned(self) -> Pinned | None:
        """This worker's keys and its leader's; None where data links are not encrypted.

        Raises InputError where they have to be and there is no key.
        """
        if self.keys is not None or self.insecure:
            return self.keys
        if self.key is None and is_loopback(self.bind):
            return None
        return Pinned.shared(_given_key(self.key, f"a node on {self.bind}"))

    def control_keys(self) -> Pinned | None:
        """Those of the link to the leader: the user's where the two are started by hand on one
        machine, without a key. Raises InputError.
        """
        keys = self.pinned()
        if keys is not None or self.token:
            return keys
        leader = resolve(self.leader.rpartition(":")[0], f"leader {self.leader}")
        return Pinned.of_user() if is_loopback(leader) else None


def _check_insecure(insecure: bool, key: Path | None, address: str) -> None:
    """Raise SettingError where `insecure` would change nothing, or contradict `key`."""
    if insecure and (key is not None or is_loopback(address)):
        reason = "with a key" if key is not None else "on one machine"
        raise SettingError("insecure", f"has no use {reason}")


def _given_key(file: Path | None, who: str) -> KeyPair:
    """The key of a flag, or of the environment. Raises InputError: `who` needs one."""
    path = _key_file(file)
    if path is None:
        raise InputError(
            f"{who} needs a key: --key FILE, of zmoe-keys new FILE, or --insecure on a network "
            "that you trust"
        )
    return read_key(path)


def _key_file(file: Path | None) -> Path | None:
    named = os.environ.get(KEY_VARIABLE)
    return file or (Path(named) if named else None)
