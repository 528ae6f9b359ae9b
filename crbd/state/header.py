"""The header of a document: what can be known of it without a key. docs/state-format.md has the bytes.

Theory. The magic, the fields below and the SHA-256 at the end of the document are the same in every format version,
for ever: so any release can say of any document whether it is whole, who wrote it, and which release reads it. A
later version may make the header longer; a reader skips what it does not know by `header_length`.

The magic begins with a byte that is no ASCII, and holds CR LF and ^Z: a transfer as text damages it visibly.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final
from uuid import UUID

from crbd.errors import StateEmptyError, StateForeignError, StateNewerError
from crbd.state.fields import FieldReader, damaged

MAGIC: Final = b"\x8aCRBD\r\n\x1a"
FORMAT_VERSION: Final = 3
"""The newest format version this release writes and reads."""
MAX_DOCUMENT: Final = 4 * 1024 * 1024
"""Bytes of the longest document."""
MAX_GENERATION: Final = (1 << 64) - 1
MAX_HEADER: Final = 1024
MAX_WRITER: Final = 64
"""Bytes of UTF-8."""
WRITER_ID_SIZE: Final = 16
DIGEST_SIZE: Final = 32

_FIXED = Struct("<8sHHHHIQ16s16sQB")
_SWTPM_HEADS: Final = (b"\x01\x01\x00\x0a", b"\x02\x01\x00\x0a")
_SWTPM_LINEAR: Final = b"nilmptws"


class Suite(IntEnum):
    """How the body is stored."""

    PLAIN = 0
    """As it is; the SHA-256 at the document's end finds damage, not malice."""
    AES_256_GCM = 1
    """Encrypted, and header and body authenticated (crbd.state.sealing)."""


@dataclass(frozen=True, slots=True)
class Header:
    """Says what the document is. Clear text in every suite; authenticated where the suite does that."""

    format_version: int
    oldest_reader: int
    """A reader of this format version or a later one can read the document."""
    suite: Suite
    generation: int
    """Counts the documents of one TPM; each one written has a higher number (64 bits)."""
    uuid: UUID
    """Of the instance."""
    writer: str
    """Name and version of the program that wrote it: at most 64 bytes of UTF-8, printable."""
    writer_id: bytes
    """16 random bytes of the process that wrote it: tells two writers of the same file apart."""
    written: int
    """When: seconds since 1970 (64 bits)."""

    @property
    def sealed(self) -> bool:
        """Whether a key is needed to read the rest."""
        return self.suite is not Suite.PLAIN


def encode_header(header: Header, body_length: int) -> bytes:
    """The header's bytes. `body_length` is that of the body as stored."""
    writer = header.writer.encode("utf-8")
    return (
        _FIXED.pack(
            MAGIC,
            header.format_version,
            header.oldest_reader,
            header.suite,
            _FIXED.size + len(writer),
            body_length,
            header.generation,
            header.uuid.bytes,
            header.writer_id,
            header.written,
            len(writer),
        )
        + writer
    )


def refuse_strangers(data: bytes, name: str) -> None:
    """Raises StateEmptyError, StateForeignError or StateDamagedError for what is no document at all."""
    if not data:
        raise StateEmptyError(f"{name} is empty", "restore it from a backup; remove it to give this TPM up")
    if len(data) > MAX_DOCUMENT:
        raise damaged(name, "document", f"is longer than any, {len(data)} bytes of at most {MAX_DOCUMENT}")
    if data[:4] in _SWTPM_HEADS or data[:8] == _SWTPM_LINEAR:
        raise StateForeignError(
            f"{name} is state of swtpm, where state of crbd was expected",
            "open it in the swtpm layout, or convert it: crbd state convert --to crbd",
        )
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise damaged(name, "header, field magic", "is not that of crbd's state")


def peek_header(data: bytes, name: str = "the state") -> Header:
    """The header of a document of which at least the first 1024 bytes (or all) are given. Needs no key.

    Nothing is authenticated by that: what decides on more than a message asks `decode`. Raises StateDamagedError,
    StateEmptyError, StateForeignError, or StateNewerError for a document that this release cannot read.
    """
    refuse_strangers(data, name)
    return parse_header(data, name)[0]


def parse_header(data: bytes, name: str) -> tuple[Header, int, int]:
    """Header, its length and the body's length (bytes). Raises StateDamagedError or StateNewerError."""
    reader = FieldReader(memoryview(data)[:MAX_HEADER], name, "header")
    reader.take("magic", len(MAGIC))
    format_version = reader.u16("format_version")
    oldest_reader = reader.u16("oldest_reader")
    suite = reader.u16("suite")
    header_length = reader.u16("header_length")
    body_length = reader.u32("body_length")
    generation = reader.u64("generation")
    uuid = UUID(bytes=reader.take("uuid", 16))
    writer_id = reader.take("writer_id", WRITER_ID_SIZE)
    written = reader.u64("written")
    writer_length = reader.u8("writer_length")
    if writer_length > MAX_WRITER:
        raise reader.wrong("writer_length", f"is {writer_length}, at most {MAX_WRITER} can be")
    writer = reader.text("writer", writer_length)
    if not 1 <= oldest_reader <= format_version:
        raise reader.wrong("oldest_reader", f"is {oldest_reader} in format version {format_version}")
    if not reader.position <= header_length <= MAX_HEADER:
        raise reader.wrong("header_length", f"is {header_length}, must be {reader.position} to {MAX_HEADER}")
    if oldest_reader > FORMAT_VERSION:
        raise StateNewerError(
            f"{name} has format version {format_version}, written by {writer}, and asks for a reader of version "
            f"{oldest_reader}; this release reads up to {FORMAT_VERSION}",
            f"install {writer} or a newer release",
        )
    if suite > max(Suite):
        raise StateNewerError(
            f"{name} is stored in suite {suite}, written by {writer}; this release knows up to {max(Suite)}",
            f"install {writer} or a newer release",
        )
    header = Header(format_version, oldest_reader, Suite(suite), generation, uuid, writer, writer_id, written)
    return header, header_length, body_length
