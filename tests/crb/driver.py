"""What a register driver does, for tests: short names for the accesses, in the order a guest makes them."""

from __future__ import annotations

from crbd.crb.config import BUFFER_OFFSET
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Effect
from crbd.crb.spec import Offset

REQUEST_ACCESS, RELINQUISH, SEIZE, RESET_ESTABLISHMENT = 1, 2, 4, 8
HASH_START, HASH_DATA, HASH_END = 1, 2, 4
CMD_READY, GO_IDLE = 1, 2
START, RETRY, NEXT = 1, 2, 4


def word(device: CrbDevice, offset: Offset, locality: int = 0) -> int:
    """A 32-bit register."""
    return int.from_bytes(device.read(locality, offset, 4), "little")


def put(device: CrbDevice, offset: Offset, value: int, locality: int = 0) -> tuple[Effect, ...]:
    """Write a 32-bit register."""
    return device.write(locality, offset, value.to_bytes(4, "little"))


def command(size: int = 12, fill: int = 0x5A) -> bytes:
    """`size` bytes with a TPM head that says so."""
    return bytes.fromhex("8001") + size.to_bytes(4, "big") + bytes.fromhex("0000017b") + bytes([fill]) * (size - 10)


def response(size: int = 28, fill: int = 0xA5) -> bytes:
    """Likewise, with response code 0."""
    return bytes.fromhex("8001") + size.to_bytes(4, "big") + bytes(4) + bytes([fill]) * (size - 10)


def fill_buffer(device: CrbDevice, data: bytes, locality: int = 0) -> None:
    """Write into the data buffer of the page."""
    assert device.write(locality, BUFFER_OFFSET, data) == ()


def buffer_of(device: CrbDevice, size: int | None = None, locality: int = 0) -> bytes:
    """Read the data buffer of the page."""
    return device.read(locality, BUFFER_OFFSET, device.config.buffer_size if size is None else size)


def ready(device: CrbDevice, locality: int = 0) -> None:
    """RequestAccess and cmdReady."""
    assert put(device, Offset.LOC_CTRL, REQUEST_ACCESS, locality) == ()
    assert put(device, Offset.CTRL_REQ, CMD_READY, locality) == ()


def start(device: CrbDevice, data: bytes | None = None, locality: int = 0) -> tuple[Effect, ...]:
    """A whole driver's way in: ready, the command, START."""
    ready(device, locality)
    fill_buffer(device, command() if data is None else data, locality)
    return put(device, Offset.CTRL_START, START, locality)


def run(device: CrbDevice, data: bytes | None = None, answer: bytes | None = None, locality: int = 0) -> None:
    """One whole command."""
    (effect,) = start(device, data, locality)
    assert device.executing == effect
    device.complete(response() if answer is None else answer)
