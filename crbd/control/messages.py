"""Requests and replies of the control channel, to bytes and back, by the layouts of `crbd.control.spec`."""

from __future__ import annotations

from collections.abc import Callable

from crbd.control.replies import (
    BufferSizes,
    Capabilities,
    Capability,
    Config,
    ConfigFlag,
    Done,
    Established,
    Failure,
    Info,
    Outcome,
    Registers,
    Reply,
    Snapshot,
    StateBlob,
)
from crbd.control.requests import (
    CancelTpmCmd,
    GetCapability,
    GetConfig,
    GetInfo,
    GetRegisters,
    GetStateBlob,
    GetTpmEstablished,
    HashData,
    HashEnd,
    HashStart,
    Init,
    InitFlag,
    LockStorage,
    Request,
    ResetTpmEstablished,
    Restore,
    RestoreFlag,
    SetBufferSize,
    SetDataFd,
    SetLocality,
    SetStateBlob,
    Shutdown,
    StateFlag,
    Stop,
    StoreVolatile,
    TakeSnapshot,
    Upgrade,
)
from crbd.control.spec import (
    BY_REQUEST,
    CODE_SIZE,
    COUNT_SIZE,
    REPLY_BODIES,
    RESULT_SIZE,
    Command,
    Data,
    Layout,
    Number,
)
from crbd.errors import WireError
from crbd.tpm.results import TpmResult
from crbd.wire.reader import Reader

__all__ = [
    "BufferSizes",
    "CancelTpmCmd",
    "Capabilities",
    "Capability",
    "Config",
    "ConfigFlag",
    "Done",
    "Established",
    "Failure",
    "GetCapability",
    "GetConfig",
    "GetInfo",
    "GetRegisters",
    "GetStateBlob",
    "GetTpmEstablished",
    "HashData",
    "HashEnd",
    "HashStart",
    "Info",
    "Init",
    "InitFlag",
    "LockStorage",
    "Outcome",
    "Registers",
    "Reply",
    "Request",
    "ResetTpmEstablished",
    "Restore",
    "RestoreFlag",
    "SetBufferSize",
    "SetDataFd",
    "SetLocality",
    "SetStateBlob",
    "Shutdown",
    "Snapshot",
    "StateBlob",
    "StateFlag",
    "Stop",
    "StoreVolatile",
    "TakeSnapshot",
    "Upgrade",
    "decode_reply",
    "decode_request",
    "encode_reply",
    "encode_request",
    "refuse",
]


def refuse(request: type[Request], result: int) -> Failure | StateBlob:
    """The reply that refuses a request of this class with the TPM_RESULT `result` (not 0)."""
    return StateBlob(result) if BY_REQUEST[request].whole_head else Failure(result)


def encode_request(request: Request) -> bytes:
    """The request's bytes, code and body; of SET_DATAFD the four bytes with which the descriptor is to be sent along.

    Raises ValueError for a value that its field cannot hold.
    """
    command = BY_REQUEST[type(request)]
    return command.code.to_bytes(CODE_SIZE, "big") + _encode(command.body, request)


def decode_request(command: Command, body: bytes, fd: int = -1) -> Request:
    """The request of `command` from exactly its body, without the code; SET_DATAFD's from the descriptor sent along.

    Raises WireError for a body that is not exactly one of this command.
    """
    if command.request is SetDataFd:
        Reader(body).expect_end()
        return SetDataFd(fd)
    reader = Reader(body)
    values = _decode(command.body, reader)
    reader.expect_end()
    make: Callable[..., Request] = command.request
    return make(**values)


def encode_reply(reply: Reply) -> bytes:
    """The reply's bytes, result and body. Raises ValueError for a value that its field cannot hold."""
    result = reply.result if isinstance(reply, Failure | StateBlob) else TpmResult.SUCCESS
    head = _number("result", result, RESULT_SIZE)
    return head if isinstance(reply, Failure) else head + _encode(REPLY_BODIES[type(reply)], reply)


def decode_reply(request: type[Request], data: bytes) -> Reply:
    """The reply to a request of this class from exactly its bytes. For a stream see `crbd.control.client`.

    A refusal is 4 bytes; that of GET_STATEBLOB is a whole head, but from swtpm whose TPM is not running 4 bytes too:
    both are read. Raises WireError for bytes that are not exactly one reply.
    """
    command = BY_REQUEST[request]
    reader = Reader(data)
    result = reader.u32_be()
    if result and not (command.whole_head and reader.remaining):
        reader.expect_end()
        return Failure(result)
    values = _decode(command.reply_body, reader)
    reader.expect_end()
    make: Callable[..., Reply] = command.reply
    return make(result, **values) if command.reply is StateBlob else make(**values)


def _encode(layout: Layout, message: Request | Reply) -> bytes:
    pieces: list[bytes] = []
    for field in layout.fields:
        match field:
            case Number(name, size):
                pieces.append(_number(name, getattr(message, name), size))
            case Data(name, limit):
                data: bytes = getattr(message, name)
                if len(data) > limit:
                    raise ValueError(f"{name} of {len(data)} bytes is longer than {limit}")
                pieces += [len(data).to_bytes(COUNT_SIZE, "big"), data]
            case unused:
                pieces.append(bytes(unused.size))
    return b"".join(pieces)


def _number(name: str, value: int, size: int) -> bytes:
    if not 0 <= value < 1 << 8 * size:
        raise ValueError(f"{name} {value} does not fit into {size} bytes")
    return value.to_bytes(size, "big")


def _decode(layout: Layout, reader: Reader) -> dict[str, int | bytes]:
    values: dict[str, int | bytes] = {}
    for field in layout.fields:
        match field:
            case Number(name, size, convert):
                values[name] = convert(int.from_bytes(reader.take(size), "big"))
            case Data(name, limit):
                count = reader.u32_be()
                if count > limit:
                    raise WireError(f"{name} of {count} bytes is longer than {limit}")
                values[name] = reader.take(count)
            case unused:
                reader.take(unused.size)
    return values
