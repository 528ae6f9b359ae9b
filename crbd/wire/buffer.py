"""What has been received and not yet been made into messages.

Theory. The buffer holds bytes between two marks: *committed*, before which nothing is wanted any more, and *received*,
the end. A parse attempt moves a third mark, *consumed*, from the first towards the second. An attempt that succeeds
commits; one that finds too few bytes rolls back, and the next attempt starts over when more have come. Committed bytes
are thrown away as soon as they are at least half of what is held, so a byte is moved at most once on average, and a
buffer whose bytes are all committed holds none.
"""

from __future__ import annotations

from crbd.errors import WireError


class ReceiveBuffer:
    """Bytes in arrival order, at most `limit` of them uncommitted."""

    __slots__ = ("_bytes", "_committed", "_consumed", "_limit")

    def __init__(self, limit: int) -> None:
        self._bytes = bytearray()
        self._committed = 0
        self._consumed = 0
        self._limit = limit

    def __len__(self) -> int:
        """How many bytes have neither been consumed nor committed."""
        return len(self._bytes) - self._consumed

    @property
    def held(self) -> int:
        """How many bytes occupy memory: the uncommitted ones and the committed ones not yet thrown away."""
        return len(self._bytes)

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Add what was received. Raises WireError, and adds nothing, if more than the limit would be uncommitted."""
        uncommitted = len(self._bytes) - self._committed
        if uncommitted + len(data) > self._limit:
            raise WireError(f"{len(data)} bytes more than the {uncommitted} waiting exceed the limit of {self._limit}")
        self._bytes += data

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, or as many as there are, without consuming them."""
        return bytes(self._bytes[self._consumed : self._consumed + count])

    def consume(self, count: int) -> bytes | None:
        """The next `count` bytes, or None, consuming none, if there are fewer."""
        if count > len(self):
            return None
        start = self._consumed
        self._consumed += count
        with memoryview(self._bytes) as view:
            return bytes(view[start : self._consumed])

    def commit(self) -> None:
        """What has been consumed is not wanted any more."""
        self._committed = self._consumed
        if self._committed * 2 >= len(self._bytes):
            del self._bytes[: self._committed]
            self._committed = self._consumed = 0

    def rollback(self) -> None:
        """Take back what has been consumed since the last commit."""
        self._consumed = self._committed

    def clear(self) -> None:
        """Throw away everything."""
        self._bytes = bytearray()
        self._committed = self._consumed = 0
