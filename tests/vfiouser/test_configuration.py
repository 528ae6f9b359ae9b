"""Config space: what it says, what can be written, and at which width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.vfiouser.configuration import INITIAL, MASKS, Configuration, is_possible


def test_what_a_guest_finds() -> None:
    space = Configuration().read(0, 256)
    assert space[0x04:0x08] == bytes(4), "decoding off, no capabilities"
    assert space[0x0B] == 0x08, "a base system peripheral"
    assert space[0x0E] == 0x00, "an ordinary header"
    assert space[0x10:0x28] == bytes(24), "BAR 0 at no address yet, 32 bits, not prefetchable; no other"
    assert space[0x30:0x35] == bytes(5), "no option ROM, no capability list"
    assert space[0x3D] == 0, "no interrupt pin"


def test_vendor_and_device_are_nobodys_who_has_a_driver() -> None:
    assert INITIAL[:2] not in (b"\xff\xff", b"\0\0"), "no device at all"
    assert INITIAL[:2] not in (b"\xf4\x1a", b"\x36\x1b", b"\x86\x80", b"\x14\x10"), "virtio, Red Hat, Intel, IBM"
    assert INITIAL[0x2C:0x30] == INITIAL[:4]


def test_bar_0_is_sized_as_firmware_does_it() -> None:
    configuration = Configuration()
    configuration.write(0x10, b"\xff\xff\xff\xff")
    assert configuration.read(0x10, 4) == (0xFFFFE000).to_bytes(4, "little"), "8 KiB"
    configuration.write(0x10, (0xFEBF_E00C).to_bytes(4, "little"))
    assert configuration.base == 0xFEBFE000
    configuration.write(0x12, b"\xc0")
    assert configuration.base == 0xFEC0E000, "one byte of it"
    configuration.reset()
    assert configuration.base == 0
    assert configuration.read(0, 256) == INITIAL


@pytest.mark.timeout(1200)  # nightly: 50 000 of them
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=8)), max_size=8))
def test_only_writable_bits_ever_change(writes: list[tuple[int, bytes]]) -> None:
    configuration = Configuration()
    for offset, data in writes:
        configuration.write(offset, data[: 256 - offset])
    space = configuration.read(0, 256)
    assert is_possible(space)
    assert Configuration(space).read(0, 256) == space
    assert all((byte ^ initial) & ~mask == 0 for byte, initial, mask in zip(space, INITIAL, MASKS, strict=True))


@pytest.mark.parametrize("space", [b"", INITIAL[:-1], INITIAL + b"\0", b"\x01" + INITIAL[1:], INITIAL[:255] + b"\1"])
def test_bytes_that_no_device_of_ours_ever_was(space: bytes) -> None:
    assert not is_possible(space)
    with pytest.raises(ValueError, match="config space"):
        Configuration(space)
