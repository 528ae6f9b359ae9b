"""The session that rides along in crbd's volatile blobs: its bytes, and whose it is to read."""

from __future__ import annotations

import pytest

from crbd.errors import StateDamagedError
from crbd.state.saved import Session
from crbd.state.swtpm import encode_migration, open_migration
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.state.swtpm_session import decode_carried, encode_carried

SESSION = Session(locality=3, buffer_size=0xF80, established=True, last_command=0x145)
CARRIED = b"crbd\x01" + bytes.fromhex("03 01 800f0000 45010000")
SHORT, LONG = SwtpmKey(bytes(range(16))), SwtpmKey(bytes(range(32)))


def test_layout() -> None:
    assert encode_carried(SESSION) == CARRIED
    assert decode_carried(CARRIED, "blob") == SESSION
    inner = bytes.fromhex("0001 00000005") + b"state" + bytes.fromhex("cbd1 0000000f") + CARRIED
    blob = bytes.fromhex("02 01 000a 0004 00000030 0004") + len(inner).to_bytes(4, "big") + inner
    assert encode_migration(b"state", session=SESSION) == blob


@pytest.mark.parametrize("file_key", [None, SHORT, LONG])
@pytest.mark.parametrize("key", [None, SHORT, LONG])
def test_it_rides_under_every_key(key: SwtpmKey | None, file_key: SwtpmKey | None) -> None:
    blob = encode_migration(b"state", key, file_key, session=SESSION)
    assert open_migration(blob, "blob", key, file_key) == (b"state", SESSION)
    assert (CARRIED in blob) == (key is None)


def test_a_blob_without_one_has_none() -> None:
    assert open_migration(encode_migration(b"state"), "blob") == (b"state", None)


@pytest.mark.parametrize("foreign", [b"", b"crbd", b"crbd\x02" + CARRIED[5:], b"dbrc" + CARRIED[4:]])
def test_what_is_not_ours_to_read_is_skipped(foreign: bytes) -> None:
    assert decode_carried(foreign, "blob") is None


@pytest.mark.parametrize("malformed", [CARRIED[:-1], CARRIED + b"x", CARRIED[:5] + b"\x05" + CARRIED[6:]])
def test_what_is_ours_and_malformed_is_damage(malformed: bytes) -> None:
    with pytest.raises(StateDamagedError, match="the blob"):
        decode_carried(malformed, "the blob")
