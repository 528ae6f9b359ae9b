"""What can be said of a state directory or a document at rest: to show it (`Report`), and to find what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from crbd.state.document import Document, check_complete, key_slots, verify
from crbd.state.header import DIGEST_SIZE, Header, parse_header
from crbd.state.keys import KeySlot, UserKey
from crbd.state.kinds import StateKind
from crbd.state.sealing import Seal, area_length
from crbd.state.sections import Sections, decode_body
from crbd.state.swtpm import BlobFlag
from crbd.store.directory import open_directory
from crbd.store.offline import OfflineState, kept_files, read_file
from crbd.store.transfer import opened

_SWTPM_HEAD = Struct(">BBHHI")


@dataclass(frozen=True, slots=True)
class DocumentReport:
    """One document. What stands behind the seal is None where it was sealed and no key was given."""

    header: Header
    size: int
    """Bytes of the whole document."""
    key_slots: tuple[KeySlot, ...]
    document: Document | None
    sections: Sections | None
    """As stored, before the ladder."""


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot of the two-slot file and the document in it."""

    slot_generation: int
    writer_id: bytes
    document: DocumentReport


@dataclass(frozen=True, slots=True)
class StateReport:
    """A directory in crbd's layout."""

    current: SlotReport
    fell_back: bool
    """The other slot is unreadable and may have held a newer generation."""
    previous: SlotReport | None
    kept: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class SwtpmFile:
    """One file in swtpm's layout."""

    path: Path
    size: int
    """Bytes of the file."""
    version: int
    """Of swtpm's blob form."""
    encrypted: bool


def report_document(data: bytes, keys: tuple[UserKey, ...], name: str) -> DocumentReport:
    """All that shows of a document, with `keys` or without, once it is known to be whole.

    Raises a StateError for one that is damaged, not readable by this release, or not opened by the keys that were
    given.
    """
    header = verify(data, name)
    slots = key_slots(data, name)
    if header.sealed and not keys:
        return DocumentReport(header, len(data), slots, None, None)
    with opened(data, keys, name) as (document, seal):
        return DocumentReport(header, len(data), slots, document, _sections(data, seal, name))


def report_state(state: OfflineState, keys: tuple[UserKey, ...]) -> StateReport:
    """All that shows of an open state. Raises a StateError."""
    current, previous = state.current(), state.previous()
    before = None
    if previous is not None:
        document = report_document(previous.payload, keys, f"{state.name} (the generation before)")
        before = SlotReport(previous.generation, previous.writer_id, document)
    document = report_document(current.payload, keys, state.name)
    return StateReport(
        SlotReport(current.generation, current.writer_id, document),
        current.fell_back,
        before,
        tuple(kept_files(state.directory)),
    )


def verify_state(state: OfflineState, keys: tuple[UserKey, ...]) -> StateReport:
    """As `report_state`, and the TPM must be complete and the kept documents whole. Raises a StateError."""
    found = report_state(state, keys)
    for slot in (found.current, found.previous):
        if slot is not None and slot.document.document is not None:
            check_complete(slot.document.document, state.name)
    for path in found.kept:
        if ".format-" in path.name:
            verify(read_file(path), str(path))
    return found


def report_swtpm(directory: Path) -> list[SwtpmFile]:
    """What lies in a directory in swtpm's layout, by kind. Raises a StateError.

    The files' own form is looked at, not the engine's state inside.
    """
    store = open_directory(directory, create=False)
    try:
        found = []
        for kind in StateKind:
            path = directory / f"tpm2-00.{kind.nvram_name}"
            if path.exists():
                data = read_file(path)
                version, _, _, flags, _ = _SWTPM_HEAD.unpack(data[: _SWTPM_HEAD.size].ljust(_SWTPM_HEAD.size, b"\0"))
                found.append(SwtpmFile(path, len(data), version, bool(flags & BlobFlag.ENCRYPTED)))
                if not found[-1].encrypted:
                    store.load(kind)
        return found
    finally:
        store.close()


def _sections(data: bytes, seal: Seal | None, name: str) -> Sections:
    """The sections of a document that was decoded before."""
    header, header_length, body_length = parse_header(data, name)
    whole = memoryview(data)[:-DIGEST_SIZE]
    at = header_length + (area_length(whole[header_length:], name) if header.sealed else 0)
    body = data[at : at + body_length]
    return decode_body(body if seal is None else seal.decrypt(data[:header_length], body, name), name)
