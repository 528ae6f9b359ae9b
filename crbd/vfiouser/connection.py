"""The server's end of one connection: bytes in, events out. No socket, no clock, no TPM.

Theory. The stream is a sequence of messages, each with its size in its header.

    NEW --VERSION--> OPEN          what is agreed on counts from now on
    NEW --anything else--> CLOSED
    OPEN --a command--> OPEN       one event each, in order; what is wrong with its body is answered with an errno
    any --a header that cannot be true--> CLOSED: a size below the header's or above the cap, or a reply, since this
                                   end never sends a command

Parsing is lazy: a message is taken off what was received when its event is asked for, not before. So what `freeze`
finds is either an event that its owner has dealt with, or bytes.

Descriptors play no part: whoever owns the socket asks the kernel for none (recv without room for them discards what a
client sends along), because a device without interrupts and without DMA has no use for any. The one that goes the other
way, the data buffer's, is the owner's; the connection says with which reply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from crbd.errors import ProtocolError, WireError
from crbd.vfiouser import answers
from crbd.vfiouser.answers import RefusedError
from crbd.vfiouser.capabilities import Capabilities, negotiate_untrusted
from crbd.vfiouser.configuration import INITIAL, Configuration
from crbd.vfiouser.messages import Close, Event, Head, Move, ReadRegisters, Reply, Reset, WriteRegisters
from crbd.vfiouser.spec import (
    COMMAND,
    CONFIGURATION,
    HEADER,
    HEADER_SIZE,
    MAX_MESSAGE,
    REGION_ACCESS,
    REGISTERS,
    TYPE_MASK,
    WRITE_COUNT,
    Errno,
    Message,
)

_READ: Final = int(Message.REGION_READ)
_WRITE: Final = int(Message.REGION_WRITE)
_ANSWERS: Final[dict[int, Callable[[bytes], bytes]]] = {
    Message.DMA_MAP: answers.dma_map,
    Message.DMA_UNMAP: answers.dma_unmap,
    Message.DEVICE_GET_INFO: answers.device_info,
    Message.DEVICE_GET_REGION_IO_FDS: answers.region_io_descriptors,
    Message.DEVICE_GET_IRQ_INFO: answers.irq_info,
    Message.DEVICE_SET_IRQS: answers.set_irqs,
}
"""What needs nothing but its own body."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A connection between two messages, or in the middle of one."""

    received: bytes = b""
    agreed: Capabilities | None = None
    """None before VERSION."""
    configuration: bytes = field(default=INITIAL, repr=False)


class Connection:
    """One client. `mappable`: the data buffer is memory that a client may map."""

    __slots__ = ("_agreed", "_closed", "_configuration", "_mappable", "_received")

    def __init__(self, snapshot: Snapshot | None = None, *, mappable: bool = True) -> None:
        """Go on where another connection stopped, if there is a snapshot. Raises ValueError for one that never was."""
        snapshot = snapshot or Snapshot()
        self._received = bytearray(snapshot.received)
        self._agreed = snapshot.agreed
        self._configuration = Configuration(snapshot.configuration)
        self._mappable = mappable
        self._closed = False

    @property
    def base(self) -> int:
        """The guest-physical address of BAR 0, 0 where it is not set."""
        return self._configuration.base

    def freeze(self) -> Snapshot:
        """Where another connection goes on."""
        space = self._configuration.read(0, len(INITIAL))
        return Snapshot(bytes(self._received), self._agreed, space)

    def receive(self, data: bytes) -> None:
        """Take in bytes from the client. Raises nothing, whatever they are. Fetch all events before the next."""
        if not self._closed:
            self._received += data

    def next_event(self) -> Event | None:
        """The next whole message's event, or None: more bytes are needed, or the end has come."""
        received = self._received
        if len(received) < HEADER_SIZE or self._closed:
            return None
        ident, command, size, flags, _ = HEADER.unpack_from(received)
        if not HEADER_SIZE <= size <= MAX_MESSAGE:
            return self._close(f"a message of {size} bytes")
        if flags & TYPE_MASK != COMMAND:
            return self._close(f"a message of type {flags & TYPE_MASK}, where only commands can come")
        if len(received) < size:
            return None
        body = bytes(received[HEADER_SIZE:size])
        del received[:size]
        head = Head(ident, command, flags)
        if self._agreed is None:
            return self._begin(head, body)
        try:
            return self._event(head, body)
        except RefusedError as refused:
            return Reply(head.failure(refused.errno))
        except WireError:
            return Reply(head.failure(Errno.EINVAL))

    def _begin(self, head: Head, body: bytes) -> Event:
        if head.command != Message.VERSION:
            return self._close(f"message {head.command} before the version", head.failure(Errno.EINVAL))
        try:
            self._agreed, answer = negotiate_untrusted(body)
        except ProtocolError as error:
            return self._close(str(error), head.failure(Errno.EINVAL))
        return Reply(head.reply(answer))

    def _event(self, head: Head, body: bytes) -> Event:
        """Raises RefusedError, WireError."""
        command = head.command
        if command == _READ:
            return self._read(head, body)
        if command == _WRITE:
            return self._write(head.reply(body[: REGION_ACCESS.size]), (answers.written(body),))
        if command == Message.REGION_WRITE_MULTI and self._agreed is not None and self._agreed.write_multiple:
            return self._write(head.reply(body[: WRITE_COUNT.size]), answers.all_written(body))
        if command == Message.DEVICE_RESET:
            self._configuration.reset()
            return Reset(head)
        if command == Message.DEVICE_GET_REGION_INFO:
            mappable = self._mappable and self._agreed is not None and self._agreed.takes_descriptors
            answer, with_descriptor = answers.region_info(body, mappable=mappable)
            reply = head.reply(answer)
            return Reply(reply, with_descriptor and bool(reply))
        if command in _ANSWERS:
            return Reply(head.reply(_ANSWERS[command](body)))
        raise RefusedError(Errno.EINVAL if command == Message.VERSION else Errno.ENOTSUP)

    def _read(self, head: Head, body: bytes) -> Event:
        offset, region, count = answers.unpacked(REGION_ACCESS, body)
        answers.check_access(offset, region, count)
        if region == REGISTERS:
            return ReadRegisters(head, offset, count)
        return Reply(head.reply(body + self._configuration.read(offset, count)))

    def _write(self, reply: bytes, writes: tuple[tuple[int, int, bytes], ...]) -> Event:
        to_registers = tuple((offset, data) for region, offset, data in writes if region == REGISTERS)
        if len(to_registers) == len(writes):
            return WriteRegisters(to_registers, reply)
        for region, offset, data in writes:
            if region == CONFIGURATION:
                self._configuration.write(offset, data)
        return Move(self._configuration.base, to_registers, reply)

    def _close(self, reason: str, last: bytes = b"") -> Close:
        self._closed = True
        self._received.clear()
        return Close(last, reason)
