"""A writer of AML, the byte code of ACPI: each function is one construct and returns its bytes.

Just what the tables of this room need. Names and encodings are those of the ACPI Specification 6.5, chapter 20. A term
that is made of terms takes them as bytes: `store(local(0), name("BASE"))`. What cannot be encoded raises ValueError.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

ZERO: Final = b"\x00"
ONE: Final = b"\x01"
NOWHERE: Final = b"\x00"
"""The target of an operator whose result is only returned."""

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}", re.ASCII)
_EXTENDED = b"\x5b"


class Space(IntEnum):
    """Address spaces of operation regions."""

    PCI_CONFIG = 2


class Access(IntEnum):
    """Widths in which a field's region is read and written."""

    BYTE = 1
    WORD = 2
    DWORD = 3


def name(path: str) -> bytes:
    """A NameString: segments of up to four characters, dots between them, a backslash before those from the root."""
    absolute = path.startswith("\\")
    segments = path.removeprefix("\\").split(".")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments) or len(segments) > 255:
        raise ValueError(f"{path!r} is no ACPI name")
    prefix = {1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments) & 0xFF]))
    return b"\\" * absolute + prefix + b"".join(segment.ljust(4, "_").encode() for segment in segments)


def package(body: bytes) -> bytes:
    """`body` behind its PkgLength, which counts itself."""
    for size in range(1, 5):
        if len(body) + size <= _capacity(size):
            return _length(len(body) + size, size) + body
    raise ValueError(f"a package of {len(body)} bytes")


def _capacity(size: int) -> int:
    """The largest length that `size` bytes of PkgLength can say."""
    return 0x3F if size == 1 else (1 << 8 * size - 4) - 1


def _length(value: int, size: int) -> bytes:
    if size == 1:
        return bytes([value])
    return bytes([size - 1 << 6 | value & 0xF]) + (value >> 4).to_bytes(size - 1, "little")


def integer(value: int) -> bytes:
    """The shortest constant that is `value`: 0 or more, less than 2**64."""
    if value in (0, 1):
        return bytes([value])
    for opcode, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([opcode]) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no ACPI integer")


def string(text: str) -> bytes:
    """An ASCII string without NUL."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"{text!r} is no ACPI string")
    return b"\x0d" + text.encode() + b"\0"


def buffer(data: bytes) -> bytes:
    """A buffer of these bytes."""
    return b"\x11" + package(integer(len(data)) + data)


def package_of(*values: bytes) -> bytes:
    """A Package of these values, up to 255."""
    return b"\x12" + package(bytes([len(values)]) + b"".join(values))


def local(number: int) -> bytes:
    """A method's own variable, 0 to 7."""
    if not 0 <= number <= 7:
        raise ValueError(f"there is no Local{number}")
    return bytes([0x60 + number])


def argument(number: int) -> bytes:
    """A method's argument, 0 to 6."""
    if not 0 <= number <= 6:
        raise ValueError(f"there is no Arg{number}")
    return bytes([0x68 + number])


# ---- what makes names ----


def scope(path: str, *terms: bytes) -> bytes:
    """Terms that go into an object of another table."""
    return b"\x10" + package(name(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """A device with what is in it."""
    return _EXTENDED + b"\x82" + package(name(path) + b"".join(terms))


def named(path: str, value: bytes) -> bytes:
    """An object with a constant value."""
    return b"\x08" + name(path) + value


def method(path: str, *terms: bytes, arguments: int = 0, serialized: bool = False) -> bytes:
    """A method with 0 to 7 arguments; `serialized` where it makes names, so that two callers do not make them twice."""
    if not 0 <= arguments <= 7:
        raise ValueError(f"a method with {arguments} arguments")
    return b"\x14" + package(name(path) + bytes([arguments | serialized << 3]) + b"".join(terms))


def operation_region(path: str, space: Space, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on of an address space."""
    return _EXTENDED + b"\x80" + name(path) + bytes([space]) + integer(offset) + integer(length)


def data_table_region(path: str, signature: str) -> bytes:
    """The bytes of the first ACPI table with that signature."""
    return _EXTENDED + b"\x88" + name(path) + string(signature) + string("") + string("")


def field(region: str, access: Access, *units: tuple[str, int, int]) -> bytes:
    """Names for bits of a region. Each unit is a name, the bit it begins at, how many bits it has; in ascending order.

    What is written leaves the bits beside it as they were.
    """
    listed = b""
    reached = 0
    for unit, start, bits in units:
        if start < reached or bits < 1 or "." in unit:
            raise ValueError(f"field {unit!r} at bit {start}")
        if start > reached:
            listed += b"\x00" + _bits(start - reached)
        listed += name(unit) + _bits(bits)
        reached = start + bits
    return _EXTENDED + b"\x81" + package(name(region) + bytes([access]) + listed)


def _bits(count: int) -> bytes:
    """A number of bits: written as a PkgLength is, without counting itself."""
    for size in range(1, 5):
        if count <= _capacity(size):
            return _length(count, size)
    raise ValueError(f"a field of {count} bits")


def create_dword_field(source: bytes, offset: int, path: str) -> bytes:
    """A name for the four bytes at `offset` of a buffer."""
    return b"\x8a" + source + integer(offset) + name(path)


# ---- what is done ----


def store(value: bytes, target: bytes) -> bytes:
    """Write a value."""
    return b"\x70" + value + target


def add(left: bytes, right: bytes, target: bytes = NOWHERE) -> bytes:
    """left + right, without what does not fit."""
    return b"\x72" + left + right + target


def subtract(left: bytes, right: bytes, target: bytes = NOWHERE) -> bytes:
    """left - right, without what does not fit."""
    return b"\x74" + left + right + target


def shift_right(value: bytes, bits: int, target: bytes = NOWHERE) -> bytes:
    """value >> bits."""
    return b"\x7a" + value + integer(bits) + target


def bit_and(left: bytes, right: bytes, target: bytes = NOWHERE) -> bytes:
    """left & right."""
    return b"\x7b" + left + right + target


def exists(path: str) -> bytes:
    """Whether there is an object of that name."""
    return _EXTENDED + b"\x12" + name(path) + NOWHERE


def not_(value: bytes) -> bytes:
    """Whether a value is 0."""
    return b"\x92" + value


def equal(left: bytes, right: bytes) -> bytes:
    """Whether both are the same."""
    return b"\x93" + left + right


def if_(condition: bytes, *terms: bytes) -> bytes:
    """Terms for when the condition is not 0."""
    return b"\xa0" + package(condition + b"".join(terms))


def call(path: str, *arguments: bytes) -> bytes:
    """The value a method returns. The number of arguments must be the method's own: AML does not say it again."""
    return name(path) + b"".join(arguments)


def return_(value: bytes) -> bytes:
    """End the method."""
    return b"\xa4" + value
