"""The mapping of register servers (vfio-user): control pages trapped, data buffer in shared memory of its own.

    0                                the pages of all localities: trapped, their buffer part empty
    localities * 0x1000              the data buffer, plain memory that server and guest share

CTRL_CMD_LADDR/HADDR and the 64-bit CTRL_RSP_ADDR point at the buffer, which the profile allows (PTP, CRB interface, the
registers of the buffers' addresses). A command then costs no trap for its bytes. A client that does not map the buffer
may reach it by `read` and `write` all the same.

The buffer is one for all localities, and whoever may map it may write it at any time: the device takes a copy of the
command at START.
"""

from __future__ import annotations

from crbd.crb.config import PAGE_SIZE
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Effect
from crbd.crb.mapping.page import pieces


class ServedMapping:
    """Raises ValueError for a device without a separate buffer."""

    __slots__ = ("_device",)

    def __init__(self, device: CrbDevice) -> None:
        if not device.config.separate_buffer:
            raise ValueError("a register server's device has a separate buffer")
        self._device = device

    @property
    def buffer_offset(self) -> int:
        """Where the data buffer begins, from the beginning of the region."""
        return self._device.config.localities * PAGE_SIZE

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` (0 or more) on, zeros where nothing is."""
        read = b""
        for number, start, count in pieces(offset, size):
            at = number * PAGE_SIZE + start - self.buffer_offset
            piece = bytes(self._device.buffer[at : at + count]) if at >= 0 else self._device.read(number, start, count)
            read += piece.ljust(count, b"\0")
        return read

    def write(self, offset: int, data: bytes) -> tuple[Effect, ...]:
        """The guest writes `data` at `offset` (0 or more); returns what is to be done."""
        effects: tuple[Effect, ...] = ()
        done = 0
        for number, start, count in pieces(offset, len(data)):
            piece = data[done : done + count]
            at = number * PAGE_SIZE + start - self.buffer_offset
            if at < 0:
                effects += self._device.write(number, start, piece)
            else:
                room = self._device.buffer[at : at + count]
                room[:] = piece[: len(room)]
            done += count
        return effects
