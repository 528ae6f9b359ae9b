"""The split mapping: registers trapped, buffer a plain RAM block. QEMU's tpm-crb on x86 (hw/tpm/tpm_crb.c).

0x00 to 0x7F traps on reads and writes; 0x80 to 0xFFF is memory that the guest reads and writes with nobody looking.
QEMU's memory core takes any width there: an 8-byte or misaligned access to the registers becomes several. Beyond the
page of locality 0 there is nothing: reads give zeros, writes vanish.
"""

from __future__ import annotations

from typing import Final

from crbd.crb.config import BUFFER_OFFSET
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Effect

RAM_BLOCK: Final = "tpm-crb-cmd"
"""What QEMU calls the RAM block, also in saved machines."""


class SplitMapping:
    """Raises ValueError for a device with more than locality 0, or one whose buffer is elsewhere."""

    __slots__ = ("_device",)

    def __init__(self, device: CrbDevice) -> None:
        if device.config.localities != 1 or device.config.separate_buffer:
            raise ValueError("the split mapping has locality 0 alone, and its buffer behind the registers")
        self._device = device

    @property
    def ram(self) -> memoryview:
        """The RAM block: writable, shared with the device."""
        return self._device.buffer

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on (0 or more), as the guest sees them."""
        registers = self._device.read(0, offset, min(size, BUFFER_OFFSET - offset)) if offset < BUFFER_OFFSET else b""
        start = max(offset - BUFFER_OFFSET, 0)
        memory = bytes(self.ram[start : start + size - len(registers)])
        return (registers + memory).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> tuple[Effect, ...]:
        """The guest writes `data` at `offset` (0 or more); returns what is to be done."""
        trapped = data[: max(BUFFER_OFFSET - offset, 0)]
        effects = self._device.write(0, offset, trapped) if trapped else ()
        start = max(offset - BUFFER_OFFSET, 0)
        memory = data[len(trapped) :][: max(len(self.ram) - start, 0)]
        self.ram[start : start + len(memory)] = memory
        return effects
