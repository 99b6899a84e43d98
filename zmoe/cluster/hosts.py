"""Host lists as mlx.launch takes them: `--hosts a,b` and both shapes of hostfile."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zmoe.errors import InputError, SettingError
from zmoe.exchange.keys import is_loopback
from zmoe.json_files import read_json

_HOST_KEYS = {"ssh", "ips", "rdma"}
_FILE_KEYS = {"backend", "envs", "hosts"}


@dataclass(frozen=True)
class Host:
    """One machine: the name that ssh takes and the IPv4 address that its node uses."""

    ssh: str
    address: str

    @property
    def is_local(self) -> bool:
        """Whether its node is started here, without ssh."""
        return self.ssh in ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class HostList:
    """Hosts in rank order (the first runs the leader) and `K=V` settings for all of them."""

    hosts: tuple[Host, ...]
    envs: tuple[str, ...] = ()


def hosts_from(names: str | None, file: Path | None) -> HostList | None:
    """The hosts of --hosts or --hostfile, None where neither was given. Raises InputError."""
    if names is not None and file is not None:
        raise InputError("--hosts and --hostfile exclude each other")
    if names is not None:
        return hosts_from_names(names)
    return hosts_from_file(file) if file is not None else None


def hosts_from_names(text: str) -> HostList:
    """The hosts of `a,user@b,10.0.0.3`, in rank order, the leader first. Raises InputError."""
    return HostList(tuple(_host(name.strip(), [], "--hosts") for name in text.split(",")))


def hosts_from_file(path: Path) -> HostList:
    """The hosts of a hostfile of mlx.launch. Raises InputError, which names file and fault."""
    source = f"--hostfile {path}"
    data = read_json(path, source)
    envs: Sequence[Any] = ()
    if isinstance(data, dict):
        _refuse_unknown(data, _FILE_KEYS, source)
        envs, data = data.get("envs", ()), data.get("hosts")
    if not isinstance(data, list) or not data:
        raise InputError(f"{source}: expected a list of hosts")
    if not isinstance(envs, (list, tuple)):
        raise InputError(f'{source}: "envs" is no list')
    hosts = [_host_from_entry(entry, f"{source}: host {i}") for i, entry in enumerate(data)]
    return HostList(tuple(hosts), tuple(check_env(env, source) for env in envs))


def check_address(address: str, setting: str) -> str:
    """Return `address` if peers can connect to it, over IPv4; else raise SettingError."""
    try:
        parsed = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise SettingError(setting, f"is {address}: expected an IPv4 address") from error
    if parsed.is_unspecified:
        problem = f"is {address}: expected the address by which the other nodes reach it"
        raise SettingError(setting, problem)
    return address


def check_bind(address: str) -> None:
    """Raise SettingError unless `address` is an IPv4 address of this machine."""
    check_address(address, "bind")
    if not _is_own(address):
        raise SettingError("bind", f"is {address}: this machine does not have that address")


def _is_own(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def check_listener(bind: str | None, hosts: HostList | None) -> None:
    """Raise InputError unless the leader can listen where it is told, and the hosts reach it.

    It listens at `bind`, or if that is None at the address of the first of `hosts`.
    """
    every = hosts.hosts if hosts is not None else ()
    others = every[1:]
    if bind is not None:
        check_bind(bind)
        if beyond := _cannot_reach(bind, others):
            problem = f"is {bind}, where {beyond} cannot reach this machine"
            raise SettingError("bind", f"{problem}: expected the address by which it can")
    elif every:
        first = every[0]
        if not _is_own(first.address):
            raise InputError(
                f"the first host, {first.ssh}, has to be this machine, which does not have the "
                f"address {first.address}"
            )
        if beyond := _cannot_reach(first.address, others):
            raise InputError(
                f"the first host, {first.ssh}, is this machine at {first.address}, where {beyond} "
                "cannot reach it: give the address by which it can"
            )


def _cannot_reach(address: str, hosts: Sequence[Host]) -> str | None:
    """The first of `hosts` for which `address` would be itself."""
    beyond = (host.ssh for host in hosts if not is_loopback(host.address))
    return next(beyond, None) if is_loopback(address) else None


def check_leader(leader: str, source: str) -> str:
    """Return `leader` if it is HOST:PORT, where HOST has an IPv4 address; else raise InputError."""
    host, _, port = leader.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise InputError(f"{source} {leader}: expected HOST:PORT")
    resolve(host, f"{source} {leader}")
    return leader


def check_env(setting: object, source: str) -> str:
    """Return `setting` if it has the form K=V; else raise InputError."""
    if not isinstance(setting, str) or not setting.partition("=")[0].isidentifier():
        raise InputError(f"{source}: {setting!r} is not of the form NAME=VALUE")
    return setting


def _refuse_unknown(entry: dict[str, Any], known: set[str], source: str) -> None:
    if unknown := sorted(set(entry) - known):
        raise InputError(f"{source}: unknown field {unknown[0]!r}")


def _host_from_entry(entry: object, source: str) -> Host:
    if not isinstance(entry, dict) or not isinstance(entry.get("ssh"), str):
        raise InputError(f'{source}: expected {{"ssh": name, "ips": [address]}}')
    _refuse_unknown(entry, _HOST_KEYS, source)
    ips = entry.get("ips", [])
    if not isinstance(ips, list) or not all(isinstance(ip, str) for ip in ips):
        raise InputError(f'{source}: "ips" is no list of addresses')
    return _host(entry["ssh"], ips, source)


def _host(name: str, ips: list[str], source: str) -> Host:
    if not name or name.startswith("-"):
        raise InputError(f"{source}: {name!r} is no host name")
    return Host(name, resolve(ips[0] if ips else name.rpartition("@")[2], source))


def resolve(name: str, source: str) -> str:
    """The first IPv4 address of `name`, which may be an address. Raises InputError."""
    if ":" in name:
        raise InputError(f"{source}: {name} is not an IPv4 address; zmoe does not speak IPv6")
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{source}: cannot resolve {name!r}: {reason}") from error
    for family, *_, address in found:
        if family == socket.AF_INET:
            return str(address[0])
    raise InputError(f"{source}: {name!r} has no IPv4 address; zmoe does not speak IPv6")
