"""PCI configuration space: 256 bytes, some of whose bits a client may write (PCI Local Bus 3.0, chapter 6).

A conventional function with one memory BAR and no capability: without power management no guest puts it to sleep, and
without interrupts nobody has to serve one. Vendor and device are of our own choice, so that no guest's driver takes the
device for something else: the one driver that is to find it goes by the ACPI tables.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from crbd.vfiouser.spec import BAR_SIZE

SIZE: Final = 256
VENDOR: Final = 0xC4BD
DEVICE: Final = 0x0002
"""A TPM 2.0."""
_REVISION: Final = 1
_CLASS: Final = 0x088000
"""System peripheral, other."""
_COMMAND: Final = 0x04
_CACHE_LINE: Final = 0x0C
_BAR0: Final = 0x10
_SUBSYSTEM: Final = 0x2C
_INTERRUPT_LINE: Final = 0x3C
_IDENTITY = Struct("<HH")
_U32 = Struct("<I")
_BAR_MASK: Final = 0x1_0000_0000 - BAR_SIZE
"""The address bits of a 32-bit, non-prefetchable memory BAR of this size; the lowest four say that it is one."""
_WRITABLE: Final = {
    _COMMAND: (0x0546).to_bytes(2, "little"),  # memory space, bus master, parity, SERR, INTx disable
    _CACHE_LINE: b"\xff\xff",  # cache line size and latency timer: of no effect, and guests write them
    _BAR0: _BAR_MASK.to_bytes(4, "little"),
    _INTERRUPT_LINE: b"\xff",
}
"""Which bits may be written, by the offset of their register."""


def _initial() -> bytes:
    space = bytearray(SIZE)
    _IDENTITY.pack_into(space, 0, VENDOR, DEVICE)
    _U32.pack_into(space, 8, _CLASS << 8 | _REVISION)
    _IDENTITY.pack_into(space, _SUBSYSTEM, VENDOR, DEVICE)
    return bytes(space)


def _masks() -> bytes:
    masks = bytearray(SIZE)
    for offset, bits in _WRITABLE.items():
        masks[offset : offset + len(bits)] = bits
    return bytes(masks)


INITIAL: Final = _initial()
"""After a reset."""
MASKS: Final = _masks()
"""The writable bits, byte by byte."""


class Configuration:
    """The config space of one device. `space` is what it is to begin with: 256 bytes that another one was."""

    __slots__ = ("_space",)

    def __init__(self, space: bytes = INITIAL) -> None:
        if not is_possible(space):
            raise ValueError("these bytes are not the config space of this device")
        self._space = bytearray(space)

    @property
    def base(self) -> int:
        """The guest-physical address in BAR 0, as far as it is set: 0 after a reset, all ones while it is sized."""
        value: int = _U32.unpack_from(self._space, _BAR0)[0]
        return value & _BAR_MASK

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; both within the space."""
        return bytes(self._space[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write what of `data` may be written, bit by bit, at any width and alignment; within the space."""
        for at, byte in enumerate(data, offset):
            mask = MASKS[at]
            self._space[at] = self._space[at] & ~mask | byte & mask

    def reset(self) -> None:
        """As at the beginning; BAR 0 is 0."""
        self._space[:] = INITIAL


def is_possible(space: bytes) -> bool:
    """Whether a config space of ours could be these bytes."""
    if len(space) != SIZE:
        return False
    return all((byte ^ initial) & ~mask == 0 for byte, initial, mask in zip(space, INITIAL, MASKS, strict=True))
