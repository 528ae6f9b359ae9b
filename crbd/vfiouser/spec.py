"""vfio-user in numbers: commands, layouts, limits, and what our device says of itself.

From QEMU's docs/interop/vfio-user.rst (protocol 0.x), and linux/vfio.h for flags and indices. All numbers are
little-endian: the specification says the host's order, and both ends are on one host; a big-endian one is not served.

Every message begins with the header

    u16 id, u16 command, u32 size of the whole message, u32 flags, u32 errno
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

HEADER: Final = Struct("<HHIII")
HEADER_SIZE: Final = HEADER.size

# -- flags of the header
TYPE_MASK: Final = 0x0F
COMMAND: Final = 0x00
REPLY: Final = 0x01
NO_REPLY: Final = 0x10
ERROR: Final = 0x20


class Message(IntEnum):
    """The commands, by the specification's names. The last four are optional, and ours is a device without them."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    """From server to client alone, like the next."""
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Errno(IntEnum):
    """What error replies carry: Linux numbers, whatever the host."""

    EIO = 5
    EINVAL = 22
    ENOTSUP = 95


VERSION: Final = Struct("<HH")
"""u16 major, u16 minor; JSON text with a NUL follows."""
DMA_MAP: Final = Struct("<IIQQQ")
"""u32 argsz, u32 flags, u64 offset in the descriptor, u64 address, u64 size."""
DMA_UNMAP: Final = Struct("<IIQQ")
"""u32 argsz, u32 flags, u64 address, u64 size."""
DEVICE_INFO: Final = Struct("<IIII")
"""u32 argsz, u32 flags, u32 regions, u32 irqs."""
REGION_INFO: Final = Struct("<IIIIQQ")
"""u32 argsz, u32 flags, u32 index, u32 offset of the first capability, u64 size, u64 offset in the descriptor."""
SPARSE_MMAP: Final = Struct("<HHIIIQQ")
"""A capability: u16 id, u16 version, u32 next, u32 areas, u32 reserved; here with one area: u64 offset, u64 size."""
REGION_IO_FDS: Final = Struct("<IIII")
"""u32 argsz, u32 flags, u32 index, u32 count."""
IRQ_INFO: Final = Struct("<IIII")
"""u32 argsz, u32 flags, u32 index, u32 count."""
SET_IRQS: Final = Struct("<IIIII")
"""u32 argsz, u32 flags, u32 index, u32 start, u32 count."""
REGION_ACCESS: Final = Struct("<QII")
"""u64 offset, u32 region, u32 count; the bytes follow in writes and in replies to reads."""
WRITE_COUNT: Final = Struct("<Q")
"""u64 number of writes, in WRITE_MULTI and in its reply."""
ONE_WRITE: Final = Struct("<QII8s")
"""One of WRITE_MULTI's: as REGION_ACCESS, with room for 8 bytes whatever the count."""

# -- linux/vfio.h
DEVICE_RESETTABLE: Final = 1
DEVICE_PCI: Final = 2
REGION_READABLE: Final = 1
REGION_WRITABLE: Final = 2
REGION_MAPPABLE: Final = 4
REGION_HAS_CAPABILITIES: Final = 8
SPARSE_MMAP_ID: Final = 1
SPARSE_MMAP_VERSION: Final = 1
IRQ_SET_NOTHING: Final = 0x21
"""VFIO_IRQ_SET_DATA_NONE with ACTION_TRIGGER: with a count of 0 it takes all interrupts away."""
UNMAP_DIRTY_BITMAP: Final = 1

REGISTERS: Final = 0
"""The index of BAR 0's region."""
CONFIGURATION: Final = 7
"""That of config space."""
REGIONS: Final = 9
"""BARs 0 to 5, option ROM, config space, VGA: VFIO_PCI_NUM_REGIONS."""
IRQS: Final = 5
"""INTx, MSI, MSI-X, error, request: VFIO_PCI_NUM_IRQS. Ours has none of each."""

# -- BAR 0
PAGE: Final = 0x1000
BAR_SIZE: Final = 2 * PAGE
"""The registers' page, and behind it the data buffer."""
BUFFER_OFFSET: Final = PAGE
"""Of the data buffer: in BAR 0, and in the memory whose descriptor goes to the client."""

# -- limits
MAJOR: Final = 0
MINOR: Final = 0
"""Of the protocol. Nothing that later minor versions add concerns this device."""
MAX_TRANSFER: Final = 1 << 16
"""Bytes that one message may read or write; the client is told, and no region is as large."""
MAX_MESSAGE: Final = HEADER_SIZE + REGION_ACCESS.size + MAX_TRANSFER
MAX_VERSION_TEXT: Final = 4096
"""Bytes of JSON; QEMU sends some 200."""
MAX_DESCRIPTORS: Final = 8
"""That the client may send with one message. We want none: the kernel discards them unseen."""
