"""A worker that serves run after run outlives whatever its leaders do."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.changed import changed
from tests.cluster.conftest import PATIENCE_S, Commands
from zmoe.batch.plan import PREVIOUS, Plan, Span
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster import leader_bus
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.messages import Endpoints, Message, Place, Setup, Step
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Timing
from zmoe.errors import ZmoeError
from zmoe.exchange.local import Endpoint

TINY = resolve_model("zmoe-tiny")
SERVE = "import zmoe.cli.node as node; node.PAUSE_S = 0.0; node.main({arguments!r})"
WARM_UP = Step(Plan(1, (Span(0, 0, 1, 1),), (0,), (0,)))  # which a cluster does by itself
FURTHER = Step(Plan(9, (Span(5, 0, 1, 1),), (0,), (1,)))
Instead = dict[str, Any] | Message | bytes
# The message that is changed, how, and what the worker says of it.
BAD: list[tuple[type[Message], Instead, str]] = [
    (Setup, {"model": "x" * 300}, "File name too long"),
    (Setup, {"model": "\0"}, "Setup.model has characters"),
    (Setup, {"memory_limit": -1}, "Setup.memory_limit is -1"),
    (Setup, {"timing.grace": 1e300}, "Setup.timing.grace is"),
    (Setup, {"timing.peer": float("nan")}, "Setup.timing.peer is nan"),
    (Setup, {"engine.compute": "cuda"}, "compute is 'cuda'"),
    (Setup, FURTHER, "Step before Setup"),
    (Setup, b"\xc1", "bad control data"),
    (Place, {"placement.owned": []}, "does not fit"),
    (Place, FURTHER, "unexpected Step"),
    (Endpoints, {"isa": "NOPE"}, "instruction set 'NOPE'"),
    (Endpoints, {"nodes": [Endpoint("a b", 1, 2)] * 2}, "Endpoints.nodes.host is 'a b'"),
    (Step, {"plan.tokens": [2**63]}, "Step.plan.tokens is 9223372036854775808"),
    (Step, {"plan.tokens": [2**31 - 1]}, "a token outside of 0 to"),
    (Step, {"plan.tokens": [-2]}, "a token outside of 0 to"),
    (Step, {"plan.tokens": [PREVIOUS]}, "refers to sampled tokens"),
    (Step, {"plan.tokens": []}, "1 rows and 0 tokens"),
    (Step, {"plan.tokens": [1] * 1000, "plan.spans": [[5, 0, 1000, 1]]}, "1000 rows and 1000"),
    (Step, {"plan.spans": []}, "0 rows and 1 tokens"),
    (Step, {"plan.spans": [[5, -1, 1, 1]]}, "a span of no rows or before"),
    (Step, {"plan.spans": [[5, 0, 1, 2]]}, "a span of no rows or before"),
    (Step, {"plan.spans": [[5, 70, 1, 1]]}, "brings 1 blocks: its spans lack 2"),
    (Step, {"plan.blocks": []}, "block"),
    (Step, {"plan.blocks": [2**31 - 1]}, "block"),
    (Step, {"plan.copies": [[0, 2**31 - 1]]}, "block"),
    (Step, {"plan.forks": [[6, 5, 1]]}, "fork"),
    (Step, b"", "bad control data"),
]


class Hostile:
    """Puts something else in the place of one kind of message of the leaders here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind: type[Message] | None = None
        self.instead: Instead = {}
        self._encode = leader_bus.encode
        monkeypatch.setattr(leader_bus, "encode", self)

    def __call__(self, message: Message) -> bytes:
        if type(message) is not self.kind or message == WARM_UP:
            return self._encode(message)
        if isinstance(self.instead, bytes):
            return self.instead
        if isinstance(self.instead, dict):
            return self._encode(changed(message, self.instead))
        return self._encode(self.instead)


def generated(cluster: Cluster) -> str:
    return "".join(token.text for token in cluster.generate("ROMEO:", max_tokens=8))


def test_no_leader_ends_a_serving_worker(
    commands: Commands, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cluster(TINY) as alone:
        text = generated(alone)
    arguments = ["--leader", f"127.0.0.1:{free_port}", "--rank", "1"]
    node = commands.python("-c", SERVE.format(arguments=arguments))
    spec = ClusterSpec(nodes=2, manual=True, port=free_port, timing=Timing(join=PATIENCE_S))
    hostile = Hostile(monkeypatch)
    for hostile.kind, hostile.instead, words in BAD:
        with pytest.raises(ZmoeError, match=words), Cluster(TINY, spec=spec) as cluster:
            leader = cluster._leader
            assert leader is not None
            leader.bus.broadcast(FURTHER)
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                leader.watch()  # raises what the worker says
        assert node.poll() is None
    hostile.kind = None
    with Cluster(TINY, spec=spec) as cluster:
        assert generated(cluster) == text
    node.kill()
    _, said = node.communicate(timeout=PATIENCE_S)
    for _, _, words in BAD:
        assert words in said
    assert "Traceback" not in said
