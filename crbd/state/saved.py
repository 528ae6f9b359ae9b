"""The saved types beside the registers (crbd.state.crb), and their bytes as sections. Never runtime types.

Section bodies, version 1, little-endian:

    tpm.permanent, tpm.volatile, tpm.savestate
        u16 major, u16 minor, u16 micro   the libtpms that wrote the blob
        u16 format level                  libtpms' StateFormatLevel, 0 where the library has none (before 0.10)
        u8 length, profile                the profile's name in UTF-8, empty where the library has none
        the rest                          the engine's blob, 1 to 512 KiB
    session
        u8 locality (0 to 4), u8 flags (1 tpmEstablished), u32 buffer size in bytes, u32 last command's code, 0 for none
    identity
        16 bytes UUID, u64 generation, u64 created (seconds since 1970)
        u16 length, name (UTF-8, up to 255 bytes)
        u8 length, writer (UTF-8, up to 64 bytes)
        u8 length, SHA-256 of the endorsement key's public area: 32 bytes, or none where it is not known
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final
from uuid import UUID

from crbd.state.fields import FieldReader
from crbd.state.header import MAX_WRITER
from crbd.state.kinds import StateKind

MAX_BLOB: Final = 512 * 1024
"""Bytes of an engine's blob: swtpm's bound (PTM_STATE_BLOB_SIZE times 128), so that any state can be converted."""
MAX_NAME: Final = 255
MAX_PROFILE: Final = 255
"""Bytes of UTF-8."""
FINGERPRINT_SIZE: Final = 32
MAX_LOCALITY: Final = 4
SECTION_OF: Final = {
    StateKind.PERMANENT: "tpm.permanent",
    StateKind.VOLATILE: "tpm.volatile",
    StateKind.SAVESTATE: "tpm.savestate",
}
SESSION: Final = "session"
IDENTITY: Final = "identity"

_ENGINE = Struct("<HHHHB")
_SESSION = Struct("<BBII")
_IDENTITY = Struct("<16sQQH")
_ESTABLISHED = 0x01


@dataclass(frozen=True, slots=True)
class EngineStamp:
    """Which engine wrote a blob, and in which of its formats. Raises ValueError for what has no saved form."""

    major: int
    minor: int
    micro: int
    profile: str = ""
    """Name of the libtpms profile the TPM was made with; empty before libtpms 0.10."""
    format_level: int = 0
    """libtpms' StateFormatLevel; 0 before libtpms 0.10."""

    def __post_init__(self) -> None:
        for number in (self.major, self.minor, self.micro, self.format_level):
            _check_number("engine version or format level", number, 16)
        _check_text("profile", self.profile, MAX_PROFILE)

    @property
    def version(self) -> str:
        """As libtpms prints it."""
        return f"{self.major}.{self.minor}.{self.micro}"


@dataclass(frozen=True, slots=True)
class TpmState:
    """One blob of the engine. Raises ValueError for what has no saved form."""

    data: bytes
    engine: EngineStamp

    def __post_init__(self) -> None:
        if not 1 <= len(self.data) <= MAX_BLOB:
            raise ValueError(f"an engine's state has {len(self.data)} bytes, must have 1 to {MAX_BLOB}")


@dataclass(frozen=True, slots=True)
class Session:
    """What a client had set up. Raises ValueError for what has no saved form."""

    locality: int
    buffer_size: int
    """Bytes, as agreed by SET_BUFFERSIZE."""
    established: bool
    """The tpmEstablished flag."""
    last_command: int
    """Its command code (TPM 2.0 Part 2, TPM_CC); 0 where none ran since power-on."""

    def __post_init__(self) -> None:
        if not 0 <= self.locality <= MAX_LOCALITY:
            raise ValueError(f"locality is {self.locality}")
        _check_number("buffer_size", self.buffer_size, 32)
        _check_number("last_command", self.last_command, 32)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which TPM this is. Raises ValueError for what has no saved form."""

    uuid: UUID
    name: str
    """The operator's name for it: printable, at most 255 bytes of UTF-8, may be empty."""
    generation: int
    """Number of this document among the TPM's (64 bits)."""
    writer: str
    """Name and version of the program that wrote the document: printable, 1 to 64 bytes of UTF-8."""
    created: int
    """When the TPM was made: seconds since 1970 (64 bits)."""
    ek_fingerprint: bytes = b""
    """SHA-256 of the endorsement key's public area, or empty."""

    def __post_init__(self) -> None:
        _check_text("name", self.name, MAX_NAME)
        _check_text("writer", self.writer, MAX_WRITER)
        _check_number("generation", self.generation, 64)
        _check_number("created", self.created, 64)
        if not self.writer:
            raise ValueError("writer is empty")
        if len(self.ek_fingerprint) not in (0, FINGERPRINT_SIZE):
            raise ValueError(f"ek_fingerprint has {len(self.ek_fingerprint)} bytes")


def encode_tpm_state(state: TpmState) -> bytes:
    """Body of a `tpm.*` section, version 1."""
    engine = state.engine
    profile = engine.profile.encode("utf-8")
    head = _ENGINE.pack(engine.major, engine.minor, engine.micro, engine.format_level, len(profile))
    return head + profile + state.data


def decode_tpm_state(data: bytes, name: str, section: str) -> TpmState:
    """The other way. Raises StateDamagedError."""
    reader = FieldReader(data, name, f"section {section}")
    major, minor, micro = (reader.u16(part) for part in ("major", "minor", "micro"))
    format_level = reader.u16("format level")
    profile = reader.text("profile", reader.u8("profile length"))
    size = len(data) - reader.position
    if not 1 <= size <= MAX_BLOB:
        raise reader.wrong("blob", f"has {size} bytes, must have 1 to {MAX_BLOB}")
    return TpmState(reader.rest(), EngineStamp(major, minor, micro, profile, format_level))


def encode_session(session: Session) -> bytes:
    """Body of the `session` section, version 1."""
    flags = _ESTABLISHED if session.established else 0
    return _SESSION.pack(session.locality, flags, session.buffer_size, session.last_command)


def decode_session(data: bytes, name: str) -> Session:
    """The other way. Raises StateDamagedError."""
    reader = FieldReader(data, name, "section session")
    locality = reader.u8("locality")
    if locality > MAX_LOCALITY:
        raise reader.wrong("locality", f"is {locality}")
    flags = reader.u8("flags")
    if flags & ~_ESTABLISHED:
        raise reader.wrong("flags", f"are {flags:#x}")
    session = Session(locality, reader.u32("buffer size"), bool(flags & _ESTABLISHED), reader.u32("last command"))
    reader.end()
    return session


def encode_identity(identity: Identity) -> bytes:
    """Body of the `identity` section, version 1."""
    name = identity.name.encode("utf-8")
    writer = identity.writer.encode("utf-8")
    fingerprint = identity.ek_fingerprint
    head = _IDENTITY.pack(identity.uuid.bytes, identity.generation, identity.created, len(name))
    return b"".join((head, name, bytes((len(writer),)), writer, bytes((len(fingerprint),)), fingerprint))


def decode_identity(data: bytes, name: str) -> Identity:
    """The other way. Raises StateDamagedError."""
    reader = FieldReader(data, name, "section identity")
    uuid = UUID(bytes=reader.take("uuid", 16))
    generation = reader.u64("generation")
    created = reader.u64("created")
    length = reader.u16("name length")
    if length > MAX_NAME:
        raise reader.wrong("name length", f"is {length}, at most {MAX_NAME} can be")
    own_name = reader.text("name", length)
    length = reader.u8("writer length")
    if not 1 <= length <= MAX_WRITER:
        raise reader.wrong("writer length", f"is {length}, must be 1 to {MAX_WRITER}")
    writer = reader.text("writer", length)
    length = reader.u8("fingerprint length")
    if length not in (0, FINGERPRINT_SIZE):
        raise reader.wrong("fingerprint length", f"is {length}, must be 0 or {FINGERPRINT_SIZE}")
    fingerprint = reader.take("fingerprint", length)
    reader.end()
    return Identity(uuid, own_name, generation, writer, created, fingerprint)


def _check_number(field: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{field} is {value}, more than {bits} bits")


def _check_text(field: str, text: str, limit: int) -> None:
    if not text.isprintable() or len(text.encode("utf-8", "replace")) > limit:
        raise ValueError(f"{field} must be printable and at most {limit} bytes long: {text!r}")
