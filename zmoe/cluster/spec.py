"""What a user may say of a cluster: its nodes, their placement, a worker's leader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from zmoe.cluster.hosts import HostList, check_address, check_listener
from zmoe.config import SECONDS, Batching, EngineConfig, Setting, Settings, Timing, whole
from zmoe.errors import InputError, SettingError

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
    `zmoe-node` is started by hand, `nodes` - 1 times. `port` 0: any.
    `record_usage`: count which experts are selected.
    Raises SettingError and InputError for what no leader on this machine could do.
    """

    nodes: Annotated[int, Setting("Number of nodes on this machine", _NODES, short="-n")] = 1
    hosts: HostList | None = None
    manual: Annotated[bool, Setting("Wait for nodes that are started by hand")] = False
    bind: Annotated[str | None, Setting(_BIND_HELP, metavar="ADDRESS")] = None
    port: Annotated[int, Setting("Port of the leader; 0: any", _PORT, "--starting-port")] = 0
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

    @property
    def address(self) -> str:
        """Where the leader listens: loopback unless hosts or `bind` say otherwise."""
        if self.bind is not None:
            return self.bind
        return self.hosts.hosts[0].address if self.hosts is not None else "127.0.0.1"


@dataclass(frozen=True)
class WorkerSpec(Settings):
    """How a worker finds its leader. `model`, `memory_limit` (bytes) None: as the leader says.

    `token`: what the leader that started the worker wrote to its standard input.
    `join_timeout`: seconds to wait for the leader, None for as long as it takes.
    """

    leader: Annotated[str, Setting("Where zmoe-run listens", metavar="HOST:PORT")]
    rank: Annotated[int, Setting("Rank of this node, counted from 1", _RANK)]
    bind: Annotated[str, Setting("IPv4 address to listen on", metavar="ADDRESS")] = "127.0.0.1"
    model: Annotated[str | None, Setting(_OWN_MODEL_HELP)] = None
    memory_limit: Annotated[int | None, Setting(_OWN_MEMORY_HELP, metavar="GIB", in_gib=True)] = (
        None
    )
    token: str = ""
    join_timeout: Annotated[float | None, Setting(_OWN_JOIN_HELP, SECONDS, metavar="S")] = None
