"""A client of swtpm's control channel: one request, one reply, blocking. Everything is big-endian.

A reply starts with `u32 result`; a reply to a request that failed is nothing but that. Only GET_STATEBLOB is
always answered with the whole head, as long as the TPM runs (swtpm's ctrlchannel.c).
"""

from __future__ import annotations

import socket
import struct

SUCCESS = 0x000
BAD_ORDINAL = 0x00A
IO_ERROR = 0x01F

GET_CAPABILITY = 0x01
INIT = 0x02
GET_TPMESTABLISHED = 0x04
SET_LOCALITY = 0x05
HASH_START = 0x06
HASH_DATA = 0x07
HASH_END = 0x08
CANCEL_TPM_CMD = 0x09
STORE_VOLATILE = 0x0A
GET_STATEBLOB = 0x0C
STOP = 0x0E
GET_CONFIG = 0x0F
SET_DATAFD = 0x10
SET_BUFFERSIZE = 0x11
GET_INFO = 0x12

REPLY_SIZES = {GET_CAPABILITY: 4, GET_TPMESTABLISHED: 4, GET_CONFIG: 4, SET_BUFFERSIZE: 12}
"""Bytes that follow the result in a successful reply; 0 where not listed, unless in `_LENGTH_AT`."""

_LENGTH_AT = {GET_STATEBLOB: (12, 8), GET_INFO: (8, 4)}
"""Bytes of the fixed part behind the result, and where in it the u32 length of the data behind it is."""


def request(command: int, body: bytes = b"") -> bytes:
    """One whole request."""
    return struct.pack(">I", command) + body


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Read `size` bytes. Raises ConnectionError when the peer closes before that."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError(f"closed after {len(data)} of {size} bytes")
        data += piece
    return data


def read_reply(connection: socket.socket, command: int) -> tuple[int, bytes]:
    """The reply to a request of `command`: result and what follows it. Raises ConnectionError when the peer closes."""
    result = int.from_bytes(read_exactly(connection, 4), "big")
    has_head = command == GET_STATEBLOB and result != BAD_ORDINAL
    if result != SUCCESS and not has_head:
        return result, b""
    if command not in _LENGTH_AT:
        return result, read_exactly(connection, REPLY_SIZES.get(command, 0))
    size, length_at = _LENGTH_AT[command]
    fixed = read_exactly(connection, size)
    if result != SUCCESS:
        return result, fixed
    return result, fixed + read_exactly(connection, int.from_bytes(fixed[length_at : length_at + 4], "big"))


def ask(connection: socket.socket, command: int, body: bytes = b"") -> tuple[int, bytes]:
    """Send a request and read its reply."""
    connection.sendall(request(command, body))
    return read_reply(connection, command)
