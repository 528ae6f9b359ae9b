"""What is particular to each mapping; what they share is in test_equivalence."""

from __future__ import annotations

import pytest

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Cancel, Execute
from crbd.crb.mapping.page import PageMapping, pieces
from crbd.crb.mapping.served import ServedMapping
from crbd.crb.mapping.split import SplitMapping
from crbd.crb.spec import Offset

from .driver import command, response

SEPARATE = CrbConfig(localities=2, separate_buffer=True, buffer_size=0x1800, base=0xE0000000)


def served() -> tuple[CrbDevice, ServedMapping, bytearray]:
    memory = bytearray(0x1800)
    device = CrbDevice(SEPARATE, memoryview(memory))
    return device, ServedMapping(device), memory


def test_devices_that_a_mapping_cannot_serve() -> None:
    separate = served()[0]
    with pytest.raises(ValueError, match="locality 0 alone"):
        SplitMapping(CrbDevice(CrbConfig()))
    with pytest.raises(ValueError, match="locality 0 alone"):
        SplitMapping(CrbDevice(CrbConfig(localities=1, separate_buffer=True), memoryview(bytearray(0xF80))))
    with pytest.raises(ValueError, match="in the page"):
        PageMapping(separate)
    with pytest.raises(ValueError, match="separate buffer"):
        ServedMapping(CrbDevice(CrbConfig()))


def test_the_ram_block_is_the_devices_buffer() -> None:
    device = CrbDevice(CrbConfig.qemu_7_2())
    mapping = SplitMapping(device)
    assert len(mapping.ram) == 3968
    mapping.ram[:12] = command()
    assert mapping.read(0x80, 12) == command()
    mapping.write(Offset.LOC_CTRL, b"\1")
    assert mapping.write(Offset.CTRL_START, b"\1") == (Execute(command(), 0),)
    device.complete(response())
    assert bytes(mapping.ram[:28]) == response()


def test_beyond_the_page_there_is_nothing() -> None:
    device = CrbDevice(CrbConfig.qemu_7_2())
    for mapping in (SplitMapping(device), PageMapping(device)):
        assert mapping.write(0xFFE, b"\xaa\xbb\xcc\xdd") == ()
        assert mapping.read(0xFFC, 8) == b"\0\0\xaa\xbb\0\0\0\0"
        for offset in (0x1000, 0x1008, 0x4FFF):
            assert mapping.write(offset, b"\1\1\1\1") == ()
            assert mapping.read(offset, 4) == bytes(4)
        assert device.active_locality is None


def test_a_small_buffer_behind_split_registers() -> None:
    device = CrbDevice(CrbConfig(localities=1, buffer_size=64))
    mapping = SplitMapping(device)
    mapping.write(0x7E, b"\xff" * 80)
    assert mapping.read(0xB0, 32) == b"\xff" * 16 + bytes(16)
    mapping.write(0x100, b"\xff")
    assert mapping.read(0x100, 1) == b"\0"
    assert mapping.read(0x7E, 3) == b"\0\0\xff"


def test_an_access_across_pages_is_two() -> None:
    device = CrbDevice(CrbConfig(localities=2))
    mapping = PageMapping(device)
    mapping.write(0x1000 + Offset.LOC_CTRL, b"\1")
    assert mapping.write(0xFFE, b"\xaa" * 2 + bytes(8) + b"\2\0") == ()
    assert device.active_locality is None
    assert mapping.read(0xFFE, 4) == b"\0\0\x85\0"
    assert pieces(0xFFE, 0x1004) == [(0, 0xFFE, 2), (1, 0, 0x1000), (2, 0, 2)]
    assert pieces(5, 0) == []


def test_the_page_is_memory_that_cannot_be_written() -> None:
    device = CrbDevice(CrbConfig())
    page = PageMapping(device).page(1)
    assert page.readonly
    assert len(page) == 4096
    device.write(1, Offset.LOC_CTRL, b"\1")
    assert page[Offset.LOC_STS] == 1
    device.submit(1, command())
    assert bytes(page[0x80:0x8C]) == command()
    assert page[Offset.CTRL_START] == 1
    device.complete(response())
    assert bytes(page[0x80:0x9C]) == response()


def test_the_page_stays_current_through_a_reset() -> None:
    device = CrbDevice(CrbConfig())
    page = device.page(2)
    device.write(2, Offset.LOC_CTRL, b"\1")
    device.reset()
    assert bytes(page) == device.read(2, 0, 0x1000)
    assert page[Offset.LOC_STS] == 0


def test_served_buffer_and_pages() -> None:
    device, mapping, memory = served()
    assert mapping.buffer_offset == 0x2000
    for locality in (0, 1):
        low = int.from_bytes(mapping.read(locality * 0x1000 + Offset.CMD_LADDR, 4), "little")
        assert low == int.from_bytes(mapping.read(locality * 0x1000 + Offset.RSP_ADDR, 8), "little") == 0xE0002000
    mapping.write(0x1000 + Offset.LOC_CTRL, b"\1")
    mapping.write(0x1000 + Offset.CTRL_REQ, b"\1")
    memory[:12] = command()
    assert mapping.write(0x1000 + Offset.CTRL_START, b"\1") == (Execute(command(), 1),)
    assert mapping.write(0x1000 + Offset.CTRL_CANCEL, b"\1") == (Cancel(),)
    device.complete(response())
    assert memory[:28] == response()
    assert mapping.read(0x2000, 28) == response()
    assert mapping.read(0x1080, 8) == bytes(8)


def test_served_accesses_by_hand_and_over_the_bounds() -> None:
    device, mapping, memory = served()
    assert mapping.write(0x37F8, bytes(range(16))) == ()
    assert memory[0x17F8:] == bytes(range(8))
    assert mapping.read(0x37F8, 16) == bytes(range(8)) + bytes(8)
    assert mapping.write(0x5000, b"\1") == ()
    assert mapping.read(0x5000, 4) == bytes(4)
    mapping.write(0x1FFC, b"\xaa" * 8)
    assert mapping.read(0x1FFC, 8) == bytes(4) + b"\xaa" * 4
    mapping.write(0x1080, b"\xbb" * 8)
    assert device.read(1, 0x80, 8) == bytes(8)
    mapping.write(0x2FFE, b"\xcc" * 4)
    assert mapping.read(0x2FFE, 4) == b"\xcc" * 4


def test_relocating_keeps_everything_else() -> None:
    device, mapping, _ = served()
    device.submit(1, command())
    before = device.freeze()
    device.relocate(0xF0000000)
    assert mapping.read(0x1000 + Offset.CMD_LADDR, 4) == (0xF0002000).to_bytes(4, "little")
    device.relocate(0xE0000000)
    assert device.freeze() == before
    with pytest.raises(ValueError, match="base"):
        device.relocate(0x123)
