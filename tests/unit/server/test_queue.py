"""How many requests may wait at a server."""

from __future__ import annotations

from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Batching, EngineConfig
from zmoe.server.engine import with_bounded_queue


def test_a_server_lets_four_times_as_many_wait_as_run() -> None:
    spec = ClusterSpec(2, engine=EngineConfig(parallel=3), batching=Batching(step_ms=99))
    bounded = with_bounded_queue(spec)
    assert bounded.batching == Batching(step_ms=99, max_queue=12)
    assert (bounded.nodes, bounded.engine) == (2, spec.engine)


def test_or_as_many_as_it_is_told() -> None:
    spec = ClusterSpec(batching=Batching(max_queue=5))
    assert with_bounded_queue(spec) is spec
