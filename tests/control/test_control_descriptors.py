"""Descriptors: taken by SET_DATAFD or handed back, each exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crbd.control import messages as m
from crbd.control.connection import ControlConnection, Event, Received, Rejected
from crbd.tpm.results import TpmResult

from .feeding import descriptors_in, events_of, feed, single
from .samples import REQUESTS

SET_DATAFD = b"\0\0\0\x10"
STOP = b"\0\0\0\x0e"


def test_the_first_of_several() -> None:
    connection = ControlConnection()
    assert feed(connection, [(SET_DATAFD, (7, 8, 9))]) == [Received(m.SetDataFd(7))]
    assert connection.unclaimed_fds() == (8, 9)
    assert connection.unclaimed_fds() == ()


def test_none() -> None:
    connection = ControlConnection()
    (event,) = feed(connection, [(SET_DATAFD, ())])
    assert isinstance(event, Rejected)
    assert (event.result, event.close) == (TpmResult.BAD_PARAMETER, False)
    assert feed(connection, [(STOP, ())]) == [Received(m.Stop())]


def test_with_another_request() -> None:
    connection = ControlConnection()
    assert feed(connection, [(STOP, (7,))]) == [Received(m.Stop())]
    assert connection.unclaimed_fds() == (7,)
    (event,) = feed(connection, [(SET_DATAFD, ())])
    assert isinstance(event, Rejected)


def test_behind_another_request_in_the_same_read() -> None:
    connection = ControlConnection()
    assert feed(connection, [(STOP + SET_DATAFD, (7,))]) == [Received(m.Stop()), Received(m.SetDataFd(7))]
    assert connection.unclaimed_fds() == ()


def test_the_oldest_of_those_that_came_with_the_pieces() -> None:
    connection = ControlConnection()
    pieces = [(SET_DATAFD[:1], (7,)), (SET_DATAFD[1:3], (8,)), (SET_DATAFD[3:], (9,))]
    assert feed(connection, pieces) == [Received(m.SetDataFd(7))]
    assert connection.unclaimed_fds() == (8, 9)


def test_released_as_soon_as_the_request_is_another() -> None:
    """Otherwise a request in many pieces could hold a descriptor with each."""
    connection = ControlConnection()
    for number, (piece, _) in enumerate(single(b"\0\0\0\7\0\0\0\x09")):
        assert feed(connection, [(piece, (number,))]) == []
        assert connection.unclaimed_fds() == ((), (), (), (0, 1, 2, 3), (4,), (5,), (6,), (7,))[number]


def test_with_unknown_code_and_with_garbage() -> None:
    connection = ControlConnection()
    feed(connection, [(b"\0\0\0\xff", (7,))])
    assert connection.unclaimed_fds() == (7,)
    feed(connection, [(STOP + b"\0\0\0\xff", (8,))])
    assert connection.unclaimed_fds() == (8,)


def test_with_padding() -> None:
    connection = ControlConnection()
    feed(connection, [(b"\0\0\0\x05\0abc", (7,))])
    (event,) = feed(connection, [(SET_DATAFD, ())])
    assert isinstance(event, Rejected)
    assert connection.unclaimed_fds() == (7,)


def test_at_and_after_the_end() -> None:
    connection = ControlConnection()
    connection.receive(SET_DATAFD[:2], (7,))
    assert connection.unclaimed_fds() == ()
    connection.end_of_stream()
    assert connection.unclaimed_fds() == (7,)
    connection.receive(SET_DATAFD, (8, 9))
    assert connection.unclaimed_fds() == (9, 8)


def test_abandon_gives_back_what_was_not_fetched() -> None:
    connection = ControlConnection()
    connection.receive(SET_DATAFD, (7,))
    connection.receive(SET_DATAFD[:1], (8, 9))
    assert sorted(connection.abandon()) == [7, 8, 9]
    assert connection.next_event() is None
    assert connection.abandon() == ()


LIKELY = st.one_of(
    st.binary(max_size=6),
    st.just(SET_DATAFD),
    st.sampled_from([SET_DATAFD[:1], SET_DATAFD[1:], b"\0\0\0\7\xff\xff\xff\xff"]),
    st.sampled_from([bytes.fromhex(text) for text, _ in REQUESTS]),
)


@given(st.lists(st.tuples(LIKELY, st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())), st.booleans())
def test_conservation(reads: list[tuple[bytes, int, bool, bool, bool]], ends: bool) -> None:
    """Whatever comes in whatever reads, and whenever the caller looks, each descriptor comes out once."""
    connection = ControlConnection()
    handed_in: list[int] = []
    out: list[int] = []
    events: list[Event] = []
    for data, count, look_at_events, look_at_unclaimed, freeze in reads:
        fds = tuple(range(len(handed_in), len(handed_in) + count))
        handed_in += fds
        connection.receive(data, fds)
        if look_at_events:
            events += events_of(connection)
        if look_at_unclaimed:
            out += connection.unclaimed_fds()
        if freeze:
            frozen = connection.freeze()
            out += connection.abandon()
            connection = ControlConnection.thaw(frozen)
    if ends:
        connection.end_of_stream()
        events += events_of(connection)
        out += connection.unclaimed_fds()
    else:
        out += connection.abandon()
    assert sorted(out + descriptors_in(events)) == handed_in
    assert connection.abandon() == ()
