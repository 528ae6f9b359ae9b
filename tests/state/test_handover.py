"""The handover: what goes in comes out, with its descriptors; all else is refused by one kind of error."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.control import messages as m
from crbd.control.connection import ConnectionSnapshot, Received, Rejected
from crbd.errors import StateDamagedError, StateError, StateNewerError
from crbd.state.handover import (
    ControlLink,
    DataLink,
    Handover,
    InstanceFacts,
    Listener,
    RegistersLink,
    decode,
    descriptors_in,
    encode,
)
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.sections import Section, decode_body, encode_body
from crbd.state.side import SideState
from crbd.tpm.results import TpmResult
from crbd.vfiouser.capabilities import Capabilities
from crbd.vfiouser.configuration import INITIAL
from crbd.vfiouser.connection import Snapshot

from . import samples as s

SPACE = INITIAL[:0x10] + b"\0\x20\xff\xfe" + INITIAL[0x14:]
"""PCI configuration space with BAR 0 at 0xfeff2000."""
HEAD = 11
DIGEST = 32
FULL = Handover(
    pid=4711,
    frozen_at=1 << 60,
    writer="crbd 9.9",
    document=b"the document",
    instance=InstanceFacts(
        powered=True,
        may_manufacture=True,
        client_sized=True,
        untouched=True,
        handed_in=frozenset({StateKind.PERMANENT, StateKind.VOLATILE}),
        incoming=Session(3, 4096, established=True, last_command=0x145),
    ),
    changed={StateKind.PERMANENT: b"new", StateKind.VOLATILE: None},
    held={StateKind.PERMANENT: b"old", StateKind.VOLATILE: b"kept"},
    held_side=SideState(s.registers(), Session(1, 4096, established=False, last_command=0), checkpoint=True),
    secrets={"seal": bytes(range(32)), "file": b"f" * 16, "migration": b"m" * 32},
    pid_file="/run/crbd.pid",
    listeners={"ctrl": Listener((66, 123456)), "data": Listener(), "registers": Listener((66, 7))},
    links=(
        ControlLink(
            ConnectionSnapshot(
                b"\0\0\0\x10",
                waiting=((4, 17),),
                events=(
                    Received(m.Init(m.InitFlag(1))),
                    Received(m.SetDataFd(18)),
                    Rejected(TpmResult.BAD_ORDINAL, close=False, reason="unknown command code 0x000000ff"),
                ),
            ),
            unsent=b"\0\0",
            has_turn=True,
            owed=True,
        ),
        ControlLink(ConnectionSnapshot(b"abc", may_be_padding=True)),
        DataLink(b"\x80\x01", b"unsent"),
        RegistersLink(Snapshot(b"\1\0\x09", Capabilities(write_multiple=True), SPACE), b"unsent", with_buffer=True),
        RegistersLink(),
    ),
)
NAMED = {"link.0.with.0": 17, "link.0.request.1": 18}


def with_sections(data: bytes, *sections: Section) -> bytes:
    """The handover with some of its sections replaced, or further ones."""
    by_name = {section.name: section for section in decode_body(data[HEAD:-DIGEST], "test")}
    by_name |= {section.name: section for section in sections}
    whole = data[:HEAD] + encode_body(tuple(by_name.values()))
    return whole + hashlib.sha256(whole).digest()


def test_all_of_it_comes_out_again() -> None:
    assert descriptors_in(FULL.links) == NAMED
    assert decode(encode(FULL), NAMED) == replace(FULL, descriptors=NAMED)


def test_the_least_comes_out_again() -> None:
    least = Handover(1, 0, "crbd 1", b"", InstanceFacts(powered=False, may_manufacture=False))
    assert decode(encode(least), {}) == least


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_descriptor_that_did_not_come_along(name: str) -> None:
    with pytest.raises(StateDamagedError, match=f"the descriptor {name} did not come along"):
        decode(encode(FULL), {other: fd for other, fd in NAMED.items() if other != name})


@pytest.mark.parametrize(
    "section", [Section("link.3", 2, b""), Section("registers", 1, b""), Section("listener.telnet", 1, b"")]
)
def test_what_a_later_release_added_is_refused_by_name(section: Section) -> None:
    with pytest.raises(StateNewerError, match=f"section {section.name} of version {section.version}"):
        decode(with_sections(encode(FULL), section), NAMED)


def test_what_a_later_release_says_may_be_skipped_is_skipped() -> None:
    extended = with_sections(encode(FULL), Section("weather", 7, b"rain", may_skip=True))
    assert decode(extended, NAMED) == replace(FULL, descriptors=NAMED)


def test_a_later_format() -> None:
    whole = bytearray(encode(FULL)[:-DIGEST])
    whole[9] = 2
    with pytest.raises(StateNewerError, match="format version 2"):
        decode(bytes(whole) + hashlib.sha256(whole).digest(), NAMED)


@pytest.mark.parametrize("section", ["handover", "document", "instance", "link.0"])
def test_what_must_be_there(section: str) -> None:
    whole = encode(FULL)
    kept = tuple(each for each in decode_body(whole[HEAD:-DIGEST], "test") if each.name != section)
    whole = whole[:HEAD] + encode_body(kept)
    with pytest.raises(StateDamagedError, match=r"is missing|are not numbered"):
        decode(whole + hashlib.sha256(whole).digest(), NAMED)


@given(st.integers(0, len(encode(FULL)) - 1), st.integers(1, 255))
def test_a_changed_byte_is_seen(place: int, change: int) -> None:
    data = bytearray(encode(FULL))
    data[place] ^= change
    with pytest.raises(StateDamagedError):
        decode(bytes(data), NAMED)


@given(st.sampled_from(["handover", "instance", "incoming", "listener.ctrl", "link.0", "link.2", "link.3"]), st.data())
def test_any_section_gives_a_handover_or_the_one_error(name: str, data: st.DataObject) -> None:
    """Behind a right digest everything may stand: a predecessor is trusted with nothing but the descriptors' names."""
    before = next(each for each in decode_body(encode(FULL)[HEAD:-DIGEST], "test") if each.name == name).data
    body = bytearray(before)
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=4))
    whole = with_sections(encode(FULL), Section(name, 1, bytes(body)))
    try:
        decode(whole, NAMED)
    except StateError:
        return
