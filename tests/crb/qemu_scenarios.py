"""What is done to QEMU's device: register accesses, with the scripted TPM.

The docstring of each goes into its trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Final

from .qemu_machine import BUFFER, CTRL_START
from .qemu_qtest import WIDTHS
from .qemu_recorder import (
    BUFFER_SIZE,
    CMD_READY,
    CONTROL_AREA,
    CTRL_CANCEL,
    CTRL_REQ,
    CTRL_STS,
    GO_IDLE,
    LOC_CTRL,
    LOC_STATE,
    LOC_STS,
    RELINQUISH,
    REQUEST_ACCESS,
    START,
    ScriptedRecorder,
    tpm_bytes,
)

REGISTERS: Final = (
    *(0x00, 0x08, 0x0C, 0x30, 0x34, 0x38, 0x40, 0x44, 0x48, 0x4C),
    *(0x50, 0x54, 0x58, 0x5C, 0x60, 0x64, 0x68, 0x6C),
)
"""Offsets of all registers' words."""
RESERVED: Final = (0x04, *range(0x10, 0x30, 4), 0x3C, *range(0x70, 0x80, 4))
"""Offsets of the control area's words that are no registers."""
COMMAND: Final = tpm_bytes(12, code=0x17B)
RESPONSE: Final = tpm_bytes(28, code=0, seed=0xA0)
PAGE: Final = 0x1000


def patterns(width: int) -> Iterator[int]:
    """0, all ones, and each single bit."""
    yield 0
    yield (1 << 8 * width) - 1
    yield from (1 << bit for bit in range(8 * width))


def reset_values(rec: ScriptedRecorder) -> None:
    """All words of the control area and the whole data buffer after power-on."""
    for offset in range(0, CONTROL_AREA, 4):
        rec.read(offset)
    rec.read(BUFFER, BUFFER_SIZE)


def read_widths(rec: ScriptedRecorder) -> None:
    """Reads of every width at every offset of the control area, idle and in execution."""
    rec.write_bytes(BUFFER, tpm_bytes(64, code=0x17B))
    for offset in range(CONTROL_AREA):
        for width in WIDTHS:
            rec.read(offset, width)
    rec.make_ready()
    rec.start(COMMAND)
    for offset in range(CONTROL_AREA):
        for width in WIDTHS:
            rec.read(offset, width)
    rec.complete(RESPONSE)


def _write_patterns(rec: ScriptedRecorder, width: int) -> None:
    """0, all ones and each single bit to every register in accesses of one width, each register from a reset."""
    for offset in REGISTERS:
        rec.reset()
        for value in patterns(width):
            rec.write(offset, value, width)
            rec.look()


def write_patterns_1(rec: ScriptedRecorder) -> None:
    """0, all ones and each single bit to every register's first byte, each register from a reset."""
    _write_patterns(rec, 1)


def write_patterns_2(rec: ScriptedRecorder) -> None:
    """0, all ones and each single bit to every register's first two bytes, each register from a reset."""
    _write_patterns(rec, 2)


def write_patterns_4(rec: ScriptedRecorder) -> None:
    """0, all ones and each single bit to every register, each from a reset."""
    _write_patterns(rec, 4)


def write_patterns_8(rec: ScriptedRecorder) -> None:
    """0, all ones and each single bit in accesses of 8 bytes from every register on, each from a reset."""
    _write_patterns(rec, 8)


def write_reserved(rec: ScriptedRecorder) -> None:
    """0, all ones and one other value in accesses of every width to words of the control area that are no registers."""
    for offset in RESERVED:
        for width in WIDTHS:
            for value in (0, (1 << 8 * width) - 1, 0x5A):
                rec.write(offset, value, width)
        rec.look(buffer=8)


def write_unaligned(rec: ScriptedRecorder) -> None:
    """The bytes of LOC_CTRL, CTRL_REQ and CTRL_START in accesses that begin before or within the register.

    The register's first byte, or the access's where that lies behind it, is 1 or 2, all others are 0; each access from
    a reset. For CTRL_START, access is granted and a command lies in the buffer.
    """
    for register in (LOC_CTRL, CTRL_REQ, CTRL_START):
        for width in WIDTHS:
            for offset in range(max(0, register - width + 1), register + 4):
                for value in (1, 2):
                    _write_at(rec, register, offset, width, value)


def _write_at(rec: ScriptedRecorder, register: int, offset: int, width: int, value: int) -> None:
    rec.reset()
    if register == CTRL_START:
        rec.make_ready()
        rec.write_bytes(BUFFER, COMMAND)
    image = bytearray(16)
    image[8] = value
    within = 8 + offset - register if offset <= register else 8
    rec.write_bytes(offset, bytes(image[within : within + width]).ljust(width, b"\0"))
    rec.look()
    _complete_if_executing(rec)


def _complete_if_executing(rec: ScriptedRecorder) -> None:
    if rec.executing:
        rec.await_bytes(len(COMMAND))
        rec.complete(RESPONSE)
        rec.look(buffer=32)


def start_patterns(rec: ScriptedRecorder) -> None:
    """0, all ones and each single bit to CTRL_START in every width, access granted and a command in the buffer.

    Each from a reset, so that the first command is the only one. Last, CTRL_CANCEL and CTRL_START in one access.
    """
    for width in WIDTHS:
        for value in patterns(width):
            _start_with(rec, CTRL_START, value, width)
    for value in (1 << 32, 1 << 32 | 1, 2 << 32, 4 << 32, 7 << 32, (1 << 64) - 1):
        _start_with(rec, CTRL_CANCEL, value, 8)


def _start_with(rec: ScriptedRecorder, offset: int, value: int, width: int) -> None:
    rec.reset()
    rec.make_ready()
    rec.write_bytes(BUFFER, COMMAND)
    rec.write(offset, value, width)
    rec.look()
    _complete_if_executing(rec)


def locality(rec: ScriptedRecorder) -> None:
    """Request, relinquish, seize and reset-establishment: alone, in every order, several at once; LOC_STS written."""
    for order in permutations((1, 2, 4, 8)):
        for value in order:
            rec.write(LOC_CTRL, value)
            rec.look()
        rec.reset()
    for value in range(16):
        rec.write(LOC_CTRL, REQUEST_ACCESS)
        rec.write(LOC_CTRL, value)
        rec.look()
        rec.write(LOC_CTRL, RELINQUISH)
        rec.write(LOC_CTRL, value)
        rec.look()
    for offset in (LOC_STATE, LOC_STS):
        for value in (0, 0xFFFFFFFF):
            rec.write(offset, value)
            rec.look()
    for width in WIDTHS:
        for value in (REQUEST_ACCESS, RELINQUISH):
            rec.write(LOC_CTRL, value, width)
            rec.look()


def idle_and_ready(rec: ScriptedRecorder) -> None:
    """CTRL_REQ in every order and combination, with and without access, and writes to CTRL_STS in between."""
    for _ in range(2):
        for value in (CMD_READY, CMD_READY, GO_IDLE, GO_IDLE, 3, CMD_READY, 3, 0, GO_IDLE, 0, 0x80000001):
            rec.write(CTRL_REQ, value)
            rec.look()
            rec.write(CTRL_STS, 0xFFFFFFFF)
            rec.look()
        rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.write(CTRL_REQ, CMD_READY)
    rec.write(LOC_CTRL, RELINQUISH)
    rec.look()
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.look()


def buffer_writes(rec: ScriptedRecorder) -> None:
    """Writes of every width to the data buffer: aligned and not, at both ends and beyond, in idle and in ready."""
    for _ in range(2):
        for width in WIDTHS:
            ones = (1 << 8 * width) - 1
            for offset in (*range(BUFFER, BUFFER + 9), *range(BUFFER - 7, BUFFER), *range(PAGE - 9, PAGE + 1)):
                rec.write(offset, ones & 0x8877665544332211, width)
            rec.look(buffer=32)
            rec.read(PAGE - 24, 24)
        for offset in range(BUFFER, BUFFER + 8):
            for width in WIDTHS:
                rec.read(offset, width)
        rec.write_bytes(BUFFER, tpm_bytes(BUFFER_SIZE, code=0x17B))
        rec.look(buffer=BUFFER_SIZE)
        rec.make_ready()


def absent_localities(rec: ScriptedRecorder) -> None:
    """Accesses of every width to the pages of localities 1 to 4, which QEMU has not: access to 0 granted or not."""
    for _ in range(2):
        for number in range(1, 5):
            page = number * PAGE
            for width in WIDTHS:
                for offset in (0x00, 0x0C, 0x30, 0x44, 0x58, BUFFER, PAGE - width):
                    rec.read(page + offset, width)
                for offset in (LOC_CTRL, CTRL_REQ, CTRL_START, BUFFER):
                    rec.write(page + offset, 1, width)
                    rec.read(page + offset, width)
            rec.look(buffer=16)
        rec.make_ready()
        rec.write_bytes(BUFFER, COMMAND)


def established(rec: ScriptedRecorder) -> None:
    """The TPM's tpmEstablished flag changes after it was read: QEMU asks for it once; reset-establishment, a reset."""
    rec.read(LOC_STATE)
    for flag in (True, False, True):
        rec.establish(flag)
        for offset in range(8):
            for width in WIDTHS:
                rec.read(offset, width)
        rec.write(LOC_CTRL, 8)
        rec.read(LOC_STATE)
        rec.reset()
        rec.read(LOC_STATE)


def established_from_start(rec: ScriptedRecorder) -> None:
    """The TPM's tpmEstablished flag is set before it is read; reset-establishment, a reset."""
    rec.establish(True)
    rec.reset()
    for offset in range(8):
        for width in WIDTHS:
            rec.read(offset, width)
    rec.write(LOC_CTRL, 8)
    rec.read(LOC_STATE)
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.read(LOC_STATE)
    rec.establish(False)
    rec.read(LOC_STATE)
    rec.reset()
    rec.read(LOC_STATE)


def resets(rec: ScriptedRecorder) -> None:
    """System resets in every state: what is left of registers and buffer; QEMU lets a command end before it resets."""
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.reset()
    rec.look()
    rec.make_ready()
    rec.write_bytes(BUFFER, COMMAND)
    rec.reset()
    rec.look(buffer=32)
    rec.make_ready()
    rec.start(COMMAND)
    rec.complete(RESPONSE)
    rec.look(buffer=64)
    rec.reset()
    rec.look(buffer=64)
    rec.make_ready()
    rec.start(COMMAND)
    rec.look()
    rec.complete_in_reset(RESPONSE)
    rec.look(buffer=64)
    rec.make_ready()
    rec.write(CTRL_START, START)
    rec.look()
    if rec.executing:
        rec.complete(RESPONSE)
        rec.look(buffer=64)
