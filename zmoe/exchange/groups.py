"""MLX's groups for exchanges inside its graph: our own, by the door, and any other of MLX's."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import mlx.core as mx

from zmoe.errors import SettingError, ZmoeError
from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.faults import error_of
from zmoe.exchange.native import fault_of, microseconds, ranks_in
from zmoe.native import LIBRARY, Status, ffi, lib

_VARIABLE = "MLX_MPI_LIBNAME"  # where MLX looks for the name of its MPI library


class Groups(Protocol):
    """The groups of one run, which all of its ranks are in."""

    rank: int

    def of(self, layer: int, width: int) -> mx.distributed.Group:
        """The group for the collectives of `layer`, on rows of `width` elements.

        A pass calls on them in the order of their layers, each once.
        """
        ...

    def begin(self, step: int, plan: int, patient: bool) -> None:
        """Before a pass, while others may be under way; `plan` is the digest of the step's plan.

        A `patient` one waits for as long as the deadline of the exchange allows, any other as long
        as a GPU may be kept waiting.
        """
        ...

    def repeat(self) -> int | None:
        """After check() has raised, once nothing is under way: begin the pass anew, patiently.

        Returns the layer whose collective is the first to be called again, as the passes that
        were begun after it are too; None where the failure is not that of a slow peer.
        """
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Around whatever may wait for a collective."""
        ...

    def check(self, step: int) -> None:
        """After the evaluation of a pass, that of `step`. Raises PeerError, DivergenceError and
        ZmoeError where a collective of it has failed: its result, and all that came of it, are
        zeros.
        """
        ...


class OneGroup:
    """A group of MLX's own, for all layers."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.rank, self._group = group.rank(), group

    def of(self, layer: int, width: int) -> mx.distributed.Group:
        """See Groups."""
        return self._group

    def begin(self, step: int, plan: int, patient: bool) -> None:
        """See Groups."""

    def repeat(self) -> int | None:
        """See Groups."""
        return None

    def waiting(self) -> AbstractContextManager[None]:
        """See Groups."""
        return nullcontext()

    def check(self, step: int) -> None:
        """See Groups; how failures show is up to MLX."""


_open_door: Door | None = None
_backend_joined = ""  # MLX keeps the group of a backend for as long as the process lives


def backend_joined() -> str:
    """The backend of MLX's own that this process is in; "" for none."""
    return _backend_joined


def join_backend(backend: str, exchange: Exchange) -> OneGroup:
    """MLX's own group "ring", "jaccl" or "nccl" of all ranks of a connected exchange.

    All ranks call it at the same time. "jaccl" takes the file of the RDMA devices that
    MLX_IBV_DEVICES names. Raises SettingError for a backend that this MLX lacks, or
    cannot start.
    """
    global _backend_joined
    if not mx.distributed.is_available(backend):
        raise SettingError("backend", f"is {backend}: this MLX on node {exchange.rank} has none")
    if exchange.wire is not None:
        wire = exchange.wire.name.lower()
        raise SettingError("wire_dtype", f"is {wire}: expected auto with the backend {backend}")
    if _backend_joined:
        raise SettingError(
            "backend", f"is {backend}: this process has been in a run over {_backend_joined}"
        )
    hosts = [endpoint.host for endpoint in exchange.endpoints]
    with socket.socket() as free:
        free.bind((hosts[exchange.rank], 0))
        port = free.getsockname()[1]
    ports = exchange.tell([port])[:, 0].astype(int).tolist()
    places = [f"{host}:{port}" for host, port in zip(hosts, ports)]
    variables = {"MLX_RANK": str(exchange.rank)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        if backend == "ring":
            json.dump([[place] for place in places], file)
            file.flush()
            variables["MLX_HOSTFILE"] = file.name
        elif backend == "jaccl":
            variables["MLX_JACCL_COORDINATOR"] = places[0]
        else:
            variables |= {"NCCL_HOST_IP": hosts[0], "NCCL_PORT": str(ports[0])}
            variables["MLX_WORLD_SIZE"] = str(exchange.nodes)
        with _environment(variables):
            try:
                group = mx.distributed.init(strict=True, backend=backend)
            except (RuntimeError, ValueError) as error:
                line = " ".join(str(error).split())
                raise SettingError(
                    "backend", f"is {backend}: MLX cannot start it: {line}"
                ) from None
    _backend_joined = backend
    return OneGroup(group)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Meanwhile, what C reads with getenv."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Door:
    """Groups whose collectives are those of an exchange; see csrc/door/door.h.

    It takes the exchange over: what else uses it meanwhile goes through the door. A process
    has one door at a time. `patience_s`: how long a pass waits for a peer before it is repeated.
    With `is_program` the world's collectives are done too, outside of steps; when one fails,
    whoever calls check() is to end the process. Raises ZmoeError where another door is open, or
    where MLX has loaded another MPI library before.
    """

    def __init__(
        self, exchange: Exchange, patience_s: float = math.inf, is_program: bool = False
    ) -> None:
        self._patience_s = min(patience_s, exchange.deadline_s)
        self.rank, self._exchange = exchange.rank, exchange
        self._failure = ffi.new("zmoe_door_failure *")
        self._groups: dict[int, mx.distributed.Group] = {}
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)
        config = ffi.new("zmoe_door_config *")
        config.exchange = exchange.native.pointer
        config.rank, config.nodes = exchange.rank, exchange.nodes
        config.max_payload_bytes = exchange.max_bytes
        config.wire_dtype = -1 if exchange.wire is None else exchange.wire
        config.scatter_bytes = int(min(exchange.choice.scatter_from, 2.0**63))
        config.deadline_us = microseconds(exchange.deadline_s)
        config.patience_us = microseconds(self._patience_s)
        config.wakeup_fd = self._ends[0]
        config.is_program = is_program
        if lib.zmoe_door_open(config) != Status.OK:
            self._close_pipe()
            raise ZmoeError("another run of this process computes with MLX: close it first")
        global _open_door
        exchange.door = _open_door = self
        try:
            self.world = _load()
            if self.world.size() == 1:
                raise ZmoeError("MLX has loaded another MPI library than zmoe's in this process")
        except ZmoeError:
            self.close()
            raise

    def of(self, layer: int, width: int) -> mx.distributed.Group:
        """See Groups."""
        group = self._groups.get(layer)
        if group is None:
            group = self.world.split(layer, width | lib.ZMOE_DOOR_WIDTH)
            self._groups[layer] = group
        return group

    def begin(self, step: int, plan: int, patient: bool) -> None:
        """See Groups."""
        if lib.zmoe_door_begin(step, plan, patient) != Status.OK:
            raise ZmoeError(f"step {step} begins before earlier ones have ended")

    def repeat(self) -> int | None:
        """See Groups."""
        lib.zmoe_door_failed(self._failure)
        layer: int = self._failure.layer
        return layer if lib.zmoe_door_repeat() == Status.OK else None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """See Groups. In the main thread, a signal that Python handles ends waits for peers."""
        in_main = threading.current_thread() is threading.main_thread()
        others = _wake(self._ends[1]) if in_main else -1
        if others != -1:  # whoever listens to signals already may call cancel()
            _wake(others)
        try:
            yield
        finally:
            if in_main and others == -1:
                _wake(-1)

    def check(self, step: int | None = None) -> None:
        """See Groups; without a `step`, of any collective."""
        self._exchange.spans.add("exchange", lib.zmoe_door_spent_us() / 1e6)
        failure = self._failure
        status = lib.zmoe_door_failed(failure)
        if status == Status.OK or (
            step is not None and failure.step > step
        ):  # of a pass that was begun since
            return
        step, layer = failure.step, failure.layer
        if status == Status.INTERRUPTED:
            raise ZmoeError(f"step {step} was given up at layer {layer}")
        if status == Status.INVALID:
            refused = ffi.string(failure.refused).decode(errors="replace")
            raise ZmoeError(f"zmoe's exchange does not do this: {refused}")
        fault = fault_of(failure.fault)
        patience = self._patience_s if failure.is_repeatable else self._exchange.deadline_s
        raise error_of(status, fault, self.rank, step, layer, patience)

    @property
    def called(self) -> int:
        """How many collectives a program has called, those that wait included."""
        count: int = lib.zmoe_door_called()
        return count

    def service(self) -> None:
        """Between steps, what Exchange.service does."""
        fault = ffi.new("zmoe_fault *")
        status = lib.zmoe_door_service(fault)
        if status != Status.OK:
            step, patience = self._exchange.step, self._exchange.deadline_s
            raise error_of(status, fault_of(fault), self.rank, step, None, patience)

    def links(self) -> tuple[int, ...]:
        """What Exchange.links tells, as it last was while a collective is under way."""
        return ranks_in(lib.zmoe_door_links())

    def cancel(self) -> None:
        """From any thread: collectives that wait, and those to come, end with zeros."""
        lib.zmoe_door_cancel()

    def close(self) -> None:
        """End what is under way, and give the exchange back; idempotent."""
        if self._exchange.door is self:
            global _open_door
            self._exchange.door = _open_door = None
            lib.zmoe_door_close()
            mx.synchronize()  # what is under way uses the groups, even for its zeros
            self._groups.clear()
            self._close_pipe()

    def _close_pipe(self) -> None:
        for end in self._ends:
            os.close(end)


def _wake(fd: int) -> int:
    return signal.set_wakeup_fd(fd, warn_on_full_buffer=False)


def can_open_door() -> bool:
    """Whether no other run of this process has a door, and no user has named an MPI library to
    MLX, which then cannot have ours.
    """
    return _open_door is None and os.environ.get(_VARIABLE, LIBRARY) == LIBRARY


def _load() -> mx.distributed.Group:
    """MLX's group of all ranks, with this package's module as its MPI library."""
    with _environment({_VARIABLE: LIBRARY}):
        try:
            return mx.distributed.init(strict=True, backend="mpi")
        except RuntimeError as error:
            raise ZmoeError(f"MLX cannot use zmoe's exchange in its graph: {error}") from None
