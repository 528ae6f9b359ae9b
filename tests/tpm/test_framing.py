"""The data channel's framing: one table, fed whole, byte by byte, several at once and with trailing bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.tpm.codes import ResponseCode, StartupType
from crbd.tpm.framing import Command, DataConnection, Malformed
from crbd.tpm.head import command_code, error_response, response_code, shutdown_command, startup_command

LIMIT = 4096
GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0010".replace(" ", ""))
TPM_1_2 = bytes.fromhex("00c1 0000000a 00000054".replace(" ", ""))
LARGEST = bytes.fromhex("8002") + LIMIT.to_bytes(4, "big") + bytes(LIMIT - 6)
WRONG_SIZE = error_response(ResponseCode.COMMAND_SIZE)


def with_header(command: bytes, locality: int = 0) -> bytes:
    return bytes.fromhex("00000008") + bytes([locality]) + len(command).to_bytes(4, "big") + command


def received(connection: DataConnection, data: bytes) -> tuple[Command | Malformed, ...]:
    """Feed one read, and fetch all that it completes."""
    connection.receive(data)
    return tuple(iter(connection.next_event, None))


@dataclass(frozen=True)
class Row:
    name: str
    sent: bytes
    event: Command | Malformed


GOOD = [
    Row("plain", GET_RANDOM, Command(GET_RANDOM, None)),
    Row(
        "shortest",
        GET_RANDOM[:5] + b"\x0a" + GET_RANDOM[6:10],
        Command(GET_RANDOM[:5] + b"\x0a" + GET_RANDOM[6:10], None),
    ),
    Row("largest", LARGEST, Command(LARGEST, None)),
    Row("TPM 1.2's tag is left to the engine", TPM_1_2, Command(TPM_1_2, None)),
    Row("with header", with_header(GET_RANDOM), Command(GET_RANDOM, 0)),
    Row("with header, locality 3", with_header(GET_RANDOM, 3), Command(GET_RANDOM, 3)),
    Row("with header, a locality that does not exist", with_header(GET_RANDOM, 255), Command(GET_RANDOM, 255)),
    Row("with header, largest", with_header(LARGEST), Command(LARGEST, 0)),
]
FRAMED_WRONG_SIZE = (10).to_bytes(4, "big") + WRONG_SIZE + bytes(4)
BAD = [
    Row("size 0", bytes.fromhex("8001000000000000017b"), Malformed(WRONG_SIZE, close=False)),
    Row("size 9", bytes.fromhex("8001000000090000017b"), Malformed(WRONG_SIZE, close=False)),
    Row("size over the limit", bytes.fromhex("8001000010010000017b"), Malformed(WRONG_SIZE, close=True)),
    Row("size of 4 GiB", bytes.fromhex("8001ffffffff0000017b"), Malformed(WRONG_SIZE, close=True)),
    Row("header, size 9", with_header(GET_RANDOM[:9]), Malformed(FRAMED_WRONG_SIZE, close=False)),
    Row(
        "header, size over the limit", bytes.fromhex("000000080000001001 80"), Malformed(FRAMED_WRONG_SIZE, close=True)
    ),
]


DISAGREEING = bytes.fromhex("0000000800") + (11).to_bytes(4, "big") + GET_RANDOM[:11]


def test_a_header_that_disagrees_with_its_command_costs_that_command_alone() -> None:
    connection = DataConnection(LIMIT)
    assert received(connection, DISAGREEING + GET_RANDOM) == (
        Malformed(FRAMED_WRONG_SIZE, close=False),
        Command(GET_RANDOM, None),
    )


def ids(row: Row) -> str:
    return row.name


@pytest.mark.parametrize("row", GOOD + BAD, ids=ids)
def test_whole(row: Row) -> None:
    connection = DataConnection(LIMIT)
    assert received(connection, row.sent) == (row.event,)
    assert not connection.partial


@pytest.mark.parametrize("row", GOOD, ids=ids)
def test_byte_by_byte(row: Row) -> None:
    connection = DataConnection(LIMIT)
    for i in range(len(row.sent) - 1):
        assert received(connection, row.sent[i : i + 1]) == ()
        assert connection.partial
    assert received(connection, row.sent[-1:]) == (row.event,)
    assert not connection.partial


@pytest.mark.parametrize("row", GOOD, ids=ids)
def test_two_in_one_read_and_a_third_begun(row: Row) -> None:
    connection = DataConnection(LIMIT)
    assert received(connection, row.sent + row.sent + row.sent[:7]) == (row.event, row.event)
    assert connection.partial
    assert received(connection, row.sent[7:]) == (row.event,)


@pytest.mark.parametrize("row", BAD, ids=ids)
def test_after_a_lying_size_the_rest_of_the_read_is_dropped(row: Row) -> None:
    connection = DataConnection(LIMIT)
    assert received(connection, row.sent + b"whatever") == (row.event,)
    assert not connection.partial
    assert isinstance(row.event, Malformed)
    expected = () if row.event.close else (Command(GET_RANDOM, None),)
    assert received(connection, GET_RANDOM) == expected


def test_a_stalled_command_is_answered_in_its_own_framing_and_ends_the_connection() -> None:
    plain, prefixed = DataConnection(LIMIT), DataConnection(LIMIT)
    received(plain, GET_RANDOM[:-1])
    received(prefixed, with_header(GET_RANDOM)[:-1])
    assert plain.stalled() == Malformed(WRONG_SIZE, close=True)
    assert prefixed.stalled() == Malformed(FRAMED_WRONG_SIZE, close=True)
    assert received(plain, GET_RANDOM) == ()


def test_framing_of_responses() -> None:
    response = error_response(ResponseCode.FAILURE)
    assert response == bytes.fromhex("80010000000a00000101")
    assert Command(GET_RANDOM, None).frame(response) == response
    assert Command(GET_RANDOM, 0).frame(response) == bytes.fromhex("0000000a") + response + bytes(4)


def test_commands_of_our_own() -> None:
    assert startup_command(StartupType.CLEAR) == bytes.fromhex("80010000000c000001440000")
    assert shutdown_command(StartupType.STATE) == bytes.fromhex("80010000000c000001450001")


def test_codes_of_truncated_heads() -> None:
    assert command_code(GET_RANDOM) == 0x17B
    assert command_code(GET_RANDOM[:9]) is None
    assert response_code(b"") is None


commands = st.builds(
    lambda body, tag: tag + (len(body) + 10).to_bytes(4, "big") + b"\0\0\1\x7b" + body,
    st.binary(max_size=40),
    st.sampled_from([b"\x80\x01", b"\x80\x02", b"\x00\xc1"]),
)
frames = st.one_of(commands, st.builds(with_header, commands, st.integers(0, 255)))


@given(st.lists(frames, max_size=6), st.data())
def test_the_cut_of_the_stream_does_not_matter(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(sent)
    whole = received(DataConnection(LIMIT), stream)
    assert len(whole) == len(sent)
    cut = DataConnection(LIMIT)
    seen: list[Command | Malformed] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        if data.draw(st.booleans()):
            cut = DataConnection(LIMIT, cut.held)  # frozen and taken up by another
        seen += received(cut, stream[:size])
        stream = stream[size:]
    assert tuple(seen) == whole


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_no_bytes_raise_and_memory_is_bounded(reads: list[bytes]) -> None:
    connection = DataConnection(LIMIT)
    for read in reads:
        for event in received(connection, read):
            if isinstance(event, Command):
                assert 10 <= len(event.body) <= LIMIT
    assert connection.partial in (True, False)
