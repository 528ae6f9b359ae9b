"""swtpm's blob form: layout byte by byte, both ways, and every way in which it can be wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import StateDamagedError, StateError, StateNewerError, StateSealedError
from crbd.state.kinds import StateKind
from crbd.state.swtpm import MAX_BLOB, decode_file, decode_migration, encode_file, encode_migration

STATE = b"state"
FILE = bytes.fromhex("02 01 000a 0000 00000015  0001 00000005") + STATE
MIGRATION = bytes.fromhex("02 01 000a 0004 0000001b  0004 0000000b  0001 00000005") + STATE


def test_layout() -> None:
    assert encode_file(STATE) == FILE
    assert encode_migration(STATE) == MIGRATION
    assert decode_file(FILE, "f") == STATE
    assert decode_migration(MIGRATION, "f") == STATE


def test_a_longer_head_and_unknown_tags_are_skipped() -> None:
    body = bytes.fromhex("00ff 00000002 abcd  0001 00000005") + STATE
    blob = bytes.fromhex("02 01 000c 0000") + (12 + len(body)).to_bytes(4, "big") + b"xx" + body
    assert decode_file(blob, "f") == STATE


def changed(blob: bytes, offset: int, value: bytes) -> bytes:
    return blob[:offset] + value + blob[offset + len(value) :]


WRONG = {
    "empty": (b"", StateDamagedError, "cut short"),
    "shorter than a head": (FILE[:9], StateDamagedError, "cut short"),
    "cut": (FILE[:-1], StateDamagedError, "should be 21 bytes"),
    "trailing byte": (FILE + b"x", StateDamagedError, "should be 21 bytes"),
    "head size 9": (changed(FILE, 2, b"\x00\x09"), StateDamagedError, "head of 9"),
    "head size beyond the end": (changed(FILE, 2, b"\xff\xff"), StateDamagedError, "head of 65535"),
    "needs a newer reader": (changed(FILE, 1, b"\x03"), StateNewerError, "version 3"),
    "encrypted": (changed(FILE, 5, b"\x01"), StateSealedError, "encrypted"),
    "TLV beyond the end": (changed(FILE, 12, b"\x00\x00\x00\x06"), StateDamagedError, "longer than the file"),
    "TLV of 4 GiB": (changed(FILE, 12, b"\xff\xff\xff\xff"), StateDamagedError, "longer than the file"),
    "no data": (changed(FILE, 10, b"\x00\x09"), StateDamagedError, "no DATA"),
    "ends inside a tag": (
        changed(FILE, 6, b"\x00\x00\x00\x0d")[:13],
        StateDamagedError,
        "inside a tag",
    ),
    "oversized": (bytes(MAX_BLOB + 1), StateDamagedError, "more than any"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(name: str) -> None:
    blob, error, text = WRONG[name]
    with pytest.raises(error, match=text) as caught:
        decode_file(blob, "/where/it/lies")
    assert "/where/it/lies" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_encrypted_migration_blobs_are_refused_by_which_key() -> None:
    with pytest.raises(StateSealedError, match="migration key"):
        decode_migration(changed(MIGRATION, 5, b"\x06"), "blob")
    with pytest.raises(StateSealedError, match="state key"):
        decode_migration(changed(MIGRATION, 5, b"\x05"), "blob")


@given(st.binary(min_size=1, max_size=200))
def test_both_ways(state: bytes) -> None:
    assert decode_file(encode_file(state), "f") == state
    assert decode_migration(encode_migration(state), "f") == state


@given(st.one_of(st.binary(max_size=64), st.binary(max_size=32).map(lambda tail: FILE[:10] + tail)))
def test_any_bytes_decode_or_raise_a_state_error(blob: bytes) -> None:
    for decode in (decode_file, decode_migration):
        with contextlib.suppress(StateError):
            assert isinstance(decode(blob, "f"), bytes)


def test_names_of_kinds() -> None:
    for kind, name in (
        (StateKind.PERMANENT, "permall"),
        (StateKind.VOLATILE, "volatilestate"),
        (StateKind.SAVESTATE, "savestate"),
    ):
        assert kind.nvram_name == name
        assert StateKind.of_nvram_name(name) is kind
    with pytest.raises(ValueError, match="nonsense"):
        StateKind.of_nvram_name("nonsense")
