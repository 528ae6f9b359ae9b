"""The AML writer, construct by construct. The bytes are those of ACPI 6.5, chapter 20, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.acpi import aml
from crbd.acpi.aml import Access, Space

_ROWS = [
    (aml.name("A"), "415f5f5f"),
    (aml.name("\\_SB"), "5c5f53425f"),
    (aml.name("_SB.PCI0"), "2e5f53425f50434930"),
    (aml.name("\\_SB.PCI0.S80"), "5c2f035f53425f504349305338305f"),
    (aml.integer(0), "00"),
    (aml.integer(1), "01"),
    (aml.integer(2), "0a02"),
    (aml.integer(0xFF), "0aff"),
    (aml.integer(0x100), "0b0001"),
    (aml.integer(0x12345), "0c45230100"),
    (aml.integer(1 << 32), "0e0000000001000000"),
    (aml.string("TPM2"), "0d54504d3200"),
    (aml.buffer(b"\x79\x00"), "11050a027900"),
    (aml.local(7), "67"),
    (aml.argument(6), "6e"),
    (aml.scope("A", aml.ONE), "1006415f5f5f01"),
    (aml.device("A"), "5b8205415f5f5f"),
    (aml.named("A", aml.ZERO), "08415f5f5f00"),
    (aml.method("A", aml.return_(aml.ONE)), "1408415f5f5f00a401"),
    (aml.method("A", arguments=7, serialized=True), "1406415f5f5f0f"),
    (aml.operation_region("A", Space.PCI_CONFIG, 0, 0x14), "5b80415f5f5f02000a14"),
    (aml.data_table_region("A", "TPM2"), "5b88415f5f5f0d54504d32000d000d00"),
    # Bits before the first unit and between two are skipped.
    (aml.field("A", Access.WORD, ("B", 33, 1)), "5b810d415f5f5f020021425f5f5f01"),
    (aml.field("A", Access.DWORD, ("B", 0, 32), ("C", 128, 32)), "5b8113415f5f5f03425f5f5f20004006435f5f5f20"),
    (aml.create_dword_field(aml.name("A"), 4, "B"), "8a415f5f5f0a04425f5f5f"),
    (aml.package_of(aml.ZERO, aml.ONE), "1204020001"),
    (aml.store(aml.ONE, aml.local(0)), "700160"),
    (aml.add(aml.local(0), aml.ONE), "72600100"),
    (aml.subtract(aml.local(0), aml.ONE, aml.local(1)), "74600161"),
    (aml.shift_right(aml.local(0), 8, aml.local(1)), "7a600a0861"),
    (aml.bit_and(aml.local(0), aml.ONE), "7b600100"),
    (aml.equal(aml.local(0), aml.ONE), "936001"),
    (aml.exists("A"), "5b12415f5f5f00"),
    (aml.not_(aml.local(0)), "9260"),
    (aml.if_(aml.ONE, aml.return_(aml.ZERO)), "a00401a400"),
    (aml.call("A", aml.local(0)), "415f5f5f60"),
]


@pytest.mark.parametrize(("made", "wanted"), _ROWS, ids=[wanted for _, wanted in _ROWS])
def test_bytes(made: bytes, wanted: str) -> None:
    assert made.hex() == wanted


@pytest.mark.parametrize(
    ("size", "length"), [(0, "01"), (62, "3f"), (63, "4104"), (0xFFD, "4fff"), (0xFFE, "810001"), (0xFFFFC, "8fffff")]
)
def test_a_package_counts_its_own_length(size: int, length: str) -> None:
    """At 63 bytes and at every further 12 bits the length needs a byte more, which counts."""
    assert aml.package(bytes(size)) == bytes.fromhex(length) + bytes(size)


@given(st.integers(0, 1 << 21))
def test_a_package_can_be_read(size: int) -> None:
    made = aml.package(bytes(size))
    more = made[0] >> 6
    low = made[0] & (0xF if more else 0x3F)
    assert low | int.from_bytes(made[1 : 1 + more], "little") << 4 == len(made) == size + 1 + more


@pytest.mark.parametrize(
    "make",
    [
        lambda: aml.name(""),
        lambda: aml.name("ABCDE"),
        lambda: aml.name("abc"),
        lambda: aml.name("1A"),
        lambda: aml.name("A."),
        lambda: aml.name(".".join(["A"] * 256)),
        lambda: aml.integer(-1),
        lambda: aml.integer(1 << 64),
        lambda: aml.string("ä"),
        lambda: aml.string("a\0"),
        lambda: aml.local(8),
        lambda: aml.argument(7),
        lambda: aml.method("A", arguments=8),
        lambda: aml.field("A", Access.BYTE, ("B", 8, 8), ("C", 15, 8)),
        lambda: aml.field("A", Access.BYTE, ("B", 8, 0)),
        lambda: aml.field("A", Access.BYTE, ("B.C", 8, 8)),
        lambda: aml.package(bytes(1 << 28)),
        lambda: aml.field("A", Access.BYTE, ("B", 1 << 28, 1)),
    ],
)
def test_what_cannot_be_said(make: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make()
