"""The two tables: TPM2, by which a guest's driver knows a CRB TPM, and an SSDT with the device that it binds to.

Theory. The driver goes by the device MSFT0101: its _CRS is where the registers may be, and the TPM2 table's control
area says where in there they are. On a PC both are fixed; here the registers are in a PCI device's BAR 0, and where
that is, firmware or kernel decide. So nothing is written down beforehand: _CRS reads BAR 0 from config space when it is
asked, and writes the control area's address into the TPM2 table before it returns. Whoever asks later, after the BAR
was moved, is told anew.

MSFT0101 is a child of the PCI device. As a device of its own beside the bus it would claim addresses that the BAR has,
and Linux would move the BAR away from them.

Sources: ACPI 6.5, chapters 5.2.6, 6 and 19; TCG ACPI Specification 1.3, section 8.3 (TPM2); drivers/char/tpm/tpm_crb.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from crbd.acpi import aml
from crbd.acpi.aml import Access, Space, local, name
from crbd.acpi.slot import Slot

_HEADER: Final = Struct("<4sIBB6s8sI4sI")
"""Signature, length of the whole, revision, checksum, OEM, OEM's table, its revision, creator, its revision."""
_CHECKSUM: Final = 9
_OEM: Final = b"CRBD  "
_TPM2: Final = Struct("<HHQI")
"""Platform class, reserved, control area, start method."""
_CONTROL_AREA: Final = _HEADER.size + 4
"""Where in the TPM2 table the address of the control area is."""
_TPM2_REVISION: Final = 4
_CLIENT: Final = 0
"""The platform class of what is no server."""
_START_METHOD_CRB: Final = 7
_REGISTERS_TO_CONTROL_AREA: Final = 0x40
"""The control area begins with CTRL_REQ (PTP)."""
_SSDT_REVISION: Final = 2

_PRESENT: Final = 0x0F
"""_STA: present, enabled, shown, working."""
_BAR_ADDRESS: Final = 0xFFFFFFF0
_MEMORY_32_FIXED: Final = Struct("<BHBII")
"""Tag, length of what follows, writable, address, size (ACPI 6.5, 6.4.3.4)."""
_MEMORY_32_FIXED_TAG: Final = 0x86
_MEMORY_32_FIXED_ADDRESS: Final = 4
_END_TAG: Final = b"\x79\x00"


@dataclass(frozen=True, slots=True)
class PciFunction:
    """The device as its config space has it: vendor and device id, and the bytes in BAR 0 (32 bits, memory)."""

    vendor: int
    device: int
    bar_size: int


def table(signature: str, revision: int, body: bytes) -> bytes:
    """A whole table: header, body, and a checksum that makes the sum of all bytes 0."""
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature.encode(), length, revision, 0, _OEM, b"CRBDTPM ", 1, b"CRBD", 1)
    whole = bytearray(header + body)
    whole[_CHECKSUM] = -sum(whole) & 0xFF
    return bytes(whole)


def tpm2() -> bytes:
    """The TPM2 table. Its control area is at 0 until the SSDT's _CRS has been asked."""
    return table("TPM2", _TPM2_REVISION, _TPM2.pack(_CLIENT, 0, 0, _START_METHOD_CRB))


def ssdt(slot: Slot, function: PciFunction) -> bytes:
    """The SSDT for the device in that slot.

    The tables of QEMU 11 name each PCI device that is there; older ones, for aarch64's virt, name the bus alone. What
    has no name is given the same one: that is decided while the table is loaded.
    """
    path, body = "\\_SB.PCI0", b""
    for hop in slot.hops:
        above, path = path, f"{path}.{hop.segment}"
        device = aml.device(hop.segment, aml.named("_ADR", aml.integer(hop.address)))
        body += aml.if_(aml.not_(aml.exists(path)), aml.scope(above, device))
    return table("SSDT", _SSDT_REVISION, body + aml.scope(path, _pci_terms(), _tpm(function)))


def _pci_terms() -> bytes:
    """Names for config space. They belong to the PCI device: a region in a child would be the child's config space."""
    return b"".join(
        (
            aml.operation_region("TPCI", Space.PCI_CONFIG, 0, 0x14),
            aml.field("TPCI", Access.DWORD, ("TIDS", 0, 32), ("TBAR", 0x10 * 8, 32)),
            # The status register stands beside the command register, and is not to be written along with it.
            aml.field("TPCI", Access.WORD, ("TMEM", 4 * 8 + 1, 1)),
        )
    )


def _tpm(function: PciFunction) -> bytes:
    identity = aml.integer(function.device << 16 | function.vendor)
    return aml.device(
        "TPM",
        aml.named("_HID", aml.string("MSFT0101")),
        aml.named("_UID", aml.ONE),
        aml.named("_STR", aml.buffer("TPM 2.0 Device".encode("utf-16-le") + b"\0\0")),
        # Linux for aarch64 cannot read config space before it knows the bus, and asks for _CRS and _STA before that.
        # With the dependency it still asks for _CRS, once: so that one says nothing before _STA did.
        aml.named("_DEP", aml.package_of(name("\\_SB.PCI0"))),
        aml.named("TFND", aml.ZERO),
        aml.data_table_region("TTAB", "TPM2"),
        aml.field("TTAB", Access.BYTE, ("TSUM", _CHECKSUM * 8, 8), ("TCTL", _CONTROL_AREA * 8, 32)),
        # Another device in the slot, or none: then there is no TPM.
        aml.method(
            "_STA",
            aml.if_(
                aml.equal(name("TIDS"), identity),
                aml.store(aml.ONE, name("TFND")),
                aml.return_(aml.integer(_PRESENT)),
            ),
            aml.return_(aml.ZERO),
        ),
        _sum_of_bytes(),
        _current_resources(function.bar_size),
    )


def _sum_of_bytes() -> bytes:
    """The sum of a 32-bit number's bytes, right in its lowest eight bits: the higher ones are for others to discard."""
    terms = [aml.store(aml.argument(0), local(0))]
    terms += [aml.add(local(0), aml.shift_right(aml.argument(0), bits), local(0)) for bits in (8, 16, 24)]
    return aml.method("TADD", *terms, aml.return_(local(0)), arguments=1)


def _current_resources(size: int) -> bytes:
    resource = _MEMORY_32_FIXED.pack(_MEMORY_32_FIXED_TAG, _MEMORY_32_FIXED.size - 3, 1, 0, size) + _END_TAG
    base, control = local(0), local(1)
    return aml.method(
        "_CRS",
        aml.named("TRES", aml.buffer(resource)),
        aml.create_dword_field(name("TRES"), _MEMORY_32_FIXED_ADDRESS, "TADR"),
        aml.store(aml.ZERO, base),
        aml.if_(name("TFND"), aml.bit_and(name("TBAR"), aml.integer(_BAR_ADDRESS), base)),
        aml.store(base, name("TADR")),
        aml.if_(
            base,
            # Firmware that started the kernel itself may have left the BAR switched off (AAVMF does).
            aml.store(aml.ONE, name("TMEM")),
            aml.add(base, aml.integer(_REGISTERS_TO_CONTROL_AREA), control),
            # A kernel that is started by another one (kexec) checks the table again: its sum must stay right.
            aml.add(name("TSUM"), aml.call("TADD", name("TCTL")), local(2)),
            aml.subtract(local(2), aml.call("TADD", control), name("TSUM")),
            aml.store(control, name("TCTL")),
        ),
        aml.return_(name("TRES")),
        serialized=True,
    )
