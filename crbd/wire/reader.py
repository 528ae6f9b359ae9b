"""A checked reader of byte structures: every read is bounded by what is there, and the only error is `WireError`.

Big-endian is the byte order of the swtpm control channel and of TPM structures, little-endian that of vfio-user and
of CRB registers; the method's name says which.
"""

from __future__ import annotations

from crbd.errors import WireError


class Reader:
    """Reads `data` from its first byte to its last. Does not copy until `take` or `rest` hands bytes out."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._position = 0

    @property
    def position(self) -> int:
        """How many bytes have been read."""
        return self._position

    @property
    def remaining(self) -> int:
        """How many bytes have not been read."""
        return len(self._data) - self._position

    def u8(self) -> int:
        """One byte."""
        return self._view(1)[0]

    def u16_be(self) -> int:
        """Two bytes, most significant first."""
        return int.from_bytes(self._view(2), "big")

    def u32_be(self) -> int:
        """Four bytes, most significant first."""
        return int.from_bytes(self._view(4), "big")

    def u64_be(self) -> int:
        """Eight bytes, most significant first."""
        return int.from_bytes(self._view(8), "big")

    def u16_le(self) -> int:
        """Two bytes, least significant first."""
        return int.from_bytes(self._view(2), "little")

    def u32_le(self) -> int:
        """Four bytes, least significant first."""
        return int.from_bytes(self._view(4), "little")

    def u64_le(self) -> int:
        """Eight bytes, least significant first."""
        return int.from_bytes(self._view(8), "little")

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises WireError if there are fewer; nothing is allocated then."""
        return bytes(self._view(count))

    def rest(self) -> bytes:
        """All bytes that have not been read, perhaps none."""
        return self.take(self.remaining)

    def expect_end(self) -> None:
        """Raises WireError if bytes are left."""
        if self.remaining:
            raise WireError(f"{self.remaining} bytes too many after {self._position}")

    def _view(self, count: int) -> memoryview:
        if not 0 <= count <= self.remaining:
            raise WireError(f"{count} bytes wanted at byte {self._position}, {self.remaining} are there")
        start = self._position
        self._position += count
        return self._data[start : self._position]
