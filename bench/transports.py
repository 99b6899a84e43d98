"""The transports that bench/exchange.py compares: how to start each, and what each needs."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import BENCH, Absent, compile_c, run_tool
from group import Launch


@dataclass(frozen=True)
class Transport:
    """`build(workdir)` makes what is needed (Absent when it can't); `start` names the processes.

    `start(workdir, control, nodes, largest)` returns the processes to start;
    `control` is the path of the Unix socket at which they report, `largest` the
    bytes of the largest payload to come.
    """

    name: str
    build: Callable[[Path], None]
    start: Callable[[Path, str, int, int], list[Launch]]


def _raw(name: str, mode: str) -> Transport:
    def build(workdir: Path) -> None:
        compile_c(os.environ.get("CC", "cc"), "raw_tcp.c", workdir)

    def start(workdir: Path, control: str, nodes: int, largest: int) -> list[Launch]:
        program = str(workdir / "raw_tcp")
        return [Launch([program, control, str(rank), str(nodes), mode]) for rank in range(nodes)]

    return Transport(name, build, start)


def _python(name: str, module: str, script: str, *arguments: str) -> Transport:
    def build(workdir: Path) -> None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Absent(f"cannot import {module}: {error}") from None

    def start(workdir: Path, control: str, nodes: int, largest: int) -> list[Launch]:
        program = [sys.executable, str(BENCH / "peers" / script), control]
        rest = [str(nodes), str(largest), *arguments]
        return [Launch([*program, str(rank), *rest]) for rank in range(nodes)]

    return Transport(name, build, start)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; the ring wants to be told them beforehand."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ours(
    mode: str,
    algorithm: str = "auto",
    wire_dtype: str = "f32",
    checksum: str = "on",
    links: str = "plain",
) -> Transport:
    """Our exchange, timed in C ("c") or from MLX array to MLX array ("mlx")."""
    name = "zmoe-c" if mode == "c" else "zmoe"
    if algorithm != "auto":
        name += f"-{algorithm}"
    if wire_dtype != "f32":
        name += f"-{wire_dtype}"
    if checksum != "on":
        name += "-unchecked"
    if links != "plain":
        name += f"-{links}"
    return _python(name, "zmoe.native", "ours.py", mode, algorithm, wire_dtype, checksum, links)


def _ring() -> Transport:
    plain = _python("mlx-ring", "mlx.core", "ring.py")

    def build(workdir: Path) -> None:
        plain.build(workdir)
        import mlx.core as mx

        if not mx.distributed.is_available("ring"):
            raise Absent("this mlx was built without the ring backend")

    def start(workdir: Path, control: str, nodes: int, largest: int) -> list[Launch]:
        hosts = workdir / f"ring{nodes}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(nodes)]))
        return [
            Launch(launch.command, {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)})
            for rank, launch in enumerate(plain.start(workdir, control, nodes, largest))
        ]

    return Transport("mlx-ring", build, start)


def _mpi() -> Transport:
    """Open MPI over TCP on loopback; on one machine it would take shared memory."""

    def build(workdir: Path) -> None:
        if "Open MPI" not in (run_tool("mpirun", "--version") or ""):
            raise Absent("no Open MPI (mpirun) on the PATH")
        compile_c("mpicc", "mpi_allreduce.c", workdir)

    def start(workdir: Path, control: str, nodes: int, largest: int) -> list[Launch]:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        options = ["-n", str(nodes), "--oversubscribe", "--bind-to", "none"]
        settings = {"pml": "ob1", "btl": "self,tcp", "btl_tcp_if_include": loopback}
        if nodes > (os.cpu_count() or 1):
            settings["mpi_yield_when_idle"] = "1"
        for name, value in settings.items():
            options += ["--mca", name, value]
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return [Launch(["mpirun", *options, str(workdir / "mpi_allreduce"), control], as_root)]

    return Transport("mpi", build, start)


TRANSPORTS = {
    transport.name: transport
    for transport in (
        _raw("raw-tcp", "block"),
        _raw("raw-tcp-spin", "spin"),
        ours("c"),
        ours("mlx"),
        _python("pyzmq", "zmq", "pubsub.py"),
        _ring(),
        _python("grpc", "grpc", "unary.py"),
        _mpi(),
    )
}
