"""What one end reads off the wire and writes onto it: headers, replies, and what a connection asks of its owner.

The owner gets events. `Reply` is a message answered already: send it. The others are what only the owner can do, and
each makes its own reply of what came of it; none where the client wants none (No_reply).
"""

from __future__ import annotations

from typing import NamedTuple

from crbd.vfiouser.spec import (
    ERROR,
    HEADER,
    HEADER_SIZE,
    NO_REPLY,
    REGION_ACCESS,
    REGISTERS,
    REPLY,
    Errno,
)


class Head(NamedTuple):
    """A request's header, without the size."""

    ident: int
    command: int
    flags: int

    def reply(self, body: bytes = b"") -> bytes:
        """The whole reply, empty where none is wanted."""
        if self.flags & NO_REPLY:
            return b""
        return HEADER.pack(self.ident, self.command, HEADER_SIZE + len(body), REPLY, 0) + body

    def failure(self, errno: Errno) -> bytes:
        """The whole error reply, empty where none is wanted."""
        if self.flags & NO_REPLY:
            return b""
        return HEADER.pack(self.ident, self.command, HEADER_SIZE, REPLY | ERROR, errno)


class Reply(NamedTuple):
    """Send `data`, which may be empty; with `descriptor` the data buffer's descriptor goes along."""

    data: bytes
    descriptor: bool = False


class ReadRegisters(NamedTuple):
    """Read `size` bytes (0 or more) at `offset` of BAR 0, all of them within it."""

    head: Head
    offset: int
    size: int

    def reply(self, data: bytes) -> bytes:
        """To be sent with what was read."""
        return self.head.reply(REGION_ACCESS.pack(self.offset, REGISTERS, len(data)) + data)


class WriteRegisters(NamedTuple):
    """Write into BAR 0, in this order; all of it is within. `reply` is to be sent before the TPM executes anything."""

    writes: tuple[tuple[int, bytes], ...]
    """Offset and bytes of each."""
    reply: bytes


class Move(NamedTuple):
    """The client wrote config space. BAR 0 is at the guest-physical address `base` now; then do `writes`, if any."""

    base: int
    writes: tuple[tuple[int, bytes], ...]
    reply: bytes


class Reset(NamedTuple):
    """Reset TPM and registers; BAR 0 is at 0 then. Reply when that is done."""

    head: Head


class Close(NamedTuple):
    """The peer does not speak the protocol: send `data`, which may be empty, and close."""

    data: bytes
    reason: str


Event = Reply | ReadRegisters | WriteRegisters | Move | Reset | Close
