"""The commands crbd asks a TPM by: bytes out, fields in, and answers that are not as they should be."""

from __future__ import annotations

import pytest

from crbd.errors import WireError
from crbd.tpm import questions

HANDLES = bytes.fromhex("8001 0000001b 00000000 00 00000001 00000002 81000001 81010001")
PROPERTIES = bytes.fromhex("8001 0000001b 00000000 01 00000006 00000001 00000117 00000800")
PUBLIC = bytes.fromhex("8001 00000013 00000000 0003 aabbcc 0001 00 0001 00")


def test_commands() -> None:
    assert questions.get_capability(1, 0x81000000, 2).hex() == "8001000000160000017a000000018100000000000002"
    assert questions.read_public(0x81010001).hex() == "80010000000e0000017381010001"
    assert questions.define_space(0x01C10000, 64).hex() == (
        "80020000002d0000012a4000000c00000009400000090000000000" + "0000" + "000e01c10000000b4201000100000040"
    )


def test_answers() -> None:
    assert questions.handles_in(HANDLES) == (0x81000001, 0x81010001)
    assert questions.properties_in(PROPERTIES) == {0x117: 2048}
    assert questions.public_area_in(PUBLIC) == b"\xaa\xbb\xcc"


@pytest.mark.parametrize("size", range(len(HANDLES)))
def test_handles_cut_short(size: int) -> None:
    with pytest.raises(WireError):
        questions.handles_in(HANDLES[:size])


@pytest.mark.parametrize("size", range(10, 15))
def test_a_public_area_cut_short(size: int) -> None:
    with pytest.raises(WireError):
        questions.public_area_in(PUBLIC[:size])


def test_other_answers() -> None:
    with pytest.raises(WireError, match="another question"):
        questions.handles_in(PROPERTIES)
    with pytest.raises(WireError, match="0x101"):
        questions.properties_in(bytes.fromhex("80010000000a00000101"))
