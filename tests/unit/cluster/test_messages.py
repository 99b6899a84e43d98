"""Control messages: what fits passes unchanged, anything else is refused."""

from __future__ import annotations

import re
import typing

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.changed import changed
from zmoe.batch.plan import PREVIOUS, Copy, Fork, Plan, Span
from zmoe.cluster import messages
from zmoe.cluster.messages import Join, Setup, Step, decode, encode
from zmoe.codec import MessageError
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.exchange.local import Endpoint
from zmoe.kernels.arithmetic import Arithmetic
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import Placement
from zmoe.recovery import messages as recovery
from zmoe.recovery.view import ClusterView

HERE, THERE = Endpoint("127.0.0.1", 1, 2), Endpoint("127.0.0.2", 3, 4)
HELLO = messages.Hello(
    fingerprint="ab",
    dtype="f32",
    quantization="none",
    isa="AVX2",
    arithmetic=Arithmetic("native", "cpu", "0.3", "0.4", "cd"),
    resources=NodeResources("m", 1 << 40, None, 9),
    endpoint=HERE,
)
ENGINE = EngineConfig(max_kv_size=64, kv_bits=8, wire_dtype="q8", schedule="centralized")
SETUP = Setup(4, "m", ENGINE, Timing(peer=1.5, join=9), 1 << 33)
ENDPOINTS = messages.Endpoints("AVX2", (HERE, THERE))
PLACEMENT = Placement(2, 3, (((0, 1), (2,)), ((0,), (1, 2))), ((0, 64), (64, 128)), (1, 2))
PLAN = Plan(
    7,
    (Span(3, 64, 2, 1), Span(4, 0, 1, 1)),
    (5, 6, PREVIOUS),
    (9, 8),
    (1, 2),
    (Fork(4, 3, 64),),
    (Copy(8, 9),),
)
VIEW = recovery.View(ClusterView(2, 2**63 - 1, (0, 0, 2), (0, 2), 70_000))
EXAMPLES = [
    Join(PROTOCOL_VERSION, 3, "0.1.0", "host", "token"),
    SETUP,
    messages.Program(2, Timing(peer=1.5)),
    messages.Listening(HERE),
    messages.Ended(3, 70_000),
    messages.Finished(1, 70_000),
    recovery.View(ClusterView(2, 5, (0, 2), (0, 2), 7, True, ((0, 64), (64, 192)))),
    HELLO,
    messages.Place(PLACEMENT),
    ENDPOINTS,
    messages.Loading(1, 2),
    messages.Ready(0.5, "cd", ("far away",)),
    messages.Cache(9),
    messages.LoadPrefix("/tmp/prompt.safetensors", "0" * 32, (3, 4)),
    messages.Loaded(),
    Step(PLAN),
    messages.AskMemory(),
    messages.Memory(1 << 40),
    messages.AskTimes(70_000),
    messages.Times(70_000, 3, 0.5),
    messages.Stop(""),
    messages.Failed("why", True, 1, None, 7),
    messages.Enter(PLACEMENT, "avx2", 9, (1.0, 0.5, 2.0, 0.25), False),
    recovery.Suspect(1, 70_000, 2),
    recovery.Quiesce(2),
    recovery.Halted(2, 70_000),
    VIEW,
    recovery.Opened(2, (HERE, HERE)),
    recovery.Mesh(2, ((HERE, HERE), (HERE,))),
    recovery.Adopted(2),
    recovery.Evicted("did not halt in time"),
]
OUT_OF_RANGE = [
    (HELLO, {"endpoint.host": "nowhere"}, "Hello.endpoint.host is 'nowhere': not an IPv4 address"),
    (HELLO, {"endpoint.host": "0.0.0.0"}, "Hello.endpoint.host is '0.0.0.0': not an IPv4 address"),
    (HELLO, {"endpoint.data_port": 0}, "Hello.endpoint.data_port is 0: not in 1 to 65535"),
    (HELLO, {"endpoint.control_port": 65536}, "Hello.endpoint.control_port is 65536"),
    (HELLO, {"resources.memory": -1}, "Hello.resources.memory is -1"),
    (HELLO, {"resources.limit": 1 << 61}, "Hello.resources.limit is"),
    (HELLO, {"resources.speed": 1 << 30}, "Hello.resources.speed is"),
    (HELLO, {"dtype": "f" * 201}, "Hello.dtype has 201 characters: more than 200"),
    (
        HELLO,
        {"resources.machine": "a\x1b[2J"},
        "Hello.resources.machine has characters that cannot be printed",
    ),
    (HELLO, {"arithmetic.mlx": "1" * 201}, "Hello.arithmetic.mlx has 201 characters"),
    (SETUP, {"nodes": 1}, "Setup.nodes is 1: not in 2 to 64"),
    (SETUP, {"memory_limit": -1}, "Setup.memory_limit is -1"),
    (SETUP, {"engine.compute": "cuda"}, "Setup.engine.compute is 'cuda': expected auto or mlx or"),
    (SETUP, {"engine.compute": "a\x1b[2J"}, "Setup.engine.compute has characters that cannot"),
    (SETUP, {"engine.policy": "x" * 201}, "Setup.engine.policy has 201 characters"),
    (SETUP, {"engine.prefill_chunk": 8193}, "Setup.engine.prefill_chunk is 8193: expected a whole"),
    (SETUP, {"engine.prefill_chunk": True}, "Setup.engine.prefill_chunk has the wrong type"),
    (SETUP, {"engine.prefill_chunk": 9.0}, "Setup.engine.prefill_chunk has the wrong type"),
    (SETUP, {"engine.max_kv_size": 1 << 40}, "Setup.engine.max_kv_size is 1099511627776: not in"),
    (SETUP, {"engine.kv_bits": 4}, "Setup.engine.kv_bits is 4: expected 8"),
    (SETUP, {"timing.peer": float("nan")}, "Setup.timing.peer is nan"),
    (SETUP, {"timing.grace": 1e300}, "Setup.timing.grace is 1e+300: not in"),
    (SETUP, {"timing.join": 0}, "Setup.timing.join is 0: expected a positive number of seconds"),
    (SETUP, {"timing": [1.0, 1.0, 1.0]}, "Setup.timing has 3 fields instead of 4"),
    (SETUP, {"timing": {"join": 1.0}}, "Setup.timing has the wrong type"),
    (ENDPOINTS, {"nodes": [HERE, changed(HERE, {"host": "::1"})]}, "nodes.host is '::1': not an"),
    (ENDPOINTS, {"nodes": [HERE, changed(HERE, {"data_port": -3})]}, "nodes.data_port is -3"),
    (ENDPOINTS, {"nodes": [HERE]}, "Endpoints.nodes has 1 items: not 2 to 64"),
    (
        messages.Place(PLACEMENT),
        {"placement.slices": [[0, 64, 128]]},
        "Place.placement.slices has 3 items: not 2 to 2",
    ),
    (messages.Ready(0.5, "cd", ()), {"seconds": float("nan")}, "Ready.seconds is nan"),
    (
        messages.Ready(0.5, "cd", ()),
        {"notices": ["x"] * 5},
        "Ready.notices has 5 items",
    ),
    (messages.Ready(0.5, "cd", ()), {"notices": ["a\nb"]}, "Ready.notices has characters"),
    (messages.Loading(1, 2), {"total": -1}, "Loading.total is -1"),
    (messages.Memory(1), {"peak_memory": 1 << 62}, "Memory.peak_memory is"),
    (messages.Cache(1), {"blocks": 0}, "Cache.blocks is 0"),
    (messages.LoadPrefix("/p", "0", (1,)), {"places": ()}, "LoadPrefix.places has 0 items"),
    (messages.LoadPrefix("/p", "0", (1,)), {"places": (-1,)}, "LoadPrefix.places is -1"),
    (messages.LoadPrefix("/p", "0", (1,)), {"path": "a\nb"}, "LoadPrefix.path has characters"),
    (Step(PLAN), {"plan.step": 1 << 32}, "Step.plan.step is 4294967296"),
    (Step(PLAN), {"plan.tokens": [1.0]}, "Step.plan.tokens has the wrong type"),
    (Step(PLAN), {"plan.spans": [[1, 2, 3]]}, "Step.plan.spans has 3 fields instead of 4"),
    (Step(PLAN), {"plan.free": 7}, "Step.plan.free has the wrong type"),
    (messages.Failed("why", True, 1, None, 7), {"lost": 64}, "Failed.lost is 64"),
    (messages.Failed("why", True, 1, None, 7), {"layer": -1}, "Failed.layer is -1"),
    (messages.Stop(""), {"error": "x" * 4001}, "Stop.error has 4001 characters"),
    (EXAMPLES[-9], {"figures": (1.0,)}, "Enter.figures has 1 items: not 4, nor none"),
    (VIEW, {"view.hosts": (0, 1, 2)}, "View.view.hosts gives shard 1 to node 1, which is gone"),
    (VIEW, {"view.nodes": (2, 0)}, "View.view.nodes is (2, 0): expected ascending ranks"),
    (VIEW, {"view.session": 1 << 63}, "View.view.session is"),
    (recovery.Opened(2, (HERE,)), {"endpoint": ()}, "Opened.endpoint has 0 items"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: messages.Message) -> None:
    assert decode(encode(message)) == message


def test_every_message_is_among_the_examples() -> None:
    kinds = typing.get_args(messages.Message)  # those of other rooms are annotated
    assert {type(m) for m in EXAMPLES} == {getattr(k, "__origin__", k) for k in kinds}


@pytest.mark.parametrize(
    "parts",
    [
        "Join",
        [],
        [1],
        ["Jion", 1],
        ["Join", 1, 3, "0.1.0"],
        ["Join", PROTOCOL_VERSION, 3, "0.1.0", "host"],
        ["Join", PROTOCOL_VERSION, 3, "0.1.0", "host", "token", "extra"],
        ["Join", 1, "3", "0.1.0", "host"],
        ["Join", True, 3, "0.1.0", "host"],
        ["Join", PROTOCOL_VERSION, 64, "0.1.0", "host", "token"],
        ["Setup", 4, "m", [*range(7)], [1.0] * 4, None, "extra"],
        ["Setup", 4, "m", [*range(7)], [1.0] * 4],
        ["Setup", 4, "m", None, None, None],
        ["Step", 7, 1, [1]],
        ["Step", 7, True, [1, "2"]],
        ["Place", [2, 3, [[[0, "1"], [2]]], [], []]],
        ["Place", [2, 3, [[0, 1], [2]], [], []]],
        ["Place", [2, 3, [[[0, 1], [2]]], [[0, 64, 128]], []]],
        ["Place", [2, 3, [[[0, 1], [2]]], []]],
        {"Join": 1},
    ],
)
def test_what_does_not_fit_is_refused(parts: object) -> None:
    with pytest.raises(MessageError):
        decode(msgpack.packb(parts))


@pytest.mark.parametrize(("message", "changes", "words"), OUT_OF_RANGE, ids=lambda x: str(x)[:40])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(
    message: messages.Message, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(MessageError, match=re.escape(words)):
        decode(encode(changed(message, changes)))


def test_a_join_of_another_protocol_is_read_whatever_else_it_has() -> None:
    for rest in ([], ["token"], [1, {"a": 2}]):
        frame = msgpack.packb(["Join", 99, 3, "9.0", "host", *rest])
        assert decode(frame) == Join(99, 3, "9.0", "host", "")


def test_any_error_fits_a_message() -> None:
    words = messages.one_line("several\nlines \x1b[31m" + "x" * 9999)
    assert words.startswith("several lines")
    assert decode(encode(messages.Stop(words))) == messages.Stop(words)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(frame: bytes) -> None:
    try:
        message = decode(frame)
    except MessageError:
        return
    assert decode(encode(message)) == message


@given(st.sampled_from(EXAMPLES), st.data())
def test_truncated_messages_are_refused(message: messages.Message, data: st.DataObject) -> None:
    frame = encode(message)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(MessageError):
        decode(frame[:cut])


def test_oversized_messages_are_refused() -> None:
    with pytest.raises(MessageError, match="more than any message"):
        decode(b"\0" * (messages.MAX_MESSAGE_BYTES + 1))


def test_a_placement_keeps_its_digest_on_the_way() -> None:
    received = decode(encode(messages.Place(PLACEMENT)))
    assert isinstance(received, messages.Place)
    assert received.placement.digest == PLACEMENT.digest
