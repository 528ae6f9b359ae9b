"""The single-page mapping: each locality one 4 KiB page, read as memory, written as MMIO.

For guests whose reads cannot be trapped: Windows on AArch64 reads registers with LDP, 16 bytes in one instruction, for
which the processor gives a hypervisor no syndrome to decode. So the page is mapped read-only, reads of any width and
alignment are served by memory, and every write traps with its width. Reads have no side effect on any register, which
is what makes this possible.
"""

from __future__ import annotations

from crbd.crb.config import PAGE_SIZE
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Effect


class PageMapping:
    """The pages of all localities, one after the other. Raises ValueError for a device whose buffer is elsewhere."""

    __slots__ = ("_device",)

    def __init__(self, device: CrbDevice) -> None:
        if device.config.separate_buffer:
            raise ValueError("the page mapping has the buffer in the page")
        self._device = device

    def page(self, locality: int) -> memoryview:
        """What to map for the guest: read-only, always current. Raises ValueError for a locality that is not there."""
        return self._device.page(locality)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` (0 or more) on, zeros where nothing is."""
        return b"".join(
            bytes(self.page(locality)[start : start + count])
            if locality < self._device.config.localities
            else bytes(count)
            for locality, start, count in pieces(offset, size)
        )

    def write(self, offset: int, data: bytes) -> tuple[Effect, ...]:
        """The guest writes `data` at `offset` (0 or more); returns what is to be done."""
        effects: tuple[Effect, ...] = ()
        at = 0
        for locality, start, count in pieces(offset, len(data)):
            if locality < self._device.config.localities:
                effects += self._device.write(locality, start, data[at : at + count])
            at += count
        return effects


def pieces(offset: int, size: int) -> list[tuple[int, int, int]]:
    """`size` bytes at `offset`, cut at page boundaries: page number, offset in the page, count."""
    cut = []
    end = offset + size
    while offset < end:
        number, start = divmod(offset, PAGE_SIZE)
        count = min(end - offset, PAGE_SIZE - start)
        cut.append((number, start, count))
        offset += count
    return cut
