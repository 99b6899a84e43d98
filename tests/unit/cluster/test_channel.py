"""A control link's state: whatever its connections lose, each message arrives once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.cluster.channel import (
    ACKNOWLEDGE_EVERY,
    WINDOW,
    Channel,
    ChannelError,
    Frame,
    Kind,
    parse,
)

SESSION = 7


class Link:
    """Two channels and what is under way between them; the first one connects."""

    def __init__(self) -> None:
        self.ends = (Channel(SESSION), Channel(SESSION))
        self.flight: tuple[list[bytes], list[bytes]] = ([], [])  # to the second, to the first
        self.sent: tuple[list[bytes], list[bytes]] = ([], [])
        self.got: tuple[list[bytes], list[bytes]] = ([], [])

    def send(self, end: int) -> None:
        body = b"%d" % (len(self.sent[end]) + 1)
        self.sent[end].append(body)
        self.ends[end].push(body)

    def write(self, end: int) -> bool:
        frame = self.ends[end].outgoing()
        if frame is not None:
            self.flight[end].append(frame)
            self.ends[end].wrote()
        return frame is not None

    def deliver(self, end: int) -> bool:
        """One frame that `end` wrote."""
        if not self.flight[end]:
            return False
        body = self.ends[1 - end].take(parse(self.flight[end].pop(0)))
        if body is not None:
            self.got[1 - end].append(body)
        return True

    def break_off(self, kept: list[int]) -> None:
        """A new connection; of what was under way, frames `kept` come late, even twice."""
        for flight in self.flight:
            flight[:] = [flight[i % len(flight)] for i in kept if flight]
        self.ends[0].reconnected()

    def settle(self) -> None:
        while any([self.write(end) for end in (0, 1)] + [self.deliver(end) for end in (0, 1)]):
            pass


EVENTS = st.one_of(
    st.tuples(st.sampled_from(["send", "write", "deliver"]), st.integers(0, 1)),
    st.tuples(st.just("break_off"), st.lists(st.integers(0, 20), max_size=4)),
)


@given(st.lists(EVENTS, max_size=120))
@settings(max_examples=400)
def test_every_message_arrives_once_and_in_order(events: list[tuple[str, object]]) -> None:
    link = Link()
    for name, given_ in events:
        getattr(link, name)(given_)
        for end in (0, 1):
            assert link.got[1 - end] == link.sent[end][: len(link.got[1 - end])]
    link.break_off([])
    link.settle()
    assert (link.got[1], link.got[0]) == link.sent


def test_acknowledged_messages_are_forgotten() -> None:
    """Also where messages go one way only, as steps do."""
    link = Link()
    for _ in range(10 * WINDOW):
        link.send(1)
        link.settle()
        assert link.ends[1].unacknowledged < ACKNOWLEDGE_EVERY
    link.ends[0].acknowledge()
    link.settle()
    assert link.ends[1].unacknowledged == 0
    assert link.ends[0].outgoing() is None


def test_what_is_never_acknowledged_is_bounded() -> None:
    channel = Channel(SESSION)
    for _ in range(WINDOW):
        channel.push(b"x")
    with pytest.raises(ChannelError, match=f"has not acknowledged {WINDOW} messages"):
        channel.push(b"x")


def test_a_gap_is_asked_for_once() -> None:
    ours, theirs = Channel(SESSION), Channel(SESSION)
    for _ in range(3):
        theirs.push(b"x")
    frames = []
    while (frame := theirs.outgoing()) is not None:
        frames.append(parse(frame))
        theirs.wrote()
    assert ours.take(frames[1]) is None
    asked = ours.outgoing()
    assert asked is not None and parse(asked).kind is Kind.RESUME
    ours.wrote()
    assert ours.take(frames[2]) is None
    assert ours.outgoing() is None
    theirs.take(parse(asked))
    again = theirs.outgoing()
    assert again is not None and parse(again) == frames[0]


def test_a_note_has_no_number() -> None:
    ours, theirs = Channel(SESSION), Channel(SESSION)
    assert ours.take(parse(theirs.note(b"x"))) == b"x"
    assert theirs.unacknowledged == 0


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.MESSAGE, 0, SESSION + 1, 1, 0, b"x"),
        Frame(Kind.MESSAGE, 1, SESSION, 1, 0, b"x"),
        Frame(Kind.ACKNOWLEDGE, 0, SESSION, 0, 1, b""),
    ],
    ids=["session", "epoch", "acknowledges what was never sent"],
)
def test_what_the_other_side_cannot_send_is_refused(frame: Frame) -> None:
    with pytest.raises(ChannelError):
        Channel(SESSION).take(frame)


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_a_frame_or_an_error(data: bytes, framed: bool) -> None:
    try:
        frame = parse(b"zmoe" + data if framed else data)
    except ChannelError:
        return
    assert framed or data.startswith(b"zmoe")
    assert bool(frame.body) == (frame.kind in (Kind.MESSAGE, Kind.NOTE))
