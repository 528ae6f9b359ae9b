"""Requests out of a stream, however it is cut; unknown codes; caps; the end."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.control import messages as m
from crbd.control.connection import MAX_RECEIVE, MAX_REQUEST, ControlConnection, Event, Received, Rejected
from crbd.control.spec import BY_REQUEST, MAX_HASH_DATA, MAX_STATE_BLOB
from crbd.tpm.results import TpmResult

from .feeding import cut, events_of, feed, single
from .samples import FD, REQUESTS

GARBAGE = b"\0\0\0\xff\0\0\0\x01"
SAMPLES = [(bytes.fromhex(text), request) for text, request in REQUESTS]
IDS = [f"{type(request).__name__}-{len(data)}" for data, request in SAMPLES]
each_request = pytest.mark.parametrize(("data", "request_"), SAMPLES, ids=IDS)


def fds_of(request: m.Request) -> tuple[int, ...]:
    return (FD,) if isinstance(request, m.SetDataFd) else ()


@each_request
def test_whole(data: bytes, request_: m.Request) -> None:
    connection = ControlConnection()
    assert feed(connection, [(data, fds_of(request_))]) == [Received(request_)]
    assert not connection.partial
    assert connection.declared_size == 0


@each_request
def test_byte_by_byte(data: bytes, request_: m.Request) -> None:
    connection = ControlConnection()
    pieces = single(data, fds_of(request_))
    for index, piece in enumerate(pieces[:-1]):
        assert feed(connection, [piece]) == []
        assert connection.partial
        declared = connection.declared_size
        assert index + 1 < declared <= len(data)
        if index >= 3 + BY_REQUEST[type(request_)].body.fixed:
            assert declared == len(data)
    assert feed(connection, pieces[-1:]) == [Received(request_)]
    assert not connection.partial
    assert connection.declared_size == 0


@each_request
def test_two_in_one_read(data: bytes, request_: m.Request) -> None:
    connection = ControlConnection()
    both = bytes.fromhex("0000000f") + data + bytes.fromhex("00000011 00000007")
    expected = [Received(m.GetConfig()), Received(request_), Received(m.SetBufferSize(7))]
    assert feed(connection, [(both, fds_of(request_))]) == expected


@each_request
def test_trailing_garbage_is_discarded(data: bytes, request_: m.Request) -> None:
    connection = ControlConnection()
    assert feed(connection, [(data + GARBAGE, fds_of(request_))]) == [Received(request_)]
    assert not connection.partial
    assert feed(connection, [(data, fds_of(request_))]) == [Received(request_)]


def test_short_trailing_bytes_begin_a_request() -> None:
    connection = ControlConnection()
    assert feed(connection, [(bytes.fromhex("00000001 000000"), ())]) == [Received(m.GetCapability())]
    assert connection.partial
    assert connection.declared_size == 4
    assert feed(connection, [(b"\x0e", ())]) == [Received(m.Stop())]


@pytest.mark.parametrize("code", ["00000000", "00000014", "ffffffff", "01000000", "00000101"])
def test_unknown_code_is_rejected_with_all_that_follows(code: str) -> None:
    connection = ControlConnection()
    (event,) = feed(connection, [(bytes.fromhex(code) + b"\0\0\0\1", ())])
    assert isinstance(event, Rejected)
    assert (event.result, event.close) == (TpmResult.BAD_ORDINAL, False)
    assert code in event.reason
    assert not connection.partial
    assert feed(connection, [(b"\0\0\0\1", ())]) == [Received(m.GetCapability())]


def test_unknown_code_in_pieces_is_rejected_when_it_is_whole() -> None:
    connection = ControlConnection()
    assert feed(connection, [(b"\0\0\0\1\0\0", ())]) == [Received(m.GetCapability())]
    (event,) = feed(connection, [(b"\0\xff", ())])
    assert isinstance(event, Rejected)


HASH_DATA, SET_STATEBLOB = b"\0\0\0\7", b"\0\0\0\x0d\0\0\0\0\0\0\0\1"


@pytest.mark.parametrize(
    ("head", "limit", "result"),
    [(HASH_DATA, MAX_HASH_DATA, TpmResult.SIZE), (SET_STATEBLOB, MAX_STATE_BLOB, TpmResult.FAIL)],
)
def test_too_long_is_rejected_at_once_and_closes(head: bytes, limit: int, result: TpmResult) -> None:
    for excess in (limit + 1, 0xFFFFFFFF):
        connection = ControlConnection()
        (event,) = feed(connection, single(head + excess.to_bytes(4, "big")))
        assert isinstance(event, Rejected)
        assert (event.result, event.close) == (result, True)
        assert connection.closed
        assert not connection.partial
        assert feed(connection, [(b"\0\0\0\1", ())]) == []
    connection = ControlConnection()
    assert feed(connection, single(head + limit.to_bytes(4, "big"))) == []
    assert connection.declared_size == len(head) + 4 + limit <= MAX_REQUEST


def test_longest_state_blob_in_pieces() -> None:
    data = bytes(range(256)) * (MAX_STATE_BLOB // 256)
    request = m.SetStateBlob(m.StateFlag(0), 1, data)
    connection = ControlConnection()
    whole = m.encode_request(request) + b"\0\0\0\x0e"
    pieces = [(piece, ()) for piece in cut(whole, range(16, len(whole), 4099))]
    assert feed(connection, pieces) == [Received(request), Received(m.Stop())]


def test_memory_follows_what_arrived_not_what_was_declared() -> None:
    tracemalloc.start()
    try:
        connection = ControlConnection()
        connection.receive(HASH_DATA + MAX_HASH_DATA.to_bytes(4, "big") + bytes(1000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert connection.partial
    assert peak < 100_000


def test_receive_larger_than_meant() -> None:
    connection = ControlConnection()
    connection.receive(bytes(MAX_REQUEST + MAX_RECEIVE + 1))
    (event,) = events_of(connection)
    assert isinstance(event, Rejected)
    assert (event.result, event.close) == (TpmResult.SIZE, True)


def test_end_of_stream() -> None:
    connection = ControlConnection()
    connection.receive(b"\0\0\0\1\0\0\0\7\0\0")
    assert connection.declared_size == 8
    connection.end_of_stream()
    assert not connection.partial
    assert events_of(connection) == [Received(m.GetCapability())]
    assert feed(connection, [(b"\0\0\0\1", ()), (b"\0\0", ())]) == []
    assert not connection.partial


def test_declared_size_grows_only_once_the_count_is_whole() -> None:
    connection = ControlConnection()
    sizes = []
    for piece, _ in single(HASH_DATA + b"\0\1\0\0"):
        connection.receive(piece)
        sizes.append(connection.declared_size)
    assert sizes == [4, 4, 4, 8, 8, 8, 8, 8 + 0x10000]


STREAMS = st.lists(
    st.tuples(st.sampled_from(SAMPLES), st.sampled_from([b"", b"abc", b"\0\0\0", b"\0\0\1"])), max_size=8
)


@given(STREAMS, st.lists(st.integers(0, 400)))
def test_cuts_change_nothing(stream: list[tuple[tuple[bytes, m.Request], bytes]], places: list[int]) -> None:
    """Any requests, padded or not, cut anywhere; a read that brings a descriptor ends with its request, as in Linux."""
    data, expected, with_descriptor = b"", [], []
    for (piece, request), padding in stream:
        if isinstance(request, m.SetDataFd):
            with_descriptor.append(len(data))
        data += piece + (padding if BY_REQUEST[type(request)].padded else b"")
        expected.append(Received(request))
    ends = [start + 4 for start in with_descriptor]
    pieces, position = [], 0
    for piece in cut(data, places + ends):
        brings = any(position <= start < position + len(piece) for start in with_descriptor)
        pieces.append((piece, (FD,) if brings else ()))
        position += len(piece)
    connection = ControlConnection()
    assert feed(connection, pieces) == expected
    assert connection.unclaimed_fds() == ()
    assert not connection.partial
    assert feed_frozen(pieces) == expected


def feed_frozen(pieces: Iterable[tuple[bytes, Sequence[int]]]) -> list[Event]:
    """The events of the same reads by connections that are frozen and thawed after each, before anybody looks."""
    connection = ControlConnection()
    for data, fds in pieces:
        connection.receive(data, fds)
        assert connection.unclaimed_fds() == ()
        frozen = connection.freeze()
        assert connection.abandon() == ()
        connection = ControlConnection.thaw(frozen)
    return events_of(connection)


LIKELY = st.one_of(st.binary(max_size=12), st.sampled_from([data for data, _ in SAMPLES]))


@given(st.lists(LIKELY, max_size=10).map(b"".join), st.lists(st.integers(0, 200)))
def test_any_bytes_give_events_and_nothing_else(data: bytes, places: list[int]) -> None:
    connection = ControlConnection()
    events: list[Event] = []
    for piece in cut(data, places):
        connection.receive(piece)
        events += events_of(connection)
        assert connection.partial == (connection.declared_size > 0)
        assert connection.closed == any(isinstance(event, Rejected) and event.close for event in events)
    for event in events:
        if isinstance(event, Received):
            assert m.encode_request(event.request) in data
        else:
            assert event.result in (TpmResult.BAD_ORDINAL, TpmResult.BAD_PARAMETER, TpmResult.FAIL, TpmResult.SIZE)
