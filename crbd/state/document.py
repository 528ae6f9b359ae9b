"""The document: a whole TPM instance as bytes, to be kept, moved, or handed to a successor. docs/state-format.md.

    header | key slots, where sealed | body: sections, encrypted where sealed | SHA-256 of all before it

Theory. A document is judged from the outside in, and nothing behind a step is looked at before the step is passed:
length, magic, SHA-256 (is it whole?), format version (may this release read it?), suite and key (may this operator?),
authenticity, sections (are all known or may they be skipped?), ladder, fields. What is wrong is a child of StateError
that names the document, the place and the way out; each cause has its own exit code.

The SHA-256 stands in sealed documents too: it tells damage from a wrong key, and lets anyone verify a backup without
the key. It is no protection against malice; that is the suite's.

A plain document offered where a key was given is refused: whoever can write the file could otherwise replace a sealed
TPM by one of his own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from crbd.errors import (
    StateDamagedError,
    StateError,
    StateIdentityError,
    StateNewerError,
    StateUnfinishedError,
    StateUnsealedError,
)
from crbd.state import crb as registers
from crbd.state import ladder
from crbd.state.fields import damaged
from crbd.state.header import (
    DIGEST_SIZE,
    FORMAT_VERSION,
    MAX_DOCUMENT,
    MAX_GENERATION,
    WRITER_ID_SIZE,
    Header,
    Suite,
    encode_header,
    parse_header,
    peek_header,
    refuse_strangers,
)
from crbd.state.keys import Entropy, KeySlot, UserKey
from crbd.state.kinds import StateKind
from crbd.state.saved import (
    IDENTITY,
    SECTION_OF,
    SESSION,
    Identity,
    Session,
    TpmState,
    decode_identity,
    decode_session,
    decode_tpm_state,
    encode_identity,
    encode_session,
    encode_tpm_state,
)
from crbd.state.sealing import OVERHEAD, Seal, area_length, decode_slots, open_area, reopen_area, wrong_key
from crbd.state.sections import MAX_SECTIONS, Section, Sections, decode_body, encode_body
from crbd.state.side import CHECKPOINT

__all__ = ["Document", "Header", "check_complete", "check_generation", "check_identity", "decode", "encode"]
__all__ += ["encode_hashed", "key_slots", "open_seal", "peek_header", "rewrap", "verify"]

NEWEST: Final = {
    IDENTITY: 1,
    **dict.fromkeys(SECTION_OF.values(), 1),
    registers.SECTION: registers.VERSION,
    SESSION: 1,
    CHECKPOINT: 1,
}
"""The sections of the newest format version, in the order they are written, and their versions there."""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole instance. Raises ValueError for what has no stored form."""

    identity: Identity
    writer_id: bytes
    """16 random bytes of the process that writes."""
    written: int
    """When: seconds since 1970 (64 bits), by the caller's clock."""
    permanent: TpmState | None = None
    """None only in the marker of a manufacture that is not complete."""
    volatile: TpmState | None = None
    savestate: TpmState | None = None
    crb: registers.CrbStateV3 | None = None
    session: Session | None = None
    checkpoint: bool = False
    """The volatile state is one that no client asked to be stored (crbd.state.side)."""
    unknown: Sections = ()
    """Sections that may be skipped and were not understood: carried on unchanged."""

    def __post_init__(self) -> None:
        if len(self.writer_id) != WRITER_ID_SIZE:
            raise ValueError(f"writer_id has {len(self.writer_id)} bytes, must have {WRITER_ID_SIZE}")
        if not 0 <= self.written < 1 << 64:
            raise ValueError(f"written is {self.written}")
        if len(self.unknown) > MAX_SECTIONS - len(NEWEST) or not all(section.may_skip for section in self.unknown):
            raise ValueError("unknown sections must be few and may-skip")

    def state(self, kind: StateKind) -> TpmState | None:
        """The engine's blob of `kind`."""
        return {
            StateKind.PERMANENT: self.permanent,
            StateKind.VOLATILE: self.volatile,
            StateKind.SAVESTATE: self.savestate,
        }[kind]


@dataclass(frozen=True, slots=True)
class _Envelope:
    header: Header
    header_bytes: bytes
    area: bytes
    """The key slots; empty where the document is plain."""
    body: bytes
    """As stored."""


# -- writing
# ----------------------------------------------------------------------------------------------------------------------


def encode(document: Document, seal: Seal | None = None, *, format_version: int = FORMAT_VERSION) -> bytes:
    """The document's bytes, encrypted where there is a seal.

    Raises StateDowngradeError where an older `format_version` has no room for something, StateError where the document
    would be longer than any reader takes, ValueError for a format version that never was or another instance's seal.
    """
    return encode_hashed(document, seal, format_version=format_version)[0]


def encode_hashed(
    document: Document, seal: Seal | None = None, *, format_version: int = FORMAT_VERSION
) -> tuple[bytes, bytes]:
    """As `encode`, and the SHA-256 of the bytes, the one at their end included: it costs next to nothing here."""
    if not 1 <= format_version <= FORMAT_VERSION:
        raise ValueError(f"there is no format version {format_version}")
    if seal is not None and seal.uuid != document.identity.uuid:
        raise ValueError(f"the seal is of instance {seal.uuid}, the document of {document.identity.uuid}")
    body = encode_body(ladder.descend(_sections_of(document), format_version))
    identity = document.identity
    header = Header(
        format_version=format_version,
        oldest_reader=format_version,
        suite=Suite.PLAIN if seal is None else Suite.AES_256_GCM,
        generation=identity.generation,
        uuid=identity.uuid,
        writer=identity.writer,
        writer_id=document.writer_id,
        written=document.written,
    )
    if seal is None:
        parts = [encode_header(header, len(body)), body]
    else:
        head = encode_header(header, len(body) + OVERHEAD)
        parts = [head, seal.encode_area(), seal.encrypt(head, body)]
    length = sum(map(len, parts)) + DIGEST_SIZE
    if length > MAX_DOCUMENT:
        raise StateError(
            f"the state of {identity.uuid} would be {length} bytes long, at most {MAX_DOCUMENT} can be",
            "this is a mistake of crbd; please report it",
        )
    return _with_digest(parts)


def rewrap(data: bytes, seal: Seal, name: str) -> bytes:
    """The same document with the key slots that `seal` has now; header and body keep their bytes.

    Raises a StateError for a document that is not the seal's.
    """
    envelope = _open(data, name)
    if not envelope.area:
        raise StateUnsealedError(f"{name} is not encrypted and has no keys", "encrypt it first: crbd state convert")
    _refuse_other_seal(envelope, seal, name)
    return _with_digest([envelope.header_bytes, seal.encode_area(), envelope.body])[0]


def _with_digest(parts: list[bytes]) -> tuple[bytes, bytes]:
    """The parts and their SHA-256 as one, and the SHA-256 of that."""
    running = hashlib.sha256()
    for part in parts:
        running.update(part)
    digest = running.digest()
    running.update(digest)
    return b"".join((*parts, digest)), running.digest()


def _sections_of(document: Document) -> Sections:
    """The sections of the newest format version, in NEWEST's order."""
    bodies: dict[str, bytes] = {IDENTITY: encode_identity(document.identity)}
    for kind, section in SECTION_OF.items():
        state = document.state(kind)
        if state is not None:
            bodies[section] = encode_tpm_state(state)
    if document.crb is not None:
        bodies[registers.SECTION] = registers.encode(document.crb)[1]
    if document.session is not None:
        bodies[SESSION] = encode_session(document.session)
    if document.checkpoint:
        bodies[CHECKPOINT] = b""
    known = tuple(Section(section, NEWEST[section], body) for section, body in bodies.items())
    return known + tuple(section for section in document.unknown if section.name not in bodies)


# -- reading
# ----------------------------------------------------------------------------------------------------------------------


def decode(data: bytes, keys: Iterable[UserKey] | Seal | None = None, name: str = "the TPM state") -> Document:
    """The document in `data`, whatever its format version; `name` (its path) goes into the errors.

    `keys`: the operator's keys, or the seal that `open_seal` gave. A document that is not sealed wants none. Raises a
    child of StateError and nothing else; `data` is not changed and nothing longer than it is allocated.
    """
    envelope = _open(data, name)
    body = _unsealed(envelope, keys, name)
    return _document_of(envelope.header, decode_body(body, name), name)


def open_seal(
    data: bytes,
    keys: Iterable[UserKey],
    name: str = "the TPM state",
    *,
    entropy: Entropy = secrets.token_bytes,
) -> Seal:
    """What is needed to read and to write on the sealed document in `data`; costs a scrypt per passphrase slot tried.

    Raises a StateError: StateUnsealedError for a plain document, StateSealedError for no keys, StateWrongKeyError.
    """
    envelope = _open(data, name)
    if not envelope.area:
        raise _not_sealed(name)
    return open_area(envelope.area, envelope.header.uuid, keys, name, entropy=entropy)


def reopen_seal(data: bytes, data_key: bytes, name: str = "the TPM state") -> Seal:
    """As `open_seal`, with the data key that another process had opened it to. Raises a StateError."""
    envelope = _open(data, name)
    if not envelope.area:
        raise _not_sealed(name)
    return reopen_area(envelope.area, envelope.header.uuid, data_key, name)


def key_slots(data: bytes, name: str = "the TPM state") -> tuple[KeySlot, ...]:
    """The key slots of a document, unverified; none where it is plain. Needs no key. Raises a StateError."""
    envelope = _open(data, name)
    return decode_slots(envelope.area, name) if envelope.area else ()


def verify(data: bytes, name: str = "the TPM state") -> Header:
    """See that a document is whole and readable by this release, as far as that shows without a key.

    Raises a StateError.
    """
    return _open(data, name).header


def check_identity(header: Header, expected: UUID, name: str) -> None:
    """Raises StateIdentityError where the document is not of the instance `expected`."""
    if header.uuid != expected:
        raise StateIdentityError(
            f"{name} belongs to instance {header.uuid}, not to {expected}",
            "name the right file, or make this one the instance's own: crbd state clone --policy replace",
        )


def check_generation(header: Header, name: str) -> None:
    """Raises StateDamagedError for a generation that no TPM comes to: one built upon it might be the last there is."""
    if header.generation > MAX_GENERATION // 2:
        raise StateDamagedError(
            f"{name} says that it is generation {header.generation}, which no TPM comes to",
            "find out who wrote it, and take another",
        )


def check_complete(document: Document, name: str) -> None:
    """Raises StateUnfinishedError for the marker of an interrupted manufacture: identity, and no permanent state."""
    if document.permanent is None:
        raise StateUnfinishedError(
            f"{name} was begun by {document.identity.writer} and holds no TPM yet: its making was interrupted",
            "remove it and make the TPM again with --create",
        )


def _open(data: bytes, name: str) -> _Envelope:
    """The parts, once the document is known to be whole and readable. Raises a StateError."""
    refuse_strangers(data, name)
    whole = len(data) - DIGEST_SIZE
    view = memoryview(data)
    if whole < 0 or hashlib.sha256(view[:whole]).digest() != view[whole:]:
        raise _why_not_whole(data, name)
    header, header_length, body_length = parse_header(data, name)
    area = area_length(view[header_length:whole], name) if header.sealed else 0
    end = header_length + area + body_length
    if end != whole:
        raise damaged(
            name, "header, field body_length", f"says {body_length}, {whole - header_length - area} are there"
        )
    body_at = header_length + area
    return _Envelope(header, data[:header_length], data[header_length:body_at], data[body_at:whole])


def _why_not_whole(data: bytes, name: str) -> StateError:
    """The error for a document whose SHA-256 is not right: cut short, if its lengths say so."""
    header, header_length, body_length = parse_header(data, name)
    least = header_length + body_length + DIGEST_SIZE
    if len(data) < least:
        return damaged(name, "document", f"is cut short: {len(data)} bytes of at least {least}")
    return damaged(name, "document", f"is not what {header.writer} wrote: its SHA-256 is another")


def _unsealed(envelope: _Envelope, keys: Iterable[UserKey] | Seal | None, name: str) -> bytes:
    """The body in clear text. Raises a StateError."""
    given = keys if keys is None or isinstance(keys, Seal) else tuple(keys)
    if not envelope.area:
        if given:
            raise _not_sealed(name)
        return envelope.body
    if isinstance(given, Seal):
        _refuse_other_seal(envelope, given, name)
        return given.decrypt(envelope.header_bytes, envelope.body, name)
    seal = open_area(envelope.area, envelope.header.uuid, given or (), name)
    try:
        return seal.decrypt(envelope.header_bytes, envelope.body, name)
    finally:
        seal.wipe()


def _refuse_other_seal(envelope: _Envelope, seal: Seal, name: str) -> None:
    check_identity(envelope.header, seal.uuid, name)
    if not seal.owns(envelope.area):
        raise wrong_key(decode_slots(envelope.area, name), name)


def _not_sealed(name: str) -> StateUnsealedError:
    return StateUnsealedError(
        f"{name} is not encrypted, and a key was given for it",
        "if it should be encrypted, find out who replaced it; if not, leave the key away",
    )


def _document_of(header: Header, sections: Sections, name: str) -> Document:
    """The sections judged, lifted and decoded. Raises StateDamagedError or StateNewerError."""
    known, unknown = _sort(header, sections, name)
    known = _lifted(known, header.format_version, name)
    body = {section.name: section.data for section in known}
    if IDENTITY not in body:
        raise damaged(name, f"section {IDENTITY}", "is missing")
    identity = decode_identity(body[IDENTITY], name)
    for field in ("uuid", "generation", "writer"):
        if getattr(identity, field) != getattr(header, field):
            raise damaged(name, f"section {IDENTITY}, field {field}", "is not what the header says")
    if body.get(CHECKPOINT):
        raise damaged(name, f"section {CHECKPOINT}", "has data")
    states = {
        kind: decode_tpm_state(body[section], name, section) for kind, section in SECTION_OF.items() if section in body
    }
    return Document(
        identity=identity,
        writer_id=header.writer_id,
        written=header.written,
        permanent=states.get(StateKind.PERMANENT),
        volatile=states.get(StateKind.VOLATILE),
        savestate=states.get(StateKind.SAVESTATE),
        crb=_decode_registers(body[registers.SECTION], name) if registers.SECTION in body else None,
        session=decode_session(body[SESSION], name) if SESSION in body else None,
        checkpoint=CHECKPOINT in body,
        unknown=unknown,
    )


def _lifted(known: Sections, version: int, name: str) -> Sections:
    try:
        return ladder.climb(known, version)
    except StateDamagedError as error:
        raise _of_registers(error, name) from error


def _decode_registers(body: bytes, name: str) -> registers.CrbStateV3:
    try:
        return registers.lift(registers.decode(registers.VERSION, body))
    except StateDamagedError as error:
        raise _of_registers(error, name) from error


def _of_registers(error: StateDamagedError, name: str) -> StateDamagedError:
    """`crbd.state.crb` names the register, and does not know the document."""
    return damaged(name, f"section {registers.SECTION}", error.what)


def _sort(header: Header, sections: Sections, name: str) -> tuple[Sections, Sections]:
    """The sections this release reads, and those it may skip. Raises StateNewerError, StateDamagedError."""
    known: Sections = ()
    unknown: Sections = ()
    for section in sections:
        wanted = NEWEST.get(section.name, 0)
        if section.name == registers.SECTION:
            wanted = min(header.format_version, wanted)
        if section.version == wanted:
            known += (section,)
        elif section.version <= NEWEST.get(section.name, 0):
            raise damaged(
                name,
                f"section {section.name}",
                f"has version {section.version}; in format version {header.format_version} it has {wanted}",
            )
        elif section.may_skip:
            unknown += (section,)
        else:
            raise StateNewerError(
                f"{name} has a section {section.name} of version {section.version}, written by {header.writer}, that "
                "this release does not know and must not skip",
                f"install {header.writer} or a newer release",
            )
    if len(unknown) > MAX_SECTIONS - len(NEWEST):
        raise damaged(name, "body", f"has {len(unknown)} sections that this release does not know")
    return known, unknown
