"""A vfio-user client without a socket: messages out, replies in. Written from the specification, not from our server.

It does what QEMU does, and whatever a test makes it do.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

VERSION, DMA_MAP, DMA_UNMAP, INFO, REGION_INFO, REGION_IO_FDS, IRQ_INFO, SET_IRQS = range(1, 9)
READ, WRITE, DMA_READ, DMA_WRITE, RESET = range(9, 14)
WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = range(15, 19)
NO_REPLY = 0x10
BAR0, CONFIG = 0, 7
EINVAL, ENOTSUP, EIO = 22, 95, 5

QEMU = {
    "capabilities": {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1048576,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
        "migration": {"pgsize": 4096, "max_bitmap_size": 268435456},
        "write_multiple": True,
    }
}
"""What QEMU 11.1 says of itself."""


@dataclass(frozen=True)
class Answer:
    """One reply; `errno` is None where it is no error reply."""

    ident: int
    command: int
    body: bytes
    errno: int | None = None


def message(ident: int, command: int, body: bytes = b"", flags: int = 0, size: int | None = None) -> bytes:
    """A whole command; `size` is what its header claims, where that is a lie."""
    return struct.pack("<HHIII", ident, command, 16 + len(body) if size is None else size, flags, 0) + body


def version(ident: int = 1, said: object = QEMU, major: int = 0, minor: int = 0) -> bytes:
    text = b"" if said is None else json.dumps(said).encode() + b"\0"
    return message(ident, VERSION, struct.pack("<HH", major, minor) + text)


def read(ident: int, region: int, offset: int, count: int) -> bytes:
    return message(ident, READ, struct.pack("<QII", offset, region, count))


def write(ident: int, region: int, offset: int, data: bytes, flags: int = 0) -> bytes:
    return message(ident, WRITE, struct.pack("<QII", offset, region, len(data)) + data, flags)


def write_multi(ident: int, writes: list[tuple[int, int, bytes]], flags: int = 0) -> bytes:
    """`writes`: region, offset, bytes."""
    each = b"".join(struct.pack("<QII8s", offset, region, len(data), data) for region, offset, data in writes)
    return message(ident, WRITE_MULTI, struct.pack("<Q", len(writes)) + each, flags)


def region_info(ident: int, index: int, argsz: int = 32) -> bytes:
    return message(ident, REGION_INFO, struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0))


def dma_map(ident: int, address: int = 0, size: int = 0x1000) -> bytes:
    return message(ident, DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, address, size))


def dma_unmap(ident: int, address: int = 0, size: int = 0x1000, flags: int = 0) -> bytes:
    return message(ident, DMA_UNMAP, struct.pack("<IIQQ", 24, flags, address, size))


def answers(data: bytes) -> list[Answer]:
    """All replies in `data`, which holds whole ones."""
    found = []
    while data:
        ident, command, size, flags, errno = struct.unpack_from("<HHIII", data)
        assert flags in (0x1, 0x21), f"flags {flags:#x}"
        assert size <= len(data), "a reply is cut short"
        assert flags == 0x1 or size == 16, "an error reply is its header alone"
        found.append(Answer(ident, command, data[16:size], errno if flags == 0x21 else None))
        data = data[size:]
    return found


def answer(data: bytes) -> Answer:
    """The one reply in `data`."""
    (only,) = answers(data)
    return only


HANDSHAKE = (
    version(1),
    dma_map(2, 0, 0xA0000),
    message(3, INFO, struct.pack("<IIII", 16, 0, 0, 0)),
    region_info(4, 0),
    region_info(5, 0, 64),
    *(region_info(6 + index, index) for index in range(1, 6)),
    region_info(12, CONFIG),
    region_info(13, 6),
    *(message(14 + index, IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0)) for index in range(5)),
    read(20, CONFIG, 0, 256),
    message(21, RESET),
)
"""What QEMU sends when it starts, in its order."""
