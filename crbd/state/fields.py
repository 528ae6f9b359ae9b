"""A reader of little-endian structures whose only error names the file, the place and the field."""

from __future__ import annotations

from typing import Final

from crbd.errors import StateDamagedError, WireError
from crbd.wire.reader import Reader

RESTORE: Final = "restore it from a backup or from an earlier generation"


def damaged(name: str, place: str, why: str) -> StateDamagedError:
    """The error for what is wrong at `place` in the state called `name` (a path)."""
    return StateDamagedError(f"{name}: {place}: {why}", RESTORE)


class FieldReader:
    """Reads `data`, which is the `place` (say "header") of the state called `name`. Raises StateDamagedError alone.

    Lengths are checked against what is there before anything is copied.
    """

    __slots__ = ("_name", "_place", "_reader")

    def __init__(self, data: bytes | memoryview, name: str, place: str) -> None:
        self._reader = Reader(data)
        self._name = name
        self._place = place

    @property
    def position(self) -> int:
        """How many bytes have been read."""
        return self._reader.position

    def wrong(self, field: str, why: str) -> StateDamagedError:
        """The error for a field whose value cannot be."""
        return damaged(self._name, f"{self._place}, field {field}", why)

    def u8(self, field: str) -> int:
        """One byte."""
        return self._number(field, 1)

    def u16(self, field: str) -> int:
        """Two bytes."""
        return self._number(field, 2)

    def u32(self, field: str) -> int:
        """Four bytes."""
        return self._number(field, 4)

    def u64(self, field: str) -> int:
        """Eight bytes."""
        return self._number(field, 8)

    def take(self, field: str, count: int) -> bytes:
        """`count` bytes."""
        try:
            return self._reader.take(count)
        except WireError as error:
            raise self.wrong(field, str(error)) from error

    def text(self, field: str, count: int) -> str:
        """`count` bytes of UTF-8, all of it printable: it goes into messages of one line."""
        try:
            text = self.take(field, count).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(field, "is not UTF-8") from error
        if not text.isprintable():
            raise self.wrong(field, "holds unprintable characters")
        return text

    def rest(self) -> bytes:
        """All that has not been read, perhaps nothing."""
        return self._reader.rest()

    def end(self) -> None:
        """Nothing may be left."""
        if self._reader.remaining:
            raise damaged(self._name, self._place, f"has {self._reader.remaining} bytes too many")

    def _number(self, field: str, count: int) -> int:
        return int.from_bytes(self.take(field, count), "little")
