"""What a CRB device is made to be: fixed when it is made, never changed by a guest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

PAGE_SIZE: Final = 0x1000
"""Bytes from one locality's registers to the next one's."""
BUFFER_OFFSET: Final = 0x80
"""Where the data buffer begins in a page."""
BUFFER_SIZE: Final = PAGE_SIZE - BUFFER_OFFSET
"""Bytes of the data buffer in a page (0xF80), and the most that fits there."""
MAX_SEPARATE_BUFFER: Final = 1 << 20
"""The most bytes of a data buffer outside the page; our own bound, no specification's."""
BASE: Final = 0xFED40000
"""Where PC firmware looks for a TPM (PTP, section on memory-mapped TPM addresses)."""
MAX_LOCALITIES: Final = 5
COMMAND_HEAD: Final = 10
"""Bytes in the head of a TPM command; no command is shorter."""


class Dialect(Enum):
    """Whose behaviour answers where the TCG's profile leaves a choice or a device departs from it."""

    PTP = "ptp"
    """The PC Client Platform TPM Profile, and for a wrong command size QEMU's newest device."""
    QEMU_7_2 = "qemu-7.2"
    """QEMU's tpm-crb up to 11.0: one locality, no chunks."""
    QEMU_11 = "qemu-11"
    """QEMU's tpm-crb of 11.1: one locality, chunked transfers."""


@dataclass(frozen=True, slots=True)
class CrbConfig:
    """One device. Sizes in bytes; addresses are guest-physical. Raises ValueError for what no device can be."""

    localities: int = MAX_LOCALITIES
    """1 to 5; with 1 the device says that it has locality 0 only."""
    buffer_size: int = BUFFER_SIZE
    idle_bypass: bool = True
    """A further command may follow a completed one without going idle in between."""
    chunking: bool = True
    """Commands and responses larger than the buffer pass in pieces."""
    max_command: int = 4096
    """The engine's buffer: no command or response is longer."""
    vendor_id: int = 0x1014
    device_id: int = 0
    revision: int = 0
    base: int = BASE
    """Of locality 0's page."""
    separate_buffer: bool = False
    """The data buffer is memory of its own, behind the pages of all localities, instead of inside each page."""
    dialect: Dialect = Dialect.PTP

    def __post_init__(self) -> None:
        largest = MAX_SEPARATE_BUFFER if self.separate_buffer else BUFFER_SIZE
        bounds = (
            ("localities", self.localities, 1, MAX_LOCALITIES),
            ("buffer_size", self.buffer_size, 64, largest),
            ("max_command", self.max_command, 64, MAX_SEPARATE_BUFFER),
            ("vendor_id", self.vendor_id, 0, 0xFFFF),
            ("device_id", self.device_id, 0, 0xFFFF),
            ("revision", self.revision, 0, 0xFF),
            ("base", self.base, 0, (1 << 64) - self.span),
        )
        for name, value, low, high in bounds:
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, must be {low} to {high}")
        if self.base % PAGE_SIZE:
            raise ValueError(f"base is {self.base:#x}, must be a multiple of {PAGE_SIZE:#x}")
        if self.dialect is not Dialect.PTP and self.localities != 1:
            raise ValueError(f"localities is {self.localities}, QEMU's device has one")

    @property
    def span(self) -> int:
        """Bytes of address space: the pages, and the separate buffer rounded up to whole pages."""
        pages = self.localities
        if self.separate_buffer:
            pages += -(-self.buffer_size // PAGE_SIZE)
        return pages * PAGE_SIZE

    def data_address(self, locality: int) -> int:
        """Where `locality` finds the data buffer."""
        if self.separate_buffer:
            return self.base + self.localities * PAGE_SIZE
        return self.base + locality * PAGE_SIZE + BUFFER_OFFSET

    @classmethod
    def qemu_7_2(cls, max_command: int = 4096) -> CrbConfig:
        """QEMU's tpm-crb as in 7.2 and all its predecessors."""
        return cls(localities=1, idle_bypass=False, chunking=False, max_command=max_command, dialect=Dialect.QEMU_7_2)

    @classmethod
    def qemu_11(cls, max_command: int = 4096) -> CrbConfig:
        """QEMU's tpm-crb as in 11.1."""
        return cls(localities=1, idle_bypass=False, chunking=True, max_command=max_command, dialect=Dialect.QEMU_11)
