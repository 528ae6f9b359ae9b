"""The body of a document: a list of named, versioned sections. docs/state-format.md has the bytes.

    u16 count, then for each: u8 name length, name (ASCII), u16 version, u16 flags, u32 length, data

Numbers are little-endian. A section's flag MAY_SKIP lets a reader that does not know it go on; it then carries the
section unchanged into what it writes itself. Who adds such a section must be content with that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from struct import Struct
from typing import Final

from crbd.state.fields import FieldReader, damaged

MAX_SECTIONS: Final = 64
MAX_NAME: Final = 64
"""Bytes."""
MAY_SKIP: Final = 0x0001

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_COUNT = Struct("<H")
_HEAD = Struct("<HHI")


@dataclass(frozen=True, slots=True)
class Section:
    """One section as stored. Raises ValueError for what has no stored form."""

    name: str
    """1 to 64 of a-z 0-9 . _ -"""
    version: int
    data: bytes
    may_skip: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no section name")
        if not 1 <= self.version <= 0xFFFF:
            raise ValueError(f"version of section {self.name} is {self.version}")


Sections = tuple[Section, ...]


def encode_body(sections: Sections) -> bytes:
    """The body. Raises ValueError for more sections than can be, or two of one name."""
    if len(sections) > MAX_SECTIONS or len({section.name for section in sections}) != len(sections):
        raise ValueError(f"{len(sections)} sections, at most {MAX_SECTIONS} can be, each name once")
    parts = [_COUNT.pack(len(sections))]
    for section in sections:
        name = section.name.encode("ascii")
        parts += (bytes((len(name),)), name)
        parts += (_HEAD.pack(section.version, MAY_SKIP if section.may_skip else 0, len(section.data)), section.data)
    return b"".join(parts)


def decode_body(body: bytes, name: str) -> Sections:
    """The sections of the document called `name`. Raises StateDamagedError."""
    reader = FieldReader(body, name, "body")
    count = reader.u16("section count")
    if count > MAX_SECTIONS:
        raise reader.wrong("section count", f"is {count}, at most {MAX_SECTIONS} can be")
    sections = tuple(_decode_section(reader, number) for number in range(1, count + 1))
    reader.end()
    names = [section.name for section in sections]
    for twice in names:
        if names.count(twice) > 1:
            raise damaged(name, f"section {twice}", "is there twice")
    return sections


def _decode_section(reader: FieldReader, number: int) -> Section:
    of = f"of section {number}"
    name = reader.text(f"name {of}", reader.u8(f"name length {of}"))
    if not _NAME.fullmatch(name):
        raise reader.wrong(f"name {of}", f"is {name!r}")
    version = reader.u16(f"version of section {name}")
    if not version:
        raise reader.wrong(f"version of section {name}", "is 0")
    flags = reader.u16(f"flags of section {name}")
    if flags & ~MAY_SKIP:
        raise reader.wrong(f"flags of section {name}", f"are {flags:#x}")
    data = reader.take(f"data of section {name}", reader.u32(f"length of section {name}"))
    return Section(name, version, data, may_skip=bool(flags & MAY_SKIP))
