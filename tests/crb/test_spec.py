"""The table of registers against numbers that stand here by themselves, and what derives from it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from crbd.crb import spec
from crbd.crb.config import CrbConfig, Dialect
from crbd.crb.device import CrbDevice
from crbd.crb.spec import Access, Offset, Varies

BASE = 0xFED40000
ZERO = dict.fromkeys(range(0, 0x80, 4), 0)

# PTP, tables of the CRB registers; the values of QEMU's devices are those of the recorded traces.
EXPECTED = {
    "qemu-7.2": (CrbConfig.qemu_7_2(), 0, {0x30: 0x00025811}),
    "qemu-11": (CrbConfig.qemu_11(), 0, {0x30: 0x00025C11}),
    "ptp": (CrbConfig(), 0, {0x30: 0x00025F11}),
    "ptp, locality 3": (CrbConfig(), 3, {0x30: 0x00025F11, 0x5C: BASE + 0x3080, 0x68: BASE + 0x3080}),
    "ptp, locality 4": (CrbConfig(), 4, {0x30: 0x00025F11, 0x5C: BASE + 0x4080, 0x68: BASE + 0x4080}),
    "one locality, bare": (
        CrbConfig(localities=1, idle_bypass=False, chunking=False, revision=0xAB, vendor_id=0xFEDC, device_id=0xBA98),
        0,
        {0x30: 0xAB025811, 0x34: 0xBA98FEDC},
    ),
    "two localities, far up, small": (
        CrbConfig(localities=2, base=0x12_3456_7000, buffer_size=0x100),
        1,
        {0x30: 0x00025F11} | {0x58: 0x100, 0x5C: 0x34568080, 0x60: 0x12, 0x64: 0x100, 0x68: 0x34568080, 0x6C: 0x12},
    ),
    "separate buffer": (
        CrbConfig(localities=2, base=0x8000000000, buffer_size=0x2345, separate_buffer=True),
        1,
        {0x30: 0x00025F11} | {0x58: 0x2345, 0x5C: 0x2000, 0x60: 0x80, 0x64: 0x2345, 0x68: 0x2000, 0x6C: 0x80},
    ),
}
COMMON = {0x00: 0x81, 0x34: 0x1014, 0x44: 0x2, 0x58: 0xF80, 0x5C: BASE + 0x80, 0x64: 0xF80, 0x68: BASE + 0x80}


@pytest.mark.parametrize(("config", "locality", "words"), EXPECTED.values(), ids=EXPECTED.keys())
def test_reset_values(config: CrbConfig, locality: int, words: dict[int, int]) -> None:
    expected = tuple((ZERO | COMMON | words).values())
    assert spec.reset_words(config, locality) == expected
    separate = memoryview(bytearray(config.buffer_size)) if config.separate_buffer else None
    device = CrbDevice(config, separate)
    assert struct.unpack("<32I", device.read(locality, 0, 0x80)) == expected
    device.write(0, Offset.LOC_CTRL, b"\1")
    device.reset()
    assert struct.unpack("<32I", device.read(locality, 0, 0x80)) == expected
    assert not any(device.read(locality, 0x80, 0xF80))


def test_the_table_lies_where_the_profile_says() -> None:
    # PTP, table "Address Allocation for CRB TPM Access"
    assert [(register.name, register.offset, register.size) for register in spec.REGISTERS] == [
        ("LOC_STATE", 0x00, 4),
        ("LOC_CTRL", 0x08, 4),
        ("LOC_STS", 0x0C, 4),
        ("INTF_ID", 0x30, 4),
        ("INTF_ID2", 0x34, 4),
        ("CTRL_EXT", 0x38, 8),
        ("CTRL_REQ", 0x40, 4),
        ("CTRL_STS", 0x44, 4),
        ("CTRL_CANCEL", 0x48, 4),
        ("CTRL_START", 0x4C, 4),
        ("INT_ENABLE", 0x50, 4),
        ("INT_STS", 0x54, 4),
        ("CMD_SIZE", 0x58, 4),
        ("CMD_LADDR", 0x5C, 4),
        ("CMD_HADDR", 0x60, 4),
        ("RSP_SIZE", 0x64, 4),
        ("RSP_ADDR", 0x68, 8),
    ]


@pytest.mark.parametrize("register", spec.REGISTERS, ids=lambda register: register.name)
def test_fields_do_not_overlap(register: spec.Register) -> None:
    assert sum(field.mask for field in register.fields) < 1 << 8 * register.size
    assert sum(field.mask for field in register.fields) == sum(1 << bit for bit in _bits(register))


def _bits(register: spec.Register) -> set[int]:
    return {bit for field in register.fields for bit in range(field.low, field.low + field.width)}


@pytest.mark.parametrize("config", [CrbConfig(), CrbConfig.qemu_7_2(), CrbConfig.qemu_11()], ids=lambda c: c.dialect)
def test_what_varies(config: CrbConfig) -> None:
    varying = {4 * index: mask for index, mask in enumerate(spec.varying_masks(config)) if mask}
    everywhere = {0x00: 0x1F, 0x0C: 0x3, 0x44: 0x3, 0x4C: 0x1}
    in_ptp = {0x48: 0x1, 0x50: 0x8000001F} if config.dialect is Dialect.PTP else {}
    assert varying == everywhere | in_ptp


def test_only_registers_that_may_be_written_vary_by_writing() -> None:
    for register in spec.REGISTERS:
        if register.access is Access.COMMAND:
            assert all(field.varies is Varies.NO for field in register.fields), register.name
        if register.access is Access.STORED:
            assert all(field.varies is Varies.IN_PTP for field in register.fields), register.name


def test_decode_reads_every_field() -> None:
    page = bytearray(0x80)
    page[0x00:4] = (0x8E).to_bytes(4, "little")
    page[0x30:0x38] = bytes.fromhex("11 7f ae cd 14 10 34 12")
    page[0x68:0x70] = (0x1122334455667788).to_bytes(8, "little")
    decoded = {value.name: value for value in spec.decode(page)}
    assert dict(decoded["LOC_STATE"].fields) == {
        "tpmEstablished": 0,
        "locAssigned": 1,
        "activeLocality": 3,
        "tpmRegValidSts": 1,
    }
    assert dict(decoded["INTF_ID"].fields) == {
        "InterfaceType": 1,
        "InterfaceVersion": 1,
        "CapLocality": 1,
        "CapCRBIdleBypass": 1,
        "CapCRBChunk": 1,
        "CapDataXferSizeSupport": 3,
        "CapFIFO": 1,
        "CapCRB": 1,
        "InterfaceSelector": 3,
        "IntfSelLock": 1,
        "RID": 0xCD,
    }
    assert decoded["INTF_ID2"].fields == (("VID", 0x1014), ("DID", 0x1234))
    assert decoded["RSP_ADDR"] == spec.RegisterValue(
        "RSP_ADDR", 0x68, 8, 0x1122334455667788, (("Address", 0x1122334455667788),)
    )
    assert [value.name for value in spec.decode(page)] == [register.name for register in spec.REGISTERS]
    with pytest.raises(ValueError, match="128 bytes"):
        spec.decode(page[:-1])


def test_words_and_bytes() -> None:
    page = bytes(range(256))
    assert spec.words_of(page)[1] == 0x07060504
    assert spec.bytes_of(spec.words_of(page)) == page[:0x80]


def test_reserved_words_have_a_name_too() -> None:
    assert spec.register_at(0x6C // 4) == "RSP_ADDR"
    assert spec.register_at(0x04 // 4) == "reserved word 0x04"
    assert spec.register_at(0x70 // 4) == "reserved word 0x70"


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("localities", lambda: CrbConfig(localities=0)),
        ("localities", lambda: CrbConfig(localities=6)),
        ("buffer_size", lambda: CrbConfig(buffer_size=63)),
        ("buffer_size", lambda: CrbConfig(buffer_size=0xF81)),
        ("max_command", lambda: CrbConfig(max_command=63)),
        ("max_command", lambda: CrbConfig(max_command=(1 << 20) + 1)),
        ("vendor_id", lambda: CrbConfig(vendor_id=0x10000)),
        ("vendor_id", lambda: CrbConfig(vendor_id=-1)),
        ("device_id", lambda: CrbConfig(device_id=0x10000)),
        ("device_id", lambda: CrbConfig(device_id=-1)),
        ("revision", lambda: CrbConfig(revision=-1)),
        ("revision", lambda: CrbConfig(revision=0x100)),
        ("base", lambda: CrbConfig(base=-0x1000)),
        ("base", lambda: CrbConfig(base=0x800)),
        ("base", lambda: CrbConfig(base=(1 << 64) - 0x4000)),
    ],
)
def test_what_no_device_can_be(field: str, make: Callable[[], CrbConfig]) -> None:
    with pytest.raises(ValueError, match=field):
        make()


def test_the_bounds_are_allowed() -> None:
    CrbConfig(localities=5, buffer_size=64, max_command=64, base=(1 << 64) - 0x5000)
    CrbConfig(vendor_id=0, device_id=0, revision=0, base=0)
    CrbConfig(vendor_id=0xFFFF, device_id=0xFFFF, revision=0xFF)
    CrbConfig(localities=1, buffer_size=1 << 20, max_command=1 << 20, separate_buffer=True)
    with pytest.raises(ValueError, match="buffer_size"):
        CrbConfig(buffer_size=(1 << 20) + 1, separate_buffer=True)
    with pytest.raises(ValueError, match="QEMU"):
        replace(CrbConfig.qemu_11(), localities=2)


def test_span() -> None:
    assert CrbConfig(localities=3).span == 0x3000
    assert CrbConfig(localities=3, separate_buffer=True, buffer_size=0x1001).span == 0x5000


def test_the_separate_buffer_must_fit() -> None:
    with pytest.raises(ValueError, match="exactly where"):
        CrbDevice(CrbConfig(), memoryview(bytearray(0xF80)))
    separate = CrbConfig(separate_buffer=True)
    with pytest.raises(ValueError, match="exactly where"):
        CrbDevice(separate)
    for wrong in (memoryview(bytes(0xF80)), memoryview(bytearray(0xF81))):
        with pytest.raises(ValueError, match="3968 writable"):
            CrbDevice(separate, wrong)


def test_accesses_outside_a_page_are_the_mappings_mistake() -> None:
    device = CrbDevice(CrbConfig(localities=2))
    for locality, offset, size in ((2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0xFFF, 2)):
        with pytest.raises(ValueError, match="in no page"):
            device.read(locality, offset, size)
        with pytest.raises(ValueError, match="in no page"):
            device.write(locality, offset, bytes(size))
    with pytest.raises(ValueError, match="in no page"):
        device.page(2)
