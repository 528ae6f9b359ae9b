"""Requests and replies to bytes and back: the table both ways, refusals, caps, and round trips of anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.control import messages as m
from crbd.control.spec import (
    BY_CODE,
    BY_REQUEST,
    CAPABILITIES,
    COMMANDS,
    MAX_INFO,
    MAX_STATE_BLOB,
    Command,
    Needs,
)
from crbd.errors import WireError
from crbd.tpm.results import TpmResult

from .samples import FD, REPLIES, REQUESTS

U32 = st.integers(0, 0xFFFFFFFF)
U8 = st.integers(0, 255)
STATE_FLAGS = st.builds(m.StateFlag, U32)
ANY_REQUEST: st.SearchStrategy[m.Request] = st.one_of(
    st.builds(m.GetCapability),
    st.builds(m.Init, st.builds(m.InitFlag, U32)),
    st.builds(m.Shutdown),
    st.builds(m.GetTpmEstablished),
    st.builds(m.SetLocality, U8),
    st.builds(m.HashStart),
    st.builds(m.HashData, st.binary()),
    st.builds(m.HashEnd),
    st.builds(m.CancelTpmCmd),
    st.builds(m.StoreVolatile),
    st.builds(m.ResetTpmEstablished, U8),
    st.builds(m.GetStateBlob, STATE_FLAGS, U32, U32),
    st.builds(m.SetStateBlob, STATE_FLAGS, U32, st.binary()),
    st.builds(m.Stop),
    st.builds(m.GetConfig),
    st.builds(m.SetDataFd, st.just(FD)),
    st.builds(m.SetBufferSize, U32),
    st.builds(m.GetInfo, st.integers(0, (1 << 64) - 1), U32),
    st.builds(m.LockStorage, U32),
    st.builds(m.TakeSnapshot),
    st.builds(m.Restore, st.builds(m.RestoreFlag, U32), st.binary()),
)
ANY_REPLY: st.SearchStrategy[tuple[type[m.Request], m.Reply]] = st.one_of(
    st.tuples(st.just(m.Stop), st.just(m.Done())),
    st.tuples(st.just(m.Stop), st.builds(m.Failure, st.integers(1, 0xFFFFFFFF))),
    st.tuples(st.just(m.GetCapability), st.builds(m.Capabilities, st.builds(m.Capability, U32))),
    st.tuples(st.just(m.GetTpmEstablished), st.builds(m.Established, U8)),
    st.tuples(st.just(m.GetStateBlob), st.builds(m.StateBlob, U32, STATE_FLAGS, U32, st.binary())),
    st.tuples(st.just(m.GetConfig), st.builds(m.Config, st.builds(m.ConfigFlag, U32))),
    st.tuples(st.just(m.SetBufferSize), st.builds(m.BufferSizes, U32, U32, U32)),
    st.tuples(st.just(m.TakeSnapshot), st.builds(m.Snapshot, st.booleans(), st.binary())),
    st.tuples(st.just(m.Restore), st.builds(m.Outcome, st.booleans(), st.binary())),
    st.tuples(st.just(m.GetInfo), st.builds(m.Info, U32, st.binary(max_size=MAX_INFO))),
)


def decode(data: bytes) -> m.Request:
    return m.decode_request(BY_CODE[int.from_bytes(data[:4], "big")], data[4:], FD)


@pytest.mark.parametrize(("text", "request_"), REQUESTS)
def test_request_both_ways(text: str, request_: m.Request) -> None:
    data = bytes.fromhex(text)
    assert m.encode_request(request_) == data
    assert decode(data) == request_


@pytest.mark.parametrize(("text", "request_"), REQUESTS)
def test_request_of_another_size(text: str, request_: m.Request) -> None:
    data = bytes.fromhex(text)
    with pytest.raises(WireError):
        decode(data + b"\0")
    for size in range(4, len(data)):
        with pytest.raises(WireError):
            decode(data[:size])


@pytest.mark.parametrize(("kind", "text", "reply"), REPLIES)
def test_reply_both_ways(kind: type[m.Request], text: str, reply: m.Reply) -> None:
    data = bytes.fromhex(text)
    assert m.encode_reply(reply) == data
    assert m.decode_reply(kind, data) == reply


@pytest.mark.parametrize(("kind", "text", "reply"), REPLIES)
def test_reply_of_another_size(kind: type[m.Request], text: str, reply: m.Reply) -> None:
    data = bytes.fromhex(text)
    with pytest.raises(WireError):
        m.decode_reply(kind, data + b"\0")
    bare_result = 4 if kind is m.GetStateBlob and any(data[:4]) else -1
    for size in set(range(len(data))) - {bare_result}:
        with pytest.raises(WireError):
            m.decode_reply(kind, data[:size])


@given(ANY_REQUEST)
def test_any_request_survives(request_: m.Request) -> None:
    assert decode(m.encode_request(request_)) == request_


@given(ANY_REPLY)
def test_any_reply_survives(sample: tuple[type[m.Request], m.Reply]) -> None:
    kind, reply = sample
    assert m.decode_reply(kind, m.encode_reply(reply)) == reply


@given(st.sampled_from([command.request for command in COMMANDS]), st.binary(max_size=40))
def test_any_bytes_are_a_reply_or_a_wire_error(kind: type[m.Request], data: bytes) -> None:
    try:
        reply = m.decode_reply(kind, data)
    except WireError:
        return
    assert len(m.encode_reply(reply)) == len(data)


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_refusal_is_4_bytes_but_that_of_get_stateblob_16(command: Command) -> None:
    refusal = m.encode_reply(m.refuse(command.request, TpmResult.BAD_ORDINAL))
    assert refusal[:4] == b"\0\0\0\x0a"
    assert refusal[4:] == bytes(12 if command.request is m.GetStateBlob else 0)


def test_get_stateblob_refused_with_4_bytes_is_understood() -> None:
    assert m.decode_reply(m.GetStateBlob, b"\0\0\0\x0a") == m.Failure(10)


@pytest.mark.parametrize(
    "message",
    [
        m.SetLocality(256),
        m.SetLocality(-1),
        m.SetBufferSize(1 << 32),
        m.GetInfo(1 << 64),
        m.SetStateBlob(m.StateFlag(0), 1, bytes(MAX_STATE_BLOB + 1)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_request_that_does_not_fit(message: m.Request) -> None:
    with pytest.raises(ValueError, match=r"fit|longer"):
        m.encode_request(message)


@pytest.mark.parametrize("reply", [m.Failure(1 << 32), m.Failure(-1), m.Info(1, bytes(MAX_INFO + 1))])
def test_reply_that_does_not_fit(reply: m.Reply) -> None:
    with pytest.raises(ValueError, match=r"fit|longer"):
        m.encode_reply(reply)


def test_reply_that_declares_too_much() -> None:
    head = bytes.fromhex("00000000 00000000 00000001") + (MAX_STATE_BLOB + 1).to_bytes(4, "big")
    with pytest.raises(WireError):
        m.decode_reply(m.GetStateBlob, head + bytes(MAX_STATE_BLOB + 1))


def test_table_is_whole() -> None:
    swtpms = [command for command in COMMANDS if not command.extension]
    assert [command.code for command in swtpms] == list(range(1, 20))
    assert [command.code for command in COMMANDS if command.extension] == [0xC0, 0xC1, 0xC2, 0xC3]
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)
    assert set(BY_REQUEST) == {type(request) for _, request in REQUESTS}
    assert CAPABILITIES == 0x1FFFF
    assert all(command.capability or command.request is m.GetCapability for command in swtpms)


def test_every_code_allows_padding_to_be_told_apart() -> None:
    """The padding rule of the connection rests on it: first byte 0, last byte not 0."""
    assert all(0 < command.code < 256 for command in COMMANDS)


def test_sequencing() -> None:
    def rows(needs: Needs) -> set[str]:
        return {command.name for command in COMMANDS if command.needs is needs}

    assert rows(Needs.STOPPED) == {"SET_STATEBLOB"}
    assert rows(Needs.RUNNING) == {
        *("GET_TPMESTABLISHED", "RESET_TPMESTABLISHED", "HASH_START", "HASH_DATA", "HASH_END"),
        *("CANCEL_TPM_CMD", "STORE_VOLATILE", "GET_STATEBLOB"),
    }
    at_once = {command.name for command in COMMANDS if command.while_executing}
    assert at_once == {
        *("GET_CAPABILITY", "CANCEL_TPM_CMD", "GET_CONFIG", "SET_DATAFD", "GET_REGISTERS", "UPGRADE"),
    }
