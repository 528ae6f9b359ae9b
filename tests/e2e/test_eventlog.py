"""The test bed's own event log parser, on a log made by hand. Needs no virtual machine."""

from __future__ import annotations

import hashlib
import struct

import pytest

from .eventlog import EventLogError, parse, parse_pcrread, replay

_HEAD = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 2) + struct.pack("<HHHH", 4, 20, 11, 32) + b"\0"
_FIRST = struct.pack("<II20sI", 0, 3, b"", len(_HEAD)) + _HEAD


def _entry(pcr: int, kind: int, measured: bytes, data: bytes) -> bytes:
    digests = struct.pack("<H", 4) + hashlib.sha1(measured).digest()
    digests += struct.pack("<H", 11) + hashlib.sha256(measured).digest()
    return struct.pack("<III", pcr, kind, 2) + digests + struct.pack("<I", len(data)) + data


_LOG = (
    _FIRST
    + _entry(0, 3, b"", b"StartupLocality\0\3")
    + _entry(0, 8, b"version", b"version")
    + _entry(4, 4, b"one", b"")
    + _entry(4, 4, b"two", b"")
)


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def test_replays_both_banks() -> None:
    banks = replay(parse(_LOG))
    assert banks["sha256"][0] == _sha256(bytes(31), b"\3", _sha256(b"version"))
    assert banks["sha256"][4] == _sha256(_sha256(bytes(32), _sha256(b"one")), _sha256(b"two"))
    assert {name: sorted(bank) for name, bank in banks.items()} == {"sha1": [0, 4], "sha256": [0, 4]}


@pytest.mark.parametrize("missing", [1, 4, 10, len(_LOG) - len(_FIRST) + 1, len(_LOG) - 3])
def test_refuses_a_log_cut_short(missing: int) -> None:
    with pytest.raises(EventLogError):
        parse(_LOG[:-missing])


def test_refuses_an_algorithm_not_announced() -> None:
    entry = struct.pack("<IIIH", 1, 1, 1, 0x12) + bytes(32) + struct.pack("<I", 0)
    with pytest.raises(EventLogError, match="0x12"):
        parse(_FIRST + entry)


def test_reads_what_tpm2_pcrread_prints() -> None:
    text = "  sha1:\n  sha256:\n    0 : 0x" + "AB" * 32 + "\n    23: 0x" + "00" * 32 + "\n"
    assert parse_pcrread(text) == {"sha256": {0: b"\xab" * 32, 23: bytes(32)}}
