"""What is kept beside a TPM's volatile state: the registers and what a client had set up. In crbd's layout they are
sections of the document; swtpm's layouts have no room for them, and there they have a file of their own.

Bytes of that file, little-endian, inside swtpm's own frame for a state file (crbd.state.swtpm: encrypted where the
state is):

    8 bytes magic `crbdside`, u16 version (1), u16 count of records (up to 2)
    each: 32 bytes SHA-256 of the engine's volatile state it belongs to, u32 length, sections (crbd.state.sections)
    32 bytes SHA-256 of all before it

Theory. A record counts only for the volatile state whose digest it bears: where another program has written that
meanwhile, the registers are not those of the TPM any more. Two records are there so that volatile state and registers
change in one moment, though they lie in two files: the file gets the new record beside the old one first, and then the
volatile state says which of them counts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from struct import Struct
from typing import Final

from crbd.errors import StateDamagedError, StateNewerError
from crbd.state import crb as registers
from crbd.state.fields import FieldReader, damaged
from crbd.state.header import DIGEST_SIZE
from crbd.state.saved import SESSION, Session, decode_session, encode_session
from crbd.state.sections import Section, Sections, decode_body, encode_body

MAGIC: Final = b"crbdside"
VERSION: Final = 1
MAX_RECORDS: Final = 2
CHECKPOINT: Final = "checkpoint"
"""The section, without data, that says so of the volatile state beside it."""
_SESSION_VERSION = 1
_HEAD = Struct("<HH")
_LENGTH = Struct("<I")


@dataclass(frozen=True, slots=True)
class SideState:
    """Registers and session of a TPM whose volatile state was stored."""

    crb: registers.CrbStateV3 | None = None
    session: Session | None = None
    checkpoint: bool = False
    """No client asked for it to be stored: it is there for the case that the daemon dies, and INIT passes it over."""


Records = dict[bytes, SideState]
"""By the digest of the volatile state each belongs to."""


def digest_of(volatile: bytes) -> bytes:
    """What binds a record to the engine's volatile state."""
    return hashlib.sha256(volatile).digest()


def encode_side(records: Records) -> bytes:
    """The file's bytes, before swtpm's frame. Raises ValueError for more than two records."""
    if len(records) > MAX_RECORDS:
        raise ValueError(f"{len(records)} records, at most {MAX_RECORDS} can be")
    parts = [MAGIC, _HEAD.pack(VERSION, len(records))]
    for digest, side in records.items():
        body = encode_body(_sections_of(side))
        parts += (digest, _LENGTH.pack(len(body)), body)
    whole = b"".join(parts)
    return whole + hashlib.sha256(whole).digest()


def decode_side(data: bytes, name: str) -> Records:
    """The other way; `name` (its path) goes into the errors. Raises StateDamagedError or StateNewerError."""
    whole = data[:-DIGEST_SIZE]
    if hashlib.sha256(whole).digest() != data[-DIGEST_SIZE:]:
        raise damaged(name, "file", "is not what was written: its SHA-256 is another")
    reader = FieldReader(whole, name, "file")
    if reader.take("magic", len(MAGIC)) != MAGIC:
        raise reader.wrong("magic", "is another")
    version = reader.u16("version")
    if version != VERSION:
        raise StateNewerError(f"{name} has version {version}, this release reads {VERSION}", "use a newer release")
    count = reader.u16("record count")
    if count > MAX_RECORDS:
        raise reader.wrong("record count", f"is {count}, at most {MAX_RECORDS} can be")
    records = {}
    for _ in range(count):
        digest = reader.take("digest", DIGEST_SIZE)
        records[digest] = _side_of(decode_body(reader.take("record", reader.u32("record length")), name), name)
    reader.end()
    return records


def _sections_of(side: SideState) -> Sections:
    sections: Sections = ()
    if side.crb is not None:
        version, body = registers.encode(side.crb)
        sections += (Section(registers.SECTION, version, body),)
    if side.session is not None:
        sections += (Section(SESSION, _SESSION_VERSION, encode_session(side.session)),)
    if side.checkpoint:
        sections += (Section(CHECKPOINT, 1, b""),)
    return sections


def _side_of(sections: Sections, name: str) -> SideState:
    crb, session, checkpoint = None, None, False
    for section in sections:
        if section.name == registers.SECTION:
            crb = _registers_of(section, name)
        elif section.name == SESSION and section.version == _SESSION_VERSION:
            session = decode_session(section.data, name)
        elif section.name == CHECKPOINT and section.version == 1:
            checkpoint = True
        elif not section.may_skip:
            raise StateNewerError(
                f"{name} has a section {section.name} of version {section.version} that this release does not know",
                "use the release that wrote it, or a newer one",
            )
    return SideState(crb, session, checkpoint)


def _registers_of(section: Section, name: str) -> registers.CrbStateV3:
    try:
        return registers.lift(registers.decode(section.version, section.data))
    except StateDamagedError as error:
        raise damaged(name, f"section {section.name}", error.what) from error
