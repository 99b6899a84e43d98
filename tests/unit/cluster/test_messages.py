"""Control messages: what fits passes unchanged, anything else is refused."""

from __future__ import annotations

import dataclasses
import re

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmoe.cluster import messages
from zmoe.cluster.messages import Join, MessageError, Setup, Step, decode, encode
from zmoe.config import PROTOCOL_VERSION
from zmoe.placement.types import Placement

HELLO = messages.Hello(
    fingerprint="ab",
    dtype="f32",
    quantization="none",
    isa="AVX2",
    compute="native",
    device="cpu",
    mlx="0.3",
    mlx_lm="0.4",
    arithmetic="cd",
    machine="m",
    memory=1 << 40,
    memory_limit=None,
    speed=9,
    host="127.0.0.1",
    data_port=5000,
    control_port=5001,
)
MESH = messages.Mesh("AVX2", ["127.0.0.1", "127.0.0.2"], [1, 3], [2, 4])
EXAMPLES = [
    Join(PROTOCOL_VERSION, 3, "0.1.0", "host", "token"),
    Setup(4, "m", 512, None, "auto", "exact", "q8", "centralized", "x", None, 1.5, 1.0, 60.0, 9),
    HELLO,
    messages.Place(3, [[[0, 1], [2]], [[0], [1, 2]]], [[0, 64], [64, 128]], [1, 2]),
    MESH,
    messages.Loading(1, 2),
    messages.Ready(0.5, "cd"),
    Step(7, True, [1, 2, 3]),
    messages.AskMemory(),
    messages.Memory(1 << 40),
    messages.Stop(""),
    messages.Failed("why", True, 1, None, 7),
]
OUT_OF_RANGE = [
    (HELLO, {"host": "nowhere"}, "Hello.host is 'nowhere': not an IPv4 address"),
    (HELLO, {"host": "0.0.0.0"}, "Hello.host is '0.0.0.0': not an IPv4 address"),
    (HELLO, {"data_port": 0}, "Hello.data_port is 0: not in 1 to 65535"),
    (HELLO, {"control_port": 65536}, "Hello.control_port is 65536"),
    (HELLO, {"memory": -1}, "Hello.memory is -1"),
    (HELLO, {"memory_limit": 1 << 61}, "Hello.memory_limit is"),
    (HELLO, {"speed": 1 << 30}, "Hello.speed is"),
    (HELLO, {"dtype": "f" * 201}, "Hello.dtype has 201 characters: more than 200"),
    (HELLO, {"machine": "a\x1b[2J"}, "Hello.machine has characters that cannot be printed"),
    (MESH, {"hosts": ["127.0.0.1", "::1"]}, "Mesh.hosts is '::1': not an IPv4 address"),
    (MESH, {"data_ports": [1, -3]}, "Mesh.data_ports is -3"),
    (MESH, {"data_ports": [1, 2, 3]}, "Mesh has lists of unequal lengths"),
    (MESH, {"hosts": ["127.0.0.1"]}, "Mesh.hosts has 1 items: not 2 to 64"),
    (messages.Ready(0.5, "cd"), {"seconds": float("nan")}, "Ready.seconds is nan"),
    (messages.Loading(1, 2), {"total": -1}, "Loading.total is -1"),
    (messages.Memory(1), {"peak_memory": 1 << 62}, "Memory.peak_memory is"),
    (Step(7, True, [1]), {"step": 0}, "Step.step is 0"),
    (Step(7, True, [1]), {"tokens": []}, "Step.tokens has 0 items"),
    (Step(7, True, [1]), {"tokens": [-1]}, "Step.tokens is -1"),
    (messages.Failed("why", True, 1, None, 7), {"lost": 64}, "Failed.lost is 64"),
    (messages.Failed("why", True, 1, None, 7), {"layer": -1}, "Failed.layer is -1"),
    (messages.Stop(""), {"error": "x" * 4001}, "Stop.error has 4001 characters"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: messages.Message) -> None:
    assert decode(encode(message)) == message


def test_every_message_is_among_the_examples() -> None:
    assert {type(m).__name__ for m in EXAMPLES} == set(messages._TYPES)


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
        ["Setup", 0, "m", 512, None, 1.0, 1.0, 1.0, 1.0],
        ["Step", 7, 1, [1]],
        ["Step", 7, True, [1, "2"]],
        ["Setup", 4, "m", 512, "none", 1.0, 1.0, 1.0, 1.0],
        ["Place", 3, [[[0, "1"], [2]]], [], []],
        ["Place", 3, [[0, 1], [2]], [], []],
        ["Place", 3, [[[0, 1], [2]]], [[0, 64, 128]], []],
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
    values = {**dataclasses.asdict(message), **changes}
    with pytest.raises(MessageError, match=re.escape(words)):
        decode(msgpack.packb([type(message).__name__, *values.values()]))


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


def test_a_placement_travels() -> None:
    placement = Placement(2, 3, (((0, 1), (2,)),) * 2, ((0, 128), (0, 128)), (1, 2))
    received = decode(encode(messages.Place.of(placement)))
    assert isinstance(received, messages.Place)
    assert received.placement(2) == placement
    assert received.placement(2).digest == placement.digest
