"""What every node spent in each layer: zmoe's spans, kept one by one.

zmoe itself tells sums of the leader's spans, in which the wait for a busier
node cannot be told from the exchange. Here every process of a run keeps each
span's time, and a layer's exchange is what it took beyond the experts of its
busiest node.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
from process import PeerFailure

from zmoe.cli.node import main
from zmoe.cluster import launch, share
from zmoe.obs import Spans

Seconds = npt.NDArray[np.float64]


class Recorder(Spans):
    """Spans that are also kept one by one, in the order of their ends."""

    made: ClassVar[list[Recorder]] = []  # in this process: one a node

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, float]] = []
        self.made.append(self)

    def add(self, name: str, seconds: float) -> None:
        super().add(name, seconds)
        self.log.append((name, seconds))


def record() -> None:
    """Let the nodes of this process record."""
    share.Spans = Recorder  # type: ignore[misc]


def by_layer(log: Sequence[tuple[str, float]], exchanges: int) -> Seconds:
    """Seconds in experts and in exchange (layers, 2), of all layers of all steps.

    A layer ends with the last of its `exchanges` exchanges. Counted from the
    end: a prompt's layers may have more of them than a decode step's.
    """
    spent: list[list[float]] = []
    left = 0
    for name, seconds in reversed(log):
        if name == "exchange":
            if left == 0:
                spent.append([0.0, 0.0])
                left = exchanges
            spent[-1][1] += seconds
            left -= 1
        elif name == "experts":
            spent[-1][0] += seconds
    return np.array(spent[::-1])


def summary(leader: Seconds, experts: Sequence[Seconds]) -> dict[str, float]:
    """Milliseconds a layer: of `leader` (layers, 2), and of every node's experts (layers,).

    `exchange` is the time in experts and exchange beyond the busiest node's
    experts. A node that the leader waits for because it came late counts in it.
    """
    busiest = np.max(experts, axis=0)
    exchange = leader.sum(axis=1) - busiest
    return {
        "experts_ms": 1e3 * float(busiest.mean()),
        "exchange_ms": 1e3 * float(exchange.mean()),
        "exchange_p50_ms": 1e3 * statistics.median(exchange.tolist()),
    }


def worker(folder: str) -> NoReturn:
    """zmoe-node, whose record is in `folder` afterwards."""
    record()
    status = main()
    (recorder,) = Recorder.made
    (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(recorder.log))
    sys.exit(status)


class Recording:
    """Records all nodes of a cluster that this process makes meanwhile; a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench")

    def __enter__(self) -> Recording:
        record()
        here = str(Path(__file__).parent)
        launch._MAIN = (
            f"import sys; sys.path = [p for p in sys.path if p] + [{here!r}]; "
            f"from recording import worker; worker({self._folder.name!r})"
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.cleanup()

    def summary(self, nodes: int, layers: int, exchanges: int) -> dict[str, float]:
        """Of the last `layers` layers (of all steps), once the cluster is closed.

        PeerFailure when one of the `nodes` left no record.
        """
        (recorder,) = Recorder.made
        leader = by_layer(recorder.log, exchanges)[-layers:]
        records = [json.loads(path.read_text()) for path in Path(self._folder.name).iterdir()]
        if len(records) != nodes - 1:
            raise PeerFailure(f"{nodes - 1} workers left {len(records)} records")
        workers = [by_layer(log, exchanges)[-layers:, 0] for log in records]
        return summary(leader, [leader[:, 0], *workers])
