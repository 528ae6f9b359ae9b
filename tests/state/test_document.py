"""The document both ways: every field, every byte of the frame, and what shows without a key."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
from hypothesis import given

from crbd.engine.port import EngineVersion
from crbd.errors import StateDamagedError, StateError, StateIdentityError, StateUnfinishedError
from crbd.state.document import (
    NEWEST,
    Document,
    check_complete,
    check_identity,
    decode,
    encode,
    key_slots,
    peek_header,
    verify,
)
from crbd.state.header import MAGIC, MAX_DOCUMENT, Suite
from crbd.state.kinds import StateKind
from crbd.state.saved import SECTION_OF, EngineStamp, Identity, Session, TpmState, encode_session
from crbd.state.sealing import Seal
from crbd.state.sections import Section, encode_body

from . import samples as s


@given(s.documents)
def test_both_ways(document: Document) -> None:
    assert decode(encode(document)) == document


@given(s.documents)
def test_both_ways_sealed(document: Document) -> None:
    seal = Seal.create(document.identity.uuid, [s.key()])
    data = encode(document, seal)
    assert decode(data, [s.key()]) == document
    assert decode(data, seal) == document


def test_the_strategies_know_every_field() -> None:
    """A field that a strategy does not vary would be saved by accident or not at all."""
    fields = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Document, Identity, Session)}
    assert fields[Document] == {
        *("identity", "writer_id", "written", "permanent", "volatile", "savestate", "crb", "session"),
        *("checkpoint", "unknown"),
    }
    assert fields[Identity] == {"uuid", "name", "generation", "writer", "created", "ek_fingerprint"}
    assert fields[Session] == {"locality", "buffer_size", "established", "last_command"}
    assert {field.name for field in dataclasses.fields(TpmState)} == {"data", "engine"}


def test_the_saved_engine_version_has_all_of_the_running_one() -> None:
    running = {field.name for field in dataclasses.fields(EngineVersion)}
    assert {field.name for field in dataclasses.fields(EngineStamp)} == running | {"profile", "format_level"}


def test_the_header_repeats_the_document() -> None:
    """Every field of a header is the document's or the format's own."""
    header = verify(encode(s.sample()))
    document = s.sample()
    of_format = {"format_version": 3, "oldest_reader": 3, "suite": Suite.PLAIN}
    of_document = {"uuid": document.identity.uuid, "generation": 7, "writer": s.WRITER}
    of_document |= {"writer_id": document.writer_id, "written": document.written}
    assert dataclasses.asdict(header) == of_format | of_document


def test_every_kind_has_a_section_and_a_field() -> None:
    document = s.sample()
    assert set(SECTION_OF) == set(StateKind)
    assert set(SECTION_OF.values()) < set(NEWEST)
    assert document.state(StateKind.PERMANENT) is document.permanent
    assert document.state(StateKind.VOLATILE) is document.volatile
    assert document.state(StateKind.SAVESTATE) is document.savestate


def test_layout_byte_by_byte() -> None:
    identity = Identity(s.UUID_A, "é", 2, "w 1", 3)
    document = Document(identity, b"I" * 16, 4, permanent=TpmState(b"P", EngineStamp(0, 9, 2)))
    engine = struct.pack("<HHHHB", 0, 9, 2, 0, 0) + b"P"
    own = s.UUID_A.bytes + struct.pack("<QQH", 2, 3, 2) + "é".encode() + b"\x03w 1" + b"\x00"
    body = struct.pack("<H", 2)
    body += b"\x08identity" + struct.pack("<HHI", 1, 0, len(own)) + own
    body += b"\x0dtpm.permanent" + struct.pack("<HHI", 1, 0, len(engine)) + engine
    head = b"\x8aCRBD\r\n\x1a" + struct.pack("<HHHHIQ", 3, 3, 0, 72, len(body), 2)
    head += s.UUID_A.bytes + b"I" * 16 + struct.pack("<Q", 4) + b"\x03w 1"
    assert len(head) == 72
    assert encode(document) == head + body + hashlib.sha256(head + body).digest()


def test_layout_of_the_session() -> None:
    session = Session(locality=3, buffer_size=0xF80, established=True, last_command=0x17B)
    assert encode_session(session) == bytes.fromhex("03 01 800f0000 7b010000")


def test_a_header_is_read_from_the_first_bytes_alone() -> None:
    seal = Seal.create(s.UUID_A, [s.key()])
    data = encode(s.sample(), seal)
    assert peek_header(data[:1024]) == verify(data)
    assert peek_header(data[:79]).sealed
    assert not peek_header(encode(s.sample())[:79]).sealed


def test_key_slots_show_without_a_key() -> None:
    seal = Seal.create(s.UUID_A, [s.key(), s.passphrase(label="safe")])
    slots = key_slots(encode(s.sample(), seal))
    assert [slot.says for slot in slots] == ["key file 'key'", "passphrase 'safe'"]
    assert key_slots(encode(s.sample())) == ()


def test_identity_and_completeness_are_judged_by_name() -> None:
    data = encode(s.sample())
    check_identity(verify(data), s.UUID_A, "f")
    with pytest.raises(StateIdentityError, match=f"f belongs to instance {s.UUID_A}, not to {s.UUID_B}") as caught:
        check_identity(verify(data), s.UUID_B, "f")
    assert caught.value.remedy
    check_complete(s.sample(), "f")
    marker = Document(s.sample().identity, b"I" * 16, 0)
    with pytest.raises(StateUnfinishedError, match="its making was interrupted"):
        check_complete(decode(encode(marker)), "f")


def test_what_is_carried_on_gives_way_to_what_is_known() -> None:
    newer = Section("session", 2, b"future", may_skip=True)
    document = dataclasses.replace(s.sample(), session=None, unknown=(newer,))
    assert decode(encode(document)) == document
    document = dataclasses.replace(document, session=s.sample().session)
    assert decode(encode(document)).unknown == ()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: Session(5, 0, False, 0), "locality"),
        (lambda: Session(0, 1 << 32, False, 0), "buffer_size"),
        (lambda: Session(0, 0, False, -1), "last_command"),
        (lambda: Identity(s.UUID_A, "a\nb", 0, "w", 0), "name"),
        (lambda: Identity(s.UUID_A, "x" * 256, 0, "w", 0), "name"),
        (lambda: Identity(s.UUID_A, "", 0, "", 0), "writer"),
        (lambda: Identity(s.UUID_A, "", 0, "w" * 65, 0), "writer"),
        (lambda: Identity(s.UUID_A, "", 1 << 64, "w", 0), "generation"),
        (lambda: Identity(s.UUID_A, "", 0, "w", 1 << 64), "created"),
        (lambda: Identity(s.UUID_A, "", 0, "w", 0, b"x"), "ek_fingerprint"),
        (lambda: EngineStamp(0, 1 << 16, 0), "engine version"),
        (lambda: EngineStamp(0, 0, 0, "\x00"), "profile"),
        (lambda: TpmState(b"", EngineStamp(0, 9, 2)), "0 bytes"),
        (lambda: TpmState(bytes(512 * 1024 + 1), EngineStamp(0, 9, 2)), "524289 bytes"),
        (lambda: Section("No", 1, b""), "section name"),
        (lambda: Section("a", 0, b""), "version"),
        (lambda: encode_body((Section("a", 1, b""), Section("a", 1, b""))), "each name once"),
        (lambda: encode_body(tuple(Section(f"a{n}", 1, b"") for n in range(65))), "65 sections"),
        (lambda: dataclasses.replace(s.sample(), writer_id=b""), "writer_id"),
        (lambda: dataclasses.replace(s.sample(), written=-1), "written"),
        (lambda: dataclasses.replace(s.sample(), unknown=(Section("a", 1, b""),)), "may-skip"),
        (lambda: encode(s.sample(), format_version=4), "format version 4"),
        (lambda: encode(s.sample(), format_version=0), "format version 0"),
        (lambda: encode(s.sample(s.UUID_B), Seal.create(s.UUID_A, [s.key()])), "the seal is of instance"),
    ],
)
def test_what_has_no_saved_form_is_refused_when_made(wrong: object, text: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=text):
        wrong()


def test_a_document_over_the_cap_is_not_written() -> None:
    huge = dataclasses.replace(s.sample(), unknown=(Section("x", 1, bytes(MAX_DOCUMENT), may_skip=True),))
    with pytest.raises(StateError, match="at most 4194304"):
        encode(huge)
    fits = MAX_DOCUMENT - len(encode(dataclasses.replace(s.sample(), unknown=(Section("x", 1, b"", may_skip=True),))))
    largest = dataclasses.replace(s.sample(), unknown=(Section("x", 1, bytes(fits), may_skip=True),))
    assert len(encode(largest)) == MAX_DOCUMENT
    assert decode(encode(largest)) == largest
    longer = s.with_digest(encode(largest)[:-32] + b"x")
    with pytest.raises(StateDamagedError, match="is longer than any, 4194305 bytes"):
        decode(longer)


def test_the_magic_shows_a_transfer_as_text() -> None:
    assert MAGIC[0] >= 0x80
    assert b"\r\n" in MAGIC
