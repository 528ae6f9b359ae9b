"""A client of QEMU's qtest protocol: memory accesses as a guest's CPU would make them, without a CPU.

Source: the description at the head of QEMU's softmmu/qtest.c. One request a line, one answer a line: `OK`, `OK VALUE`,
`ERR REASON` or `FAIL REASON`. Numbers are hexadecimal with 0x; lines that begin with IRQ are news about intercepted
interrupts and never an answer. QEMU carries a request out completely before it answers.

Addresses are guest-physical. A sized access (`readb` … `writeq`) is handed to QEMU's memory core as one access of that
width, which splits it where the device's region does not take it, exactly as it does for a guest under KVM or TCG whose
CPU made that access. Values are numbers; the bytes in the guest's memory are little-endian on x86.
"""

from __future__ import annotations

import socket
from typing import Final

WIDTHS: Final = {1: "b", 2: "w", 4: "l", 8: "q"}
"""Widths of a sized access in bytes, and the letter that qtest names each by."""


class QtestError(AssertionError):
    """QEMU refused a request, fell silent or is gone."""


class QtestClient:
    """The client's end. `line` is a connected stream socket whose other end is QEMU's `-qtest` character device."""

    def __init__(self, line: socket.socket, seconds: float = 20.0) -> None:
        """Every answer must come within `seconds`."""
        self._line = line
        self._line.settimeout(seconds)
        self._unread = bytearray()

    def read(self, address: int, width: int) -> int:
        """One read access of `width` (1, 2, 4 or 8) bytes."""
        return int(self._value(f"read{WIDTHS[width]} 0x{address:x}"), 16)

    def write(self, address: int, width: int, value: int) -> None:
        """One write access of `width` (1, 2, 4 or 8) bytes."""
        self._ask(f"write{WIDTHS[width]} 0x{address:x} 0x{value:x}")

    def readb(self, address: int) -> int:
        """Read one byte."""
        return self.read(address, 1)

    def readw(self, address: int) -> int:
        """Read two bytes."""
        return self.read(address, 2)

    def readl(self, address: int) -> int:
        """Read four bytes."""
        return self.read(address, 4)

    def readq(self, address: int) -> int:
        """Read eight bytes."""
        return self.read(address, 8)

    def writeb(self, address: int, value: int) -> None:
        """Write one byte."""
        self.write(address, 1, value)

    def writew(self, address: int, value: int) -> None:
        """Write two bytes."""
        self.write(address, 2, value)

    def writel(self, address: int, value: int) -> None:
        """Write four bytes."""
        self.write(address, 4, value)

    def writeq(self, address: int, value: int) -> None:
        """Write eight bytes."""
        self.write(address, 8, value)

    def read_memory(self, address: int, size: int) -> bytes:
        """`size` bytes (at least 1) from `address` on; QEMU chooses the accesses."""
        return bytes.fromhex(self._value(f"read 0x{address:x} 0x{size:x}").removeprefix("0x"))

    def write_memory(self, address: int, data: bytes) -> None:
        """Write `data` (not empty) from `address` on; QEMU chooses the accesses."""
        self._ask(f"write 0x{address:x} 0x{len(data):x} 0x{data.hex()}")

    def clock_step(self, nanoseconds: int | None = None) -> int:
        """Let the virtual clock, which stands still otherwise, go on; without a number to its next timer.

        Returns what it shows then, in nanoseconds. Only QEMU's accelerator `qtest` knows this request.
        """
        return int(self._value("clock_step" if nanoseconds is None else f"clock_step {nanoseconds}"))

    def _value(self, request: str) -> str:
        answer = self._ask(request)
        if not answer:
            raise QtestError(f"qtest {request!r}: an answer without a value")
        return answer

    def _ask(self, request: str) -> str:
        """What stands behind OK in the answer to `request`. Raises QtestError."""
        try:
            self._line.sendall(request.encode() + b"\n")
            while (answer := self._next_line()).startswith("IRQ"):
                pass
        except TimeoutError as error:
            raise QtestError(f"qtest {request[:60]!r}: no answer in {self._line.gettimeout()} s") from error
        except ConnectionError as error:
            raise QtestError(f"qtest {request[:60]!r}: QEMU is gone") from error
        verdict, _, value = answer.partition(" ")
        if verdict != "OK":
            raise QtestError(f"qtest {request[:60]!r}: {answer}")
        return value

    def _next_line(self) -> str:
        while b"\n" not in self._unread:
            data = self._line.recv(65536)
            if not data:
                raise ConnectionResetError
            self._unread += data
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line.decode()
