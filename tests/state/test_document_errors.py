"""Every way in which a document can be unfit: the class (and so the exit code), the place, the name, the remedy."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import pytest

from crbd.errors import (
    StateDamagedError,
    StateEmptyError,
    StateError,
    StateForeignError,
    StateNewerError,
    StateSealedError,
    StateUnsealedError,
    StateWrongKeyError,
)
from crbd.state import crb
from crbd.state.document import decode, encode, key_slots, peek_header, verify
from crbd.state.header import MAX_DOCUMENT, Header, Suite
from crbd.state.keys import RawKey
from crbd.state.saved import encode_identity
from crbd.state.sealing import Seal
from crbd.state.sections import Section
from crbd.state.swtpm import encode_file

from . import samples as s

PLAIN = encode(s.sample())
SEALED = encode(s.sample(), Seal.create(s.UUID_A, [s.key()], entropy=s.counting_entropy()))
HEADER = verify(PLAIN)
HEADER_SIZE = 69 + len(s.WRITER)
IDENTITY = Section("identity", 1, encode_identity(s.sample().identity))
NAME = "/where/it/lies"
PAGE = crb.encode(crb.lower(s.registers(), 2))[1]


def changed(data: bytes, offset: int, value: bytes) -> bytes:
    """`data` with other bytes somewhere, and the right SHA-256 all the same."""
    return s.resummed(data[:offset] + value + data[offset + len(value) :])


def holding(*sections: Section, header: Header = HEADER) -> bytes:
    return s.plain(header, (IDENTITY, *sections))


def with_body(body: bytes) -> bytes:
    return s.with_digest(PLAIN[:16] + len(body).to_bytes(4, "little") + PLAIN[20:HEADER_SIZE] + body)


def header(
    format_version: int = 3,
    oldest_reader: int = 3,
    uuid: UUID = HEADER.uuid,
    generation: int = HEADER.generation,
    writer: str = HEADER.writer,
) -> Header:
    return Header(
        format_version, oldest_reader, Suite.PLAIN, generation, uuid, writer, HEADER.writer_id, HEADER.written
    )


def section(name: str, data: bytes, version: int = 1) -> bytes:
    return holding(Section(name, version, data))


def area(change: Callable[[bytearray], None]) -> bytes:
    data = bytearray(SEALED)
    change(data)
    return s.resummed(bytes(data))


DAMAGED = {
    "cut in the magic": (PLAIN[:5], "field magic"),
    "cut in the header": (PLAIN[:40], "field uuid"),
    "cut in the body": (PLAIN[:-40], "is cut short"),
    "a bit is another": (PLAIN[:200] + bytes((PLAIN[200] ^ 1,)) + PLAIN[201:], "SHA-256 is another"),
    "a byte too many": (PLAIN + b"x", "SHA-256 is another"),
    "no state at all": (b"#!/bin/sh\n" * 20, "field magic"),
    "too long": (PLAIN[:8] + bytes(MAX_DOCUMENT), "at most 4194304"),
    "format version 0": (changed(PLAIN, 8, b"\0\0\0\0"), "field oldest_reader"),
    "oldest reader after the format": (changed(PLAIN, 10, b"\4\0"), "field oldest_reader"),
    "header length": (changed(PLAIN, 14, b"\x10\0"), "field header_length"),
    "header length beyond": (changed(PLAIN, 14, b"\xff\xff"), "field header_length"),
    "body length": (changed(PLAIN, 16, b"\xff\xff\xff\xff"), "field body_length"),
    "writer length": (changed(PLAIN, 68, b"\x41"), "field writer_length"),
    "writer not UTF-8": (changed(PLAIN, 69, b"\xff"), "field writer: is not UTF-8"),
    "writer with a line end": (changed(PLAIN, 69, b"\n"), "unprintable"),
    "no section count": (with_body(b"\1"), "field section count"),
    "too many sections": (with_body(b"\x41\0"), "field section count: is 65"),
    "section is missing": (with_body(b"\1\0"), "field name length of section 1"),
    "section name": (with_body(b"\1\0\1A\1\0\0\0\0\0\0\0"), "field name of section 1"),
    "section version 0": (with_body(b"\1\0\1a\0\0\0\0\0\0\0\0"), "version of section a"),
    "section flags": (with_body(b"\1\0\1a\1\0\2\0\0\0\0\0"), "flags of section a"),
    "section of 4 GiB": (with_body(b"\1\0\1a\1\0\0\0\xff\xff\xff\xff"), "data of section a"),
    "bytes after the sections": (with_body(b"\0\0x"), "body: has 1 bytes too many"),
    "section twice": (with_body(b"\2\0" + b"\1a\1\0\1\0\0\0\0\0" * 2), "section a: is there twice"),
    "no identity": (s.plain(HEADER, ()), "section identity: is missing"),
    "identity of another": (s.plain(header(uuid=s.UUID_B), (IDENTITY,)), "section identity, field uuid"),
    "another generation": (s.plain(header(generation=8), (IDENTITY,)), "section identity, field generation"),
    "another writer": (s.plain(header(writer="w"), (IDENTITY,)), "section identity, field writer"),
    "identity too long": (s.plain(HEADER, (Section("identity", 1, IDENTITY.data + b"x"),)), "identity: has 1 bytes"),
    "session locality": (section("session", bytes((5,)) + bytes(9)), "section session, field locality"),
    "session flags": (section("session", bytes((0, 2)) + bytes(8)), "section session, field flags"),
    "session cut": (section("session", bytes(9)), "section session, field last command"),
    "session too long": (section("session", bytes(11)), "section session: has 1 bytes"),
    "checkpoint with data": (section("checkpoint", b"x"), "section checkpoint: has data"),
    "blob empty": (section("tpm.permanent", bytes(9)), "section tpm.permanent, field blob"),
    "blob too long": (section("tpm.volatile", bytes(9 + 512 * 1024 + 1)), "section tpm.volatile, field blob"),
    "profile cut": (section("tpm.permanent", bytes(8) + b"\x09x"), "section tpm.permanent, field profile"),
    "profile not printable": (section("tpm.permanent", bytes(8) + b"\1\n" + b"x"), "field profile"),
    "registers": (section("crb", b"\xff", 3), "section crb"),
    "registers of an older format": (section("crb", b"", 2), "section crb: has version 2"),
    "registers of a later format": (
        s.plain(header(format_version=2, oldest_reader=2), (IDENTITY, Section("crb", 3, b""))),
        "in format version 2 it has 2",
    ),
    "old registers": (
        s.plain(header(format_version=1, oldest_reader=1), (IDENTITY, Section("crb", 1, b"x"))),
        "section crb",
    ),
    "an old register that overflows": (
        s.plain(
            header(format_version=2, oldest_reader=2),
            (IDENTITY, Section("crb", 2, PAGE[:0x0C] + b"\xff\xff\xff\xff" + PAGE[0x10:])),
        ),
        "section crb: the saved CRB registers cannot be restored: LOC_STS",
    ),
    "more unknown sections than can be carried": (
        holding(*(Section(f"x{number}", 1, b"", may_skip=True) for number in range(59))),
        "59 sections",
    ),
    "no key slots": (area(lambda data: data.__setitem__(slice(HEADER_SIZE, HEADER_SIZE + 4), bytes(4))), "key slots"),
    "key slots of 4 GiB": (
        area(lambda data: data.__setitem__(slice(HEADER_SIZE, HEADER_SIZE + 4), b"\xff" * 4)),
        "key slots, field length",
    ),
    "no key slot": (area(lambda data: data.__setitem__(slice(HEADER_SIZE + 4, HEADER_SIZE + 6), bytes(2))), "count"),
    "nine key slots": (area(lambda data: data.__setitem__(HEADER_SIZE + 4, 9)), "field count: is 9"),
    "key slot too long": (
        area(lambda data: data.__setitem__(slice(HEADER_SIZE + 6, HEADER_SIZE + 8), b"\xff\xff")),
        "length of key slot 1",
    ),
    "label": (area(lambda data: data.__setitem__(HEADER_SIZE + 9, 0)), "key slot 1, field label length"),
}
for field, place in (("name length", 32), ("writer length", 38), ("fingerprint length", 49)):
    identity = IDENTITY.data[:place] + b"\xfe" + b"\xff" * (place == 32) + IDENTITY.data[place + 1 + (place == 32) :]
    DAMAGED[field] = (s.plain(HEADER, (Section("identity", 1, identity),)), f"section identity, field {field}")


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str) -> None:
    data, text = DAMAGED[case]
    with pytest.raises(StateDamagedError) as caught:
        decode(data, [s.key()] if data[12:13] == b"\1" else None, NAME)
    assert text in str(caught.value)
    assert str(caught.value).startswith(NAME)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


OTHERS: dict[str, tuple[bytes, list[RawKey] | None, type[StateError], str]] = {
    "empty": (b"", None, StateEmptyError, "is empty"),
    "swtpm's file": (encode_file(b"state"), None, StateForeignError, "convert --to crbd"),
    "swtpm's linear file": (b"nilmptws" + bytes(200), None, StateForeignError, "convert --to crbd"),
    "sealed, no key": (SEALED, None, StateSealedError, "give key file 'key'"),
    "sealed, no keys": (SEALED, [], StateSealedError, "no key was given"),
    "sealed, wrong key": (SEALED, [s.other_key()], StateWrongKeyError, "none of the given keys"),
    "plain, with a key": (PLAIN, [s.key()], StateUnsealedError, "find out who replaced it"),
    "suite 2": (changed(PLAIN, 12, b"\2\0"), None, StateNewerError, "suite 2, written by crbd 0.1.0"),
    "format 4 for readers of 4": (
        changed(PLAIN, 8, b"\4\0\4\0"),
        None,
        StateNewerError,
        "format version 4, written by crbd 0.1.0, and asks for a reader of version 4; this release reads up to 3: "
        "install crbd 0.1.0 or a newer release",
    ),
    "unknown section": (
        section("hibernation", b"x"),
        None,
        StateNewerError,
        "section hibernation of version 1, written by crbd 0.1.0, that this release does not know and must not skip",
    ),
    "known section of a later version": (section("session", b"x", 2), None, StateNewerError, "session of version 2"),
    "registers of version 4": (section("crb", b"x", 4), None, StateNewerError, "section crb of version 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_reasons_have_errors_of_their_own(case: str) -> None:
    data, keys, error, text = OTHERS[case]
    before = bytes(data)
    with pytest.raises(error) as caught:
        decode(data, keys, NAME)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert NAME in str(caught.value)
    assert caught.value.remedy
    assert data == before


def test_a_future_document_that_older_readers_may_read() -> None:
    """Version 4 with a section that may be skipped: read, carried on, and written again in our own version."""
    future = header(format_version=4, oldest_reader=3)
    extra = Section("hibernation", 9, b"zzz", may_skip=True)
    document = decode(s.plain(future, (IDENTITY, extra)), None, NAME)
    assert document.unknown == (extra,)
    again = encode(document)
    assert verify(again).format_version == 3
    assert decode(again) == document


def test_a_longer_header_is_skipped() -> None:
    longer = PLAIN[:14] + (HEADER_SIZE + 3).to_bytes(2, "little") + PLAIN[16:HEADER_SIZE] + b"new" + PLAIN[HEADER_SIZE:]
    assert decode(s.resummed(longer)) == s.sample()


def test_a_newer_document_is_refused_by_its_first_bytes() -> None:
    with pytest.raises(StateNewerError):
        peek_header(changed(PLAIN, 8, b"\4\0\4\0")[:200], NAME)


def test_the_registers_refusal_names_the_register() -> None:
    version, body = crb.encode(s.registers())
    wrong = body[:1] + b"\x09" + body[2:]
    with pytest.raises(StateDamagedError, match=r"section crb: .*LOC_STS"):
        decode(section("crb", wrong, version), None, NAME)


def test_what_lies_is_found_in_all_entrances() -> None:
    for entrance in (verify, key_slots, peek_header):
        with pytest.raises(StateDamagedError, match=NAME):
            entrance(b"x" * 100, NAME)
