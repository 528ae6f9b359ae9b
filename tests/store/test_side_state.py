"""The bytes of the file beside swtpm's state: both ways, and any bytes at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.crb.config import CrbConfig
from crbd.errors import StateDamagedError, StateError, StateNewerError
from crbd.state.crb import encode, lower
from crbd.state.saved import Session
from crbd.state.sections import Section, encode_body
from crbd.state.side import MAGIC, SideState, decode_side, digest_of, encode_side
from tests.state import samples as s
from tests.state.mutations import mutations

SESSION = Session(4, 0xFFFF_FFFF, True, 0xFFFF_FFFF)
RECORDS = [
    {},
    {digest_of(b"v"): SideState()},
    {digest_of(b"v"): SideState(s.registers(), SESSION)},
    {
        digest_of(b""): SideState(s.registers(CrbConfig(max_command=4096)), None),
        digest_of(b"w"): SideState(None, SESSION, checkpoint=True),
    },
]
IT = "/state/crbd.registers"


@pytest.mark.parametrize("records", RECORDS)
def test_both_ways(records: dict[bytes, SideState]) -> None:
    data = encode_side(records)
    assert data.startswith(MAGIC)
    assert decode_side(data, IT) == records
    for size in range(len(data)):
        with pytest.raises(StateDamagedError, match=r"^/state/crbd\.registers: "):
            decode_side(data[:size], IT)
    with pytest.raises(StateDamagedError):
        decode_side(data + b"\0", IT)


def file_of(*sections: Section, version: int = 1, count: int = 1, magic: bytes = MAGIC) -> bytes:
    """With the right SHA-256."""
    body = encode_body(sections)
    head = magic + version.to_bytes(2, "little") + count.to_bytes(2, "little")
    return s.with_digest(head + bytes(32) + len(body).to_bytes(4, "little") + body)


def test_what_another_release_wrote() -> None:
    known = decode_side(file_of(Section("later", 1, b"x", may_skip=True)), IT)
    assert known == {bytes(32): SideState()}
    old = lower(s.registers(), 1)
    version, body = encode(old)
    assert version == 1
    assert decode_side(file_of(Section("crb", 1, body)), IT)[bytes(32)].crb is not None
    for data, what in (
        (file_of(Section("later", 1, b"x")), "section later of version 1"),
        (file_of(Section("session", 2, b"x")), "section session of version 2"),
        (file_of(Section("crb", 4, b"x")), "version 4"),
        (file_of(version=2), "has version 2"),
    ):
        with pytest.raises(StateNewerError, match=what):
            decode_side(data, IT)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (file_of(magic=b"crbdslot"), "magic"),
        (file_of(count=3), "record count, is 3|record count"),
        (file_of(count=0), "bytes too many"),
        (file_of(Section("crb", 3, b"x")), "section crb"),
        (file_of(Section("session", 1, b"x")), "section session"),
    ],
)
def test_damage_names_the_place(data: bytes, what: str) -> None:
    with pytest.raises(StateDamagedError, match=what) as error:
        decode_side(data, IT)
    assert IT in str(error.value)


def test_more_than_two_records_are_never_written() -> None:
    with pytest.raises(ValueError, match="3 records"):
        encode_side({bytes([number]) * 32: SideState() for number in range(3)})


@given(st.one_of(st.binary(max_size=200), st.sampled_from(RECORDS).map(encode_side).flatmap(mutations)))
def test_any_bytes(data: bytes) -> None:
    for candidate in (data, s.with_digest(data), s.resummed(data) if len(data) >= 32 else data):
        try:
            records = decode_side(candidate, IT)
        except StateError:
            continue
        assert decode_side(encode_side(records), IT) == records
