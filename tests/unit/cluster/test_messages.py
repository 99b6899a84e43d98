"""Control messages: what fits passes unchanged, anything else is refused."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmoe.cluster import messages
from zmoe.cluster.messages import Join, MessageError, Setup, Step, decode, encode
from zmoe.types import Placement

EXAMPLES = [
    Join(1, 3, "0.1.0", "host"),
    Setup(1, 4, "m", 512, None, "auto", "exact", "q8", "centralized", "x", None, 1.5, 1.0, 60.0, 9),
    messages.Hello(1, "ab", "f32", "none", "AVX2", "m", 1 << 40, None, 9, "127.0.0.1", 5000, 5001),
    messages.Place(3, [[[0, 1], [2]], [[0], [1, 2]]], [[0, 64], [64, 128]], [1, 2]),
    messages.Mesh("AVX2", ["127.0.0.1", "127.0.0.2"], [1, 3], [2, 4]),
    messages.Loading(1, 2),
    messages.Ready(0.5, "cd"),
    Step(7, True, [1, 2, 3]),
    messages.AskMemory(),
    messages.Memory(1 << 40),
    messages.Stop(""),
    messages.Failed("why", True, 1, None, 7),
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
        ["Join", 1, 3, "0.1.0", "host", "extra"],
        ["Join", 1, "3", "0.1.0", "host"],
        ["Join", True, 3, "0.1.0", "host"],
        ["Setup", 1, 0, "m", 512, None, 1.0, 1.0, 1.0, 1.0],
        ["Step", 7, 1, [1]],
        ["Step", 7, True, [1, "2"]],
        ["Setup", 1, 4, "m", 512, "none", 1.0, 1.0, 1.0, 1.0],
        ["Hello", 1, "ab", "f32", "none", "AVX2", "m", -1, None, 9, "127.0.0.1", 5000, 5001],
        ["Hello", 1, "ab", "f32", "none", "AVX2", "m", 1, 1 << 61, 9, "127.0.0.1", 5000, 5001],
        ["Hello", 1, "ab", "f32", "none", "AVX2", "m", 1, None, 1 << 30, "127.0.0.1", 5000, 5001],
        ["Place", 3, [[[0, "1"], [2]]], [], []],
        ["Place", 3, [[0, 1], [2]], [], []],
        ["Place", 3, [[[0, 1], [2]]], [[0, 64, 128]], []],
        {"Join": 1},
    ],
)
def test_what_does_not_fit_is_refused(parts: object) -> None:
    with pytest.raises(MessageError):
        decode(msgpack.packb(parts))


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
