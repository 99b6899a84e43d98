"""What a machine is: versions, device, memory, cores, network."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from zmoe.calibration.link import free_port_pairs
from zmoe.cli.doctor.check import Check, output, python
from zmoe.cluster.resources import machine_memory
from zmoe.errors import ZmoeError
from zmoe.native import Isa
from zmoe.perf.units import in_bytes
from zmoe.topology.cgroups import cpu_limit, memory_limit
from zmoe.topology.cores import usable_cores

PACKAGES = ("zmoe", "mlx", "mlx-lm", "pyzmq", "numpy", "transformers")
_DEVICE_S = 60.0
_SYSCTL_S = 10.0
# ioctls that fill a struct ifreq in, on Linux and on macOS: its address, its MTU
_ASK_ADDRESS, _ASK_MTU = (0xC0206921, 0xC0206933) if sys.platform == "darwin" else (0x8915, 0x8921)
_IFREQ_BYTES = 40
_NO_LIMIT = "unlimited"


def versions() -> str:
    """Those of Python, of libzmq, and of what zmoe depends on. Raises ZmoeError."""
    import zmq

    found = {"Python": platform.python_version(), "libzmq": zmq.zmq_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise ZmoeError(f"{name} is not installed") from None
    return ", ".join(f"{name} {number}" for name, number in found.items())


def system() -> str:
    mac = platform.mac_ver()[0]
    return f"macOS {mac}, {platform.machine()}" if mac else platform.platform()


def device() -> tuple[bool, str]:
    """Whether MLX computes on a GPU, and which. Raises ZmoeError where it does not compute."""
    out, _ = output(python("zmoe.cli.doctor.machine"), _DEVICE_S)
    found = json.loads(out)
    described = f"{found['device']}, {found.get('device_name', 'unnamed')}"
    if "memory_size" in found:
        described += f", {in_bytes(found['memory_size'])}"
    return found["device"] != "cpu", described


def main() -> int:
    """Compute something with MLX, and print its device as JSON."""
    import mlx.core as mx

    total = mx.sum(mx.ones((64, 64)) @ mx.ones((64, 64))).item()
    assert total == 64**3, f"MLX adds up {total}"
    of = mx.device_info()
    named = {name: of[name] for name in ("device_name", "memory_size") if name in of}
    print(json.dumps({"device": mx.default_device().type.name, **named}))
    return 0


def memory() -> str:
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = machine_memory(mapped=False)
    return f"{in_bytes(everything)}, of which the nodes may take {in_bytes(here)} now"


def wired_limit() -> str:
    """What Metal may keep in memory, as the system is set; 0 is its default."""
    out, _ = output(["sysctl", "-n", "iogpu.wired_limit_mb"], _SYSCTL_S)
    return f"iogpu.wired_limit_mb is {out.strip()}"


def cores() -> str:
    quota = cpu_limit()
    return f"{os.cpu_count()} logical, zmoe takes {len(usable_cores())}; quota: " + (
        f"{quota:g} CPUs" if quota is not None else "none"
    )


def instruction_sets() -> str:
    return ", ".join(isa.name for isa in Isa if isa.supported)


def limits() -> str:
    group = memory_limit()
    found = {
        "control group's memory": _NO_LIMIT if group is None else in_bytes(group),
        "open files": _soft(resource.RLIMIT_NOFILE),
        "locked memory": _soft(resource.RLIMIT_MEMLOCK, size=True),
    }
    return ", ".join(f"{name} {limit}" for name, limit in found.items())


def _soft(which: int, *, size: bool = False) -> str:
    soft = resource.getrlimit(which)[0]
    if soft == resource.RLIM_INFINITY:
        return _NO_LIMIT
    return in_bytes(soft) if size else str(soft)


def interfaces() -> str:
    found = list(_interfaces())
    if not found:
        raise ZmoeError("no interface has an IPv4 address")
    return ", ".join(f"{name} {address} (MTU {mtu})" for name, address, mtu in found)


def _interfaces() -> Iterator[tuple[str, str, int]]:
    """Name, IPv4 address and MTU of each interface that has an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            question = name.encode()[:15].ljust(_IFREQ_BYTES, b"\0")
            with suppress(OSError):  # it has no address
                address = fcntl.ioctl(asking, _ASK_ADDRESS, question)[20:24]
                mtu = struct.unpack_from("i", fcntl.ioctl(asking, _ASK_MTU, question), 16)[0]
                yield name, socket.inet_ntoa(address), mtu


def ports() -> str:
    first, second = free_port_pairs(2)
    return f"free are, for example, {first}, {first + 1}, {second} and {second + 1}"


def checks(*, metal: bool) -> list[Check]:
    """All but the device, which others depend on."""
    found = [
        Check("memory", memory),
        Check("cores", cores),
        Check("instruction sets", instruction_sets),
        Check("limits", limits),
        Check("interfaces", interfaces),
        Check("ports", ports),
    ]
    return [*found, Check("wired limit", wired_limit)] if metal else found
