"""A worker's session with its leader, whatever it then computes: join, listen, report."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

from zmoe import __version__
from zmoe.cluster.bus import FAREWELL_S
from zmoe.cluster.messages import Failed, Join, Message, Stop, one_line
from zmoe.cluster.spec import WorkerSpec
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.config import PROTOCOL_VERSION, Timing
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.exchange.keys import is_loopback
from zmoe.exchange.sockets import Context

JOIN_SLICE_S = 0.2
M = TypeVar("M", bound=Message)


class StoppedError(ZmoeError):
    """The leader ended the run, and said why."""


class Member:
    """One session with one leader, which begins when that has time."""

    begins: ClassVar[type[Any]]  # the leader's first message

    def __init__(self, spec: WorkerSpec, context: Context) -> None:
        """Raises InputError for a key file."""
        self.spec, self._context, self._keys = spec, context, spec.pinned()
        self._bus = self._dial()

    def _dial(self) -> WorkerBus:
        """A link to whatever leader listens at the address of spec."""
        spec = self.spec
        join = Join(
            protocol=PROTOCOL_VERSION,
            rank=spec.rank,
            version=__version__,
            host=one_line(socket.gethostname())[:200],
            token=spec.token,
        )
        source = "" if self._keys or spec.token or is_loopback(spec.bind) else spec.bind
        grace, keys = Timing().grace, spec.control_keys()
        return WorkerBus(self._context, spec.leader, join, grace, keys, source)

    def join(self, patience: float | None, for_others: float = 0.0) -> Any:
        """The message that `begins` the session. Raises ZmoeError after `patience` seconds, None
        for as long as it takes; `for_others` seconds later where there is a leader by then, which
        may wait for other workers.
        """
        deadline = None if patience is None else time.monotonic() + patience
        while (
            deadline is None
            or time.monotonic() < deadline
            or (self._bus.is_connected and time.monotonic() < deadline + for_others)
        ):
            begun = self.expect(self.begins, JOIN_SLICE_S)
            if begun is not None:
                return begun
        raise ZmoeError(f"leader {self.spec.leader} did not begin a run within {patience:g} s")

    def expect(self, kind: type[M], timeout: float) -> M | None:
        """The next message, of `kind`; None for none within `timeout` seconds."""
        message = self._bus.receive(timeout)
        if isinstance(message, kind):
            return message
        if isinstance(message, Stop):
            raise self.stopped(message.error or "too early")
        if message is not None:
            raise self.unexpected(message)
        return None

    def stopped(self, why: str) -> StoppedError:
        """What to raise when the leader has stopped the run."""
        return StoppedError(f"leader {self.spec.leader} stopped: {why}")

    def unexpected(self, message: Message) -> ZmoeError:
        """What to raise for a message that nobody waits for."""
        return ZmoeError(f"leader {self.spec.leader} sent an unexpected {type(message).__name__}")

    def report(self, error: Exception) -> None:
        """Tell the leader of an error that ends us, unless it knows."""
        if isinstance(error, StoppedError) or not self._bus.has_session:
            return
        lost = error if isinstance(error, PeerError) else None
        words = str(error) if isinstance(error, ZmoeError) else f"internal error: {error!r}"
        failed = Failed(
            error=one_line(lost.reason if lost is not None else words),
            input_error=isinstance(error, InputError),
            lost=lost.rank if lost is not None else None,
            layer=lost.layer if lost is not None else None,
            step=lost.step if lost is not None else self._bus.step,
        )
        with suppress(PeerError):  # the error itself goes on to our own standard error
            self._bus.send(failed)
            if lost is None or lost.rank != 0:
                self._bus.finish(FAREWELL_S)
