"""Whether other hosts are reached, have the same versions, and exchange."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version

from zmoe.calibration.link import LOOPBACK, Hosts, measure_link
from zmoe.cli.doctor.check import Check, output
from zmoe.cluster.hosts import Host, HostList
from zmoe.cluster.launch import over_ssh
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import ZmoeError

_ALIKE = ("zmoe", "mlx", "mlx-lm")
_ASK = (
    "import json; from importlib.metadata import version; from zmoe.native import best_isa; "
    f"print(json.dumps([best_isa().name, *map(version, {_ALIKE})]))"
)
_SSH_S = 30.0
_PAIR = Hosts(HostList(LOOPBACK.hosts[:2]))


def reached(host: Host, remote: RemoteOptions) -> str:
    """Versions on `host`, over ssh. Raises ZmoeError if they are not those of this machine."""
    out, _ = output(over_ssh(["-c", _ASK], host, remote), _SSH_S)
    try:
        isa, *theirs = json.loads(out)
    except ValueError:
        raise ZmoeError(f"ssh to it prints {out.strip()[:80]!r} before anything else") from None
    for name, there in zip(_ALIKE, theirs):
        if there != version(name):
            raise ZmoeError(f"has {name} {there}, and this machine {version(name)}")
    return f"reached by ssh; the same versions; {isa}"


def exchange(hosts: Hosts) -> str:
    """The exchange's latency and bandwidth."""
    link = measure_link(hosts, lambda text: None)
    return f"{1e6 * link.latency_s:.0f} us for 4 KiB, {link.bandwidth / 1e9:.2f} GB/s"


def checks(given: Hosts) -> list[Check]:
    """Of this machine, and of the hosts if any are `given`."""
    found = [Check("exchange on this machine", partial(exchange, _PAIR))]
    if given.hosts is LOOPBACK:
        return found
    for host in given.hosts.hosts[1:]:
        if not host.is_local:
            found.append(Check(f"host {host.ssh}", partial(reached, host, given.remote)))
    return [*found, Check("exchange with the hosts", partial(exchange, given))]
