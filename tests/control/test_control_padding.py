"""Behind SET_LOCALITY and RESET_TPMESTABLISHED: three bytes of any value, or none, cut anywhere."""

from __future__ import annotations

import itertools

import pytest

from crbd.control import messages as m
from crbd.control.connection import ControlConnection, Received

from .feeding import cut, feed
from .samples import FD, REQUESTS

PADDED: list[tuple[bytes, m.Request]] = [
    (b"\0\0\0\x05\x02", m.SetLocality(2)),
    (b"\0\0\0\x0b\x00", m.ResetTpmEstablished(0)),
]
PADDINGS = [b"", b"\0\0\0", b"\0\0\1", b"\0\0\x05", b"\0\1\0", b"\1\0\0", b"\0\0\xff", b"\xff\xff\xff", b"\x05\x0b\x10"]
each_padded = pytest.mark.parametrize(("data", "request_"), PADDED, ids=lambda value: type(value).__name__)


@each_padded
@pytest.mark.parametrize("padding", PADDINGS, ids=bytes.hex)
def test_every_cut_before_every_command(data: bytes, request_: m.Request, padding: bytes) -> None:
    """Every set of cuts from the locality byte to the end of the next code; a descriptor comes with its first byte."""
    for text, following in REQUESTS:
        stream = data + padding + bytes.fromhex(text)
        start = len(data) + len(padding)
        places = range(len(data), start + 4)
        for count in range(len(places) + 1):
            for chosen in itertools.combinations(places, count):
                pieces = with_descriptor(cut(stream, chosen), start, following)
                connection = ControlConnection()
                assert feed(connection, pieces) == [Received(request_), Received(following)], (chosen, text)
                assert connection.unclaimed_fds() == ()
                assert not connection.partial


def with_descriptor(pieces: list[bytes], start: int, request: m.Request) -> list[tuple[bytes, tuple[int, ...]]]:
    """The pieces; the one that holds byte `start` brings the descriptor if the request has one."""
    fed: list[tuple[bytes, tuple[int, ...]]] = []
    position = 0
    for piece in pieces:
        brings = position <= start < position + len(piece) and isinstance(request, m.SetDataFd)
        fed.append((piece, (FD,) if brings else ()))
        position += len(piece)
    return fed


@each_padded
def test_all_values_of_padding(data: bytes, request_: m.Request) -> None:
    """Each of the three bytes takes every value, beside zeros and beside the bytes of codes."""
    for index, value, others in itertools.product(range(3), range(256), (b"\0\0\0", b"\0\0\x05", b"\x0b\xff\1")):
        padding = others[:index] + bytes([value]) + others[index + 1 :]
        connection = ControlConnection()
        events = feed(connection, [(data, ()), (padding + b"\0\0\0\x0e", ())])
        assert events == [Received(request_), Received(m.Stop())], padding


@each_padded
def test_request_comes_with_its_first_byte_and_padding_is_no_stall(data: bytes, request_: m.Request) -> None:
    for padding in PADDINGS:
        connection = ControlConnection()
        assert feed(connection, [(data, ())]) == [Received(request_)]
        for size in range(len(padding)):
            assert feed(connection, [(padding[size : size + 1], ())]) == []
            assert not connection.partial
            assert connection.declared_size == 0


@each_padded
def test_fourth_byte_begins_a_request_that_may_stall(data: bytes, request_: m.Request) -> None:
    connection = ControlConnection()
    assert feed(connection, [(data + b"\0\0\0\0", ())]) == [Received(request_)]
    assert connection.partial
    assert feed(connection, [(b"\0\0\x0e", ())]) == [Received(m.Stop())]


@each_padded
def test_padded_requests_in_a_row(data: bytes, request_: m.Request) -> None:
    for padding in PADDINGS:
        connection = ControlConnection()
        assert feed(connection, [((data + padding) * 5, ())]) == [Received(request_)] * 5
