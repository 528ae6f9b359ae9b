"""The CRB registers as one table, from which reset values, decoder, validation and documentation derive.

Source: TCG PC Client Platform TPM Profile (PTP) 1.05 and 1.06, CRB interface, the table "Address Allocation for CRB"
and the register tables that follow it. All registers are little-endian. Offsets count from the beginning of a
locality's page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from crbd.crb.config import BUFFER_OFFSET, CrbConfig, Dialect

WORDS: Final = BUFFER_OFFSET // 4
"""32-bit words before the data buffer."""


class Offset(IntEnum):
    """Byte offset of each register in a page."""

    LOC_STATE = 0x00
    LOC_CTRL = 0x08
    LOC_STS = 0x0C
    INTF_ID = 0x30
    INTF_ID2 = 0x34
    CTRL_EXT = 0x38
    CTRL_REQ = 0x40
    CTRL_STS = 0x44
    CTRL_CANCEL = 0x48
    CTRL_START = 0x4C
    INT_ENABLE = 0x50
    INT_STS = 0x54
    CMD_SIZE = 0x58
    CMD_LADDR = 0x5C
    CMD_HADDR = 0x60
    RSP_SIZE = 0x64
    RSP_ADDR = 0x68


class Access(Enum):
    """What a guest's write does. No read ever does anything."""

    READ_ONLY = "read only"
    """Writes are ignored."""
    COMMAND = "command"
    """A write asks for something and leaves no trace: the register reads 0."""
    HELD = "held"
    """A written 1 stays until the device clears it."""
    STORED = "stored"
    """Reads back what was written, where the device has the register; QEMU's reads 0."""


class Scope(Enum):
    """On which pages a register shows."""

    ALL = "all pages alike"
    OWN = "its locality's page"
    ACTIVE = "the active locality's page; elsewhere the reset value"
    FIXED = "every page, fixed"


class Varies(Enum):
    """Whether a field ever differs from its reset value."""

    NO = "no"
    YES = "yes"
    IN_PTP = "with the PTP's dialect"


@dataclass(frozen=True, slots=True)
class FromConfig:
    """A reset value that the configuration and the locality decide."""

    describes: str
    value: Callable[[CrbConfig, int], int]


@dataclass(frozen=True, slots=True)
class Field:
    """Bits `low` to `low + width - 1` of a register."""

    name: str
    low: int
    width: int
    meaning: str
    reset: int | FromConfig = 0
    varies: Varies = Varies.NO

    @property
    def mask(self) -> int:
        """The field's bits in its register."""
        return ((1 << self.width) - 1) << self.low

    def reset_value(self, config: CrbConfig, locality: int) -> int:
        """The field's own value, not shifted."""
        return self.reset if isinstance(self.reset, int) else self.reset.value(config, locality)


@dataclass(frozen=True, slots=True)
class Register:
    """One row of the table. Bits that belong to no field are reserved and read 0."""

    offset: Offset
    size: int
    """Bytes: 4 or 8."""
    access: Access
    scope: Scope
    fields: tuple[Field, ...]
    meaning: str

    @property
    def name(self) -> str:
        """As the PTP calls it, without TPM_, CRB_ and the locality."""
        return self.offset.name


def _whole(name: str, meaning: str, reset: int | FromConfig, bits: int = 32) -> tuple[Field, ...]:
    return (Field(name, 0, bits, meaning, reset),)


_CAP_LOCALITY = FromConfig("1 with more than one locality", lambda config, _: int(config.localities > 1))
_BYPASS = FromConfig("as configured", lambda config, _: int(config.idle_bypass))
_CHUNK = FromConfig("as configured", lambda config, _: int(config.chunking))
_REVISION = FromConfig("as configured", lambda config, _: config.revision)
_VENDOR = FromConfig("as configured, 0x1014", lambda config, _: config.vendor_id)
_DEVICE = FromConfig("as configured", lambda config, _: config.device_id)
_SIZE = FromConfig("as configured, 0xF80", lambda config, _: config.buffer_size)
_LOW = FromConfig("buffer's address, low half", lambda config, at: config.data_address(at) & 0xFFFFFFFF)
_HIGH = FromConfig("buffer's address, high half", lambda config, at: config.data_address(at) >> 32)
_ADDRESS = FromConfig("buffer's address", lambda config, at: config.data_address(at))

REGISTERS: Final[tuple[Register, ...]] = (
    Register(
        Offset.LOC_STATE, 4, Access.READ_ONLY, Scope.ALL,
        (
            Field("tpmEstablished", 0, 1, "0 once a locality-4 hash sequence took place, 1 before", 1, Varies.YES),
            Field("locAssigned", 1, 1, "a locality is active", 0, Varies.YES),
            Field("activeLocality", 2, 3, "which one; after relinquish, which one it was", 0, Varies.YES),
            Field("tpmRegValidSts", 7, 1, "the other bits are valid", 1),
        ),
        "Which locality has the TPM.",
    ),
    Register(
        Offset.LOC_CTRL, 4, Access.COMMAND, Scope.OWN,
        (
            Field("requestAccess", 0, 1, "asks for the TPM; at locality 4: TPM_HASH_START"),
            Field("relinquish", 1, 1, "gives it back; at locality 4: TPM_HASH_DATA"),
            Field("seize", 2, 1, "takes it from a lower locality; at locality 4: TPM_HASH_END"),
            Field("resetEstablishmentBit", 3, 1, "sets tpmEstablished again; localities 3 and 4 only"),
        ),
        "Asks for the TPM or gives it back.",
    ),
    Register(
        Offset.LOC_STS, 4, Access.READ_ONLY, Scope.OWN,
        (
            Field("Granted", 0, 1, "this locality has the TPM", 0, Varies.YES),
            Field("beenSeized", 1, 1, "a higher one took it away", 0, Varies.YES),
        ),
        "What became of this locality's request.",
    ),
    Register(
        Offset.INTF_ID, 4, Access.READ_ONLY, Scope.FIXED,
        (
            Field("InterfaceType", 0, 4, "1: CRB", 1),
            Field("InterfaceVersion", 4, 4, "1: CRB of the PTP", 1),
            Field("CapLocality", 8, 1, "0: locality 0 only, 1: five", _CAP_LOCALITY),
            Field("CapCRBIdleBypass", 9, 1, "1: no need to go idle between commands", _BYPASS),
            Field("CapCRBChunk", 10, 1, "1: nextChunk and crbRspRetry work", _CHUNK),
            Field("CapDataXferSizeSupport", 11, 2, "3: accesses up to 64 bytes", 3),
            Field("CapFIFO", 13, 1, "0: no FIFO interface"),
            Field("CapCRB", 14, 1, "1: CRB interface", 1),
            Field("InterfaceSelector", 17, 2, "1: CRB", 1),
            Field("IntfSelLock", 19, 1, "0: not locked"),
            Field("RID", 24, 8, "revision", _REVISION),
        ),
        "What the device is, low half.",
    ),
    Register(
        Offset.INTF_ID2, 4, Access.READ_ONLY, Scope.FIXED,
        (
            Field("VID", 0, 16, "vendor, as on PCI", _VENDOR),
            Field("DID", 16, 16, "device", _DEVICE),
        ),
        "What the device is, high half.",
    ),
    Register(
        Offset.CTRL_EXT, 8, Access.READ_ONLY, Scope.FIXED, _whole("Ext", "not there", 0, 64),
        "For platforms with little memory; no TPM in hardware has it.",
    ),
    Register(
        Offset.CTRL_REQ, 4, Access.COMMAND, Scope.ACTIVE,
        (
            Field("cmdReady", 0, 1, "asks for the Ready state; done at once"),
            Field("goIdle", 1, 1, "asks for the Idle state; done at once"),
        ),
        "Asks for a state.",
    ),
    Register(
        Offset.CTRL_STS, 4, Access.READ_ONLY, Scope.ACTIVE,
        (
            Field("tpmSts", 0, 1, "fatal error; only a reset clears it", 0, Varies.YES),
            Field("tpmIdle", 1, 1, "in the Idle state", 1, Varies.YES),
        ),
        "The state.",
    ),
    Register(
        Offset.CTRL_CANCEL, 4, Access.STORED, Scope.ACTIVE,
        (Field("Cancel", 0, 1, "1 cancels the command that executes; written 0 afterwards", 0, Varies.IN_PTP),),
        "Cancels a command.",
    ),
    Register(
        Offset.CTRL_START, 4, Access.HELD, Scope.ACTIVE,
        (
            Field("Start", 0, 1, "executes the command in the buffer; 0 again when the response is", 0, Varies.YES),
            Field("crbRspRetry", 1, 1, "shows the beginning of the response again; done at once"),
            Field("nextChunk", 2, 1, "takes or shows the next piece; done at once"),
        ),
        "Starts a command and moves pieces.",
    ),
    Register(
        Offset.INT_ENABLE, 4, Access.STORED, Scope.ACTIVE,
        (
            Field("startIntEnable", 0, 1, "remembered, no interrupt is raised", 0, Varies.IN_PTP),
            Field("cmdReadyIntEnable", 1, 1, "likewise", 0, Varies.IN_PTP),
            Field("establishmentClearIntEnable", 2, 1, "likewise", 0, Varies.IN_PTP),
            Field("localityChangeIntEnable", 3, 1, "likewise", 0, Varies.IN_PTP),
            Field("nextChunkClearedIntEnable", 4, 1, "likewise", 0, Varies.IN_PTP),
            Field("globalInterruptEnable", 31, 1, "likewise", 0, Varies.IN_PTP),
        ),
        "Enables interrupts.",
    ),
    Register(
        Offset.INT_STS, 4, Access.READ_ONLY, Scope.ACTIVE, (),
        "Which interrupt occurred: never one, so that writing 1 has nothing to clear.",
    ),
    Register(
        Offset.CMD_SIZE, 4, Access.READ_ONLY, Scope.FIXED, _whole("Size", "bytes", _SIZE), "Size of the command buffer."
    ),
    Register(
        Offset.CMD_LADDR, 4, Access.READ_ONLY, Scope.FIXED, _whole("Address", "low half", _LOW),
        "Where the command buffer is.",
    ),
    Register(
        Offset.CMD_HADDR, 4, Access.READ_ONLY, Scope.FIXED, _whole("Address", "high half", _HIGH),
        "Where the command buffer is.",
    ),
    Register(
        Offset.RSP_SIZE, 4, Access.READ_ONLY, Scope.FIXED, _whole("Size", "bytes", _SIZE),
        "Size of the response buffer, which is the command buffer.",
    ),
    Register(
        Offset.RSP_ADDR, 8, Access.READ_ONLY, Scope.FIXED, _whole("Address", "64 bits", _ADDRESS, 64),
        "Where the response buffer is.",
    ),
)  # fmt: skip


def reset_words(config: CrbConfig, locality: int) -> tuple[int, ...]:
    """The 32-bit words of `locality`'s page before the buffer, after a reset with no hash sequence ever seen."""
    words = [0] * WORDS
    for register in REGISTERS:
        value = 0
        for field in register.fields:
            value |= field.reset_value(config, locality) << field.low & field.mask
        for part in range(register.size // 4):
            words[register.offset // 4 + part] |= value >> 32 * part & 0xFFFFFFFF
    return tuple(words)


def varying_masks(config: CrbConfig) -> tuple[int, ...]:
    """For each word the bits that may differ from the reset value while the device runs."""
    masks = [0] * WORDS
    for register in REGISTERS:
        for field in register.fields:
            if field.varies is Varies.YES or (field.varies is Varies.IN_PTP and config.dialect is Dialect.PTP):
                masks[register.offset // 4] |= field.mask
    return tuple(masks)


def register_at(word: int) -> str:
    """The name of the register that word number `word` belongs to, for people."""
    for register in REGISTERS:
        if register.offset <= 4 * word < register.offset + register.size:
            return register.name
    return f"reserved word {4 * word:#04x}"


@dataclass(frozen=True, slots=True)
class RegisterValue:
    """One register of a page, decoded. `fields` are in the table's order."""

    name: str
    offset: int
    size: int
    value: int
    fields: tuple[tuple[str, int], ...]


def decode(page: bytes | bytearray | memoryview) -> tuple[RegisterValue, ...]:
    """What a page of registers says, register by register. Needs the first 128 bytes; raises ValueError for fewer."""
    if len(page) < BUFFER_OFFSET:
        raise ValueError(f"a page of registers has {BUFFER_OFFSET} bytes before its buffer, not {len(page)}")
    decoded = []
    for register in REGISTERS:
        value = int.from_bytes(page[register.offset : register.offset + register.size], "little")
        fields = tuple((field.name, (value & field.mask) >> field.low) for field in register.fields)
        decoded.append(RegisterValue(register.name, register.offset, register.size, value, fields))
    return tuple(decoded)


def words_of(page: bytes | bytearray | memoryview) -> tuple[int, ...]:
    """The 32-bit words before the buffer of a page that has at least those."""
    return tuple(int.from_bytes(page[at : at + 4], "little") for at in range(0, BUFFER_OFFSET, 4))


def bytes_of(words: Sequence[int]) -> bytes:
    """The other way round."""
    return b"".join(word.to_bytes(4, "little") for word in words)
