"""Slots as operators write them, and what the tables call them."""

from __future__ import annotations

import pytest

from crbd.acpi.slot import parse_slot


@pytest.mark.parametrize(
    ("text", "segments", "addresses", "said"),
    [
        ("10.0", ["S80"], [0x100000], "10.0"),
        ("10", ["S80"], [0x100000], "10.0"),
        ("0x1f.7", ["SFF"], [0x1F0007], "1f.7"),
        ("1.0", ["S08"], [0x10000], "1.0"),
        ("3.0/0.0", ["S18", "S00"], [0x30000, 0], "3.0/0.0"),
        ("1F/a.1", ["SF8", "S51"], [0x1F0000, 0xA0001], "1f.0/a.1"),
    ],
)
def test_slot(text: str, segments: list[str], addresses: list[int], said: str) -> None:
    slot = parse_slot(text)
    assert [hop.segment for hop in slot.hops] == segments
    assert [hop.address for hop in slot.hops] == addresses
    assert str(slot) == said


@pytest.mark.parametrize(
    "text", ["", "20.0", "10.8", "1g", "10.0/", "/10.0", "10.", "-1", "100", "10.0 ", "00:10.0", "\u0661"]
)
def test_no_slot(text: str) -> None:
    with pytest.raises(ValueError, match="PCI device"):
        parse_slot(text)
