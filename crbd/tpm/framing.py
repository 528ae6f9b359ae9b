"""The data channel: TPM commands in a byte stream, sans-IO.

Theory. The stream holds commands back to back. A command begins in one of two ways, told apart by its first four
bytes, command by command:

    u16 tag, u32 size, u32 code, ...                        plain: what QEMU and tcti-swtpm send
    u32 8, u8 locality, u32 size, then `size` bytes         with the "send command" header of the TPM 2.0 simulator

All big-endian. A plain command is answered by its response as it is; a command with the header by `u32 size`, the
response, and `u32 0`.

    BETWEEN --first bytes--> INSIDE --last byte--> BETWEEN      yields Command
    BETWEEN, INSIDE --size below 10--> BETWEEN                  yields Malformed(keep): what was received is dropped
    BETWEEN, INSIDE --size over the limit--> CLOSED             yields Malformed(close)
    INSIDE --last byte, header and command disagree--> BETWEEN  yields Malformed(keep): just this one is dropped
    INSIDE --`stalled()`--> CLOSED                              yields Malformed(close)

TPM commands carry no mark by which a reader could find the next one, so after a size that cannot be true there are
only two honest ways on: forget what has been received so far (the client waits for its answer before it sends more,
as all real ones do) or close. swtpm takes every read() for one command and lets libtpms find the lie:
TPM_RC_COMMAND_SIZE (0x142). The code here is the same; beyond swtpm, commands may arrive in pieces or several in one
read. A tag that is neither 8001 nor 8002 is not judged here: libtpms answers it with TPM_RC_BAD_TAG.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from crbd.tpm.codes import ResponseCode
from crbd.tpm.head import HEAD_SIZE, error_response

SEND_COMMAND: Final = b"\x00\x00\x00\x08"
"""MS_SIM's TPM_SEND_COMMAND, the first four bytes of a command with the send-command header."""

PREFIX_SIZE: Final = 9
"""Bytes in the send-command header: u32 8, u8 locality, u32 size."""

_ACKNOWLEDGE: Final = bytes(4)


class Command(NamedTuple):
    """One whole command. `locality` is the send-command header's (0 to 255, unchecked), None for a plain command."""

    body: bytes
    locality: int | None

    def frame(self, response: bytes) -> bytes:
        """The response as it goes onto the wire in answer to this command."""
        if self.locality is None:
            return response
        return b"".join((len(response).to_bytes(4, "big"), response, _ACKNOWLEDGE))


class Malformed(NamedTuple):
    """Bytes that are no command: answer with `answer`, and close the connection if `close`."""

    answer: bytes
    close: bool


class DataConnection:
    """The receiving half of one data connection.

    `limit` is the largest command in bytes, its head included (the engine's buffer size, without the send-command
    header).
    """

    __slots__ = ("_closed", "_limit", "_received")

    def __init__(self, limit: int, received: bytes = b"") -> None:
        """`received` is what another connection held when its client was taken from it."""
        self._limit = limit
        self._received = bytearray(received)
        self._closed = False

    @property
    def partial(self) -> bool:
        """Whether a command has begun and lacks bytes: the caller bounds how long it waits for them."""
        return bool(self._received)

    @property
    def held(self) -> bytes:
        """What has been received and has not become an event."""
        return bytes(self._received)

    def receive(self, data: bytes) -> None:
        """Take in bytes from the peer. Raises nothing, whatever they are."""
        if not self._closed:
            self._received += data

    def stalled(self) -> Malformed:
        """The rest of a partial command did not come in time: its size field was a lie, or the client is gone."""
        prefixed = self._received.startswith(SEND_COMMAND)
        return self._give_up(prefixed=prefixed, close=True)

    def next_event(self) -> Command | Malformed | None:
        """The next thing that what has been received completes, or None: more bytes are needed, or the end has come.

        What it is made of is no longer `held` then.
        """
        received = self._received
        if len(received) < HEAD_SIZE or self._closed:
            return None
        if received.startswith(SEND_COMMAND):
            start, size = PREFIX_SIZE, int.from_bytes(received[5:9], "big")
            locality: int | None = received[4]
        else:
            start, size = 0, int.from_bytes(received[2:6], "big")
            locality = None
        if size < HEAD_SIZE:
            return self._give_up(prefixed=locality is not None, close=False)
        if size > self._limit:
            return self._give_up(prefixed=locality is not None, close=True)
        end = start + size
        if len(received) < end:
            return None
        body = bytes(received[start:end])
        del received[:end]
        if start and int.from_bytes(body[2:6], "big") != size:
            return Malformed(Command(b"", locality).frame(error_response(ResponseCode.COMMAND_SIZE)), close=False)
        return Command(body, locality)

    def _give_up(self, *, prefixed: bool, close: bool) -> Malformed:
        self._received.clear()
        self._closed = close
        answer = error_response(ResponseCode.COMMAND_SIZE)
        return Malformed(Command(b"", 0 if prefixed else None).frame(answer), close)
