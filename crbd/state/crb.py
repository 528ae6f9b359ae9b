"""The saved form of the CRB device: the `crb` section, versions 1 to 3.

Section bodies. All numbers little-endian, as the registers are.

    version 1, the split mapping (one locality, no chunks):
        32 x u32   the registers 0x00 to 0x7F
        u8         length of the RAM block's name, then the name in ASCII: "tpm-crb-cmd"
        u32        bytes in the RAM block, then the block (3968 bytes)
    version 2, the page (one locality, no chunks):
        4096 bytes, the page of locality 0
    version 3, any number of localities, any place of the buffer:
        u8         flags: 1 completed, 2 a transfer follows
        u8         localities, n
        n x u8     LOC_STS of each
        u8         the localities that wait for the TPM, a bit each
        32 x u32   the registers 0x00 to 0x7F of the page of the locality that LOC_STATE names
        u32        bytes in the data buffer, then the buffer
        only with flag 2:
        u8         the locality whose command executes, 0xFF for none
        u32        bytes of the command, then the command: the one that executes, or what has arrived of it
        u32        bytes of the response, then the response
        u32        how many bytes of the response have been shown so far

Versions 1 and 2 know no command under way but the one that stands whole in the buffer while START is set. What they
cannot say is refused when asked for (`lower`): a form that would not read back as the same device is never written.
LOC_STATE.tpmEstablished is saved as the register had it; the engine's flag is the truth, and whoever thaws sets it.

The ladder's steps are never edited. Golden files of each version: tests/crb/golden.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from crbd.crb.config import BUFFER_OFFSET, BUFFER_SIZE, MAX_LOCALITIES, MAX_SEPARATE_BUFFER, PAGE_SIZE
from crbd.crb.mapping.split import RAM_BLOCK
from crbd.crb.snapshot import NOBODY, CrbSnapshot, damaged
from crbd.crb.spec import WORDS, Offset, bytes_of, words_of
from crbd.errors import StateNewerError, WireError
from crbd.wire.reader import Reader

SECTION: Final = "crb"
VERSION: Final = 3
"""What `encode` of a current device writes."""

_U32 = Struct("<I")
_COMPLETED = 1
_TRANSFER = 2
_NOBODY_BYTE = 0xFF
_CHUNKS = 1 << 10
"""INTF_ID.CapCRBChunk."""


@dataclass(frozen=True, slots=True)
class CrbStateV1:
    """The split mapping: `registers` (32 words) and the RAM block `tpm-crb-cmd` (3968 bytes)."""

    registers: tuple[int, ...]
    ram: bytes


@dataclass(frozen=True, slots=True)
class CrbStateV2:
    """The page: 4096 bytes."""

    page: bytes


@dataclass(frozen=True, slots=True)
class CrbTransfer:
    """What has no room in registers and buffer while a command or a response is under way."""

    executor: int
    command: bytes
    response: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class CrbStateV3:
    """Any device; `transfer` only while one is under way."""

    completed: bool
    statuses: tuple[int, ...]
    pending: int
    registers: tuple[int, ...]
    buffer: bytes
    transfer: CrbTransfer | None = None


CrbState = CrbStateV1 | CrbStateV2 | CrbStateV3


# -- to and from the device
# -------------------------------------------------------------------------------------------------------


def saved(snapshot: CrbSnapshot) -> CrbStateV3:
    """What is kept of a frozen device: all of it."""
    transfer = None
    if snapshot.executor != NOBODY or snapshot.command or snapshot.response:
        transfer = CrbTransfer(snapshot.executor, snapshot.command, snapshot.response, snapshot.offset)
    return CrbStateV3(
        completed=snapshot.completed,
        statuses=snapshot.statuses,
        pending=snapshot.pending,
        registers=snapshot.words,
        buffer=snapshot.buffer,
        transfer=transfer,
    )


def snapshot_of(state: CrbStateV3) -> CrbSnapshot:
    """The other way. What the values say is judged by `CrbDevice.thaw`."""
    transfer = state.transfer or CrbTransfer(NOBODY, b"", b"", 0)
    return CrbSnapshot(
        words=state.registers,
        statuses=state.statuses,
        pending=state.pending,
        completed=state.completed,
        buffer=state.buffer,
        executor=transfer.executor,
        command=transfer.command,
        response=transfer.response,
        offset=transfer.offset,
    )


# -- the ladder
# -------------------------------------------------------------------------------------------------------------------


def v1_to_v2(state: CrbStateV1) -> CrbStateV2:
    """Registers and RAM block, one behind the other, are the page."""
    return CrbStateV2(bytes_of(state.registers) + state.ram)


def v2_to_v3(state: CrbStateV2) -> CrbStateV3:
    """One locality; the buffer as long as CMD_SIZE says; the command that executes stands in the buffer.

    Raises StateDamagedError for a page that says it has chunks, or a longer buffer than a page, or has more in LOC_STS
    than any device ever had: it is a word there, and a byte in the newer form.
    """
    registers = words_of(state.page)
    if registers[Offset.INTF_ID // 4] & _CHUNKS:
        raise damaged("INTF_ID", "promises chunks, which a page alone cannot save")
    size = registers[Offset.CMD_SIZE // 4]
    if size > BUFFER_SIZE or any(state.page[BUFFER_OFFSET + size :]):
        raise damaged("CMD_SIZE", f"is {size:#x}, against the page")
    buffer = state.page[BUFFER_OFFSET : BUFFER_OFFSET + size]
    transfer = None
    if registers[Offset.CTRL_START // 4] & 1:
        declared = int.from_bytes(buffer[2:6], "big")
        transfer = CrbTransfer(executor=0, command=buffer[:declared], response=b"", offset=0)
    status = registers[Offset.LOC_STS // 4]
    if status > 0xFF:
        raise damaged("LOC_STS", f"is {status:#x}")
    return CrbStateV3(False, (status,), 0, registers, buffer, transfer)


def lift(state: CrbState) -> CrbStateV3:
    """Any version as the newest. Raises StateDamagedError."""
    if isinstance(state, CrbStateV1):
        state = v1_to_v2(state)
    return v2_to_v3(state) if isinstance(state, CrbStateV2) else state


def lower(state: CrbStateV3, version: int) -> CrbState:
    """The same device in an older form, for an older reader.

    Raises StateDamagedError where that form would not read back as the same device.
    """
    if version == VERSION:
        return state
    page = (bytes_of(state.registers) + state.buffer).ljust(PAGE_SIZE, b"\0")
    older = CrbStateV2(page)
    if len(page) != PAGE_SIZE or v2_to_v3(older) != state:
        raise damaged("what is under way", f"cannot be said in version {version} of the {SECTION} section")
    return older if version == 2 else CrbStateV1(words_of(page), page[BUFFER_OFFSET:])


# -- bytes
# ---------------------------------------------------------------------------------------------------------------------


def encode(state: CrbState) -> tuple[int, bytes]:
    """Version and body of the section."""
    if isinstance(state, CrbStateV1):
        name = RAM_BLOCK.encode("ascii")
        return 1, b"".join((bytes_of(state.registers), bytes((len(name),)), name, _counted(state.ram)))
    if isinstance(state, CrbStateV2):
        return 2, state.page
    transfer = state.transfer
    flags = (_COMPLETED if state.completed else 0) | (_TRANSFER if transfer else 0)
    parts = [bytes((flags, len(state.statuses), *state.statuses, state.pending))]
    parts += (bytes_of(state.registers), _counted(state.buffer))
    if transfer is not None:
        executor = _NOBODY_BYTE if transfer.executor == NOBODY else transfer.executor
        parts += (bytes((executor,)), _counted(transfer.command), _counted(transfer.response))
        parts.append(_U32.pack(transfer.offset))
    return 3, b"".join(parts)


def decode(version: int, body: bytes) -> CrbState:
    """The saved form out of a section's body. Raises StateDamagedError, or StateNewerError for a later version."""
    if version > VERSION:
        raise StateNewerError(
            f"the saved CRB registers have version {version}, this release reads up to {VERSION}",
            "use the release that wrote them, or a newer one",
        )
    decoder = {1: _decode_v1, 2: _decode_v2, 3: _decode_v3}.get(version)
    if decoder is None:
        raise damaged("the section", f"has version {version}, which never was")
    reader = Reader(body)
    try:
        state = decoder(reader)
        reader.expect_end()
    except WireError as error:
        raise damaged("the section", f"is malformed: {error}") from error
    return state


def _decode_v1(reader: Reader) -> CrbState:
    registers = words_of(reader.take(BUFFER_OFFSET))
    name = reader.take(reader.u8())
    if name != RAM_BLOCK.encode("ascii"):
        raise damaged("the RAM block", f"is called {name!r}, not {RAM_BLOCK!r}")
    ram = _take_counted(reader, BUFFER_SIZE)
    if len(ram) != BUFFER_SIZE:
        raise damaged("the RAM block", f"has {len(ram)} bytes, not {BUFFER_SIZE}")
    return CrbStateV1(registers, ram)


def _decode_v2(reader: Reader) -> CrbState:
    return CrbStateV2(reader.take(PAGE_SIZE))


def _decode_v3(reader: Reader) -> CrbState:
    flags = reader.u8()
    if flags & ~(_COMPLETED | _TRANSFER):
        raise damaged("the section", f"has flags {flags:#x}")
    localities = reader.u8()
    if localities > MAX_LOCALITIES:
        raise damaged("LOC_STS", f"is there for {localities} localities")
    statuses = tuple(reader.take(localities))
    pending = reader.u8()
    registers = words_of(reader.take(4 * WORDS))
    buffer = _take_counted(reader, MAX_SEPARATE_BUFFER)
    transfer = None
    if flags & _TRANSFER:
        executor = reader.u8()
        transfer = CrbTransfer(
            executor=NOBODY if executor == _NOBODY_BYTE else executor,
            command=_take_counted(reader, MAX_SEPARATE_BUFFER),
            response=_take_counted(reader, MAX_SEPARATE_BUFFER),
            offset=reader.u32_le(),
        )
    return CrbStateV3(bool(flags & _COMPLETED), statuses, pending, registers, buffer, transfer)


def _counted(data: bytes) -> bytes:
    return _U32.pack(len(data)) + data


def _take_counted(reader: Reader, limit: int) -> bytes:
    count = reader.u32_le()
    if count > limit:
        raise damaged("the section", f"counts {count} bytes where at most {limit} can be")
    return reader.take(count)
