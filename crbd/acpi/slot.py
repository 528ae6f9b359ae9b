"""Where on the PCI buses the device is plugged in, as QEMU's `addr=` says it, and what QEMU's tables call that place.

A place is a way from the first root bus down: `10.0` is device 0x10, function 0 on it; `3.0/0.0` is device 0 behind the
root port (or bridge) that is device 3. All numbers are hexadecimal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HOP = re.compile(r"(?:0x)?([0-9a-f]{1,2})(?:\.([0-7]))?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Hop:
    """One device on its bus: device 0 to 31, function 0 to 7."""

    device: int
    function: int

    def __post_init__(self) -> None:
        if not (0 <= self.device <= 31 and 0 <= self.function <= 7):
            raise ValueError(f"there is no PCI device {self.device:x}.{self.function:x}")

    @property
    def segment(self) -> str:
        """Its name in QEMU's tables: S and device and function in one byte (hw/i386/acpi-build.c calls it devfn)."""
        return f"S{self.device << 3 | self.function:02X}"

    @property
    def address(self) -> int:
        """The value of _ADR (ACPI 6.5, table 6.2)."""
        return self.device << 16 | self.function


@dataclass(frozen=True, slots=True)
class Slot:
    """The way to a device: the hops from the root bus on, at least one."""

    hops: tuple[Hop, ...]

    def __str__(self) -> str:
        return "/".join(f"{hop.device:x}.{hop.function:x}" for hop in self.hops)


def parse_slot(text: str) -> Slot:
    """Raises ValueError for what is none."""
    hops = []
    for part in text.split("/"):
        match = _HOP.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no PCI device")
        hops.append(Hop(int(match[1], 16), int(match[2] or "0", 16)))
    return Slot(tuple(hops))
