"""What the device says of itself and of what it does not do: each a request's body in, the reply's body out.

A body that is no such request raises WireError, a request that cannot be met RefusedError.
"""

from __future__ import annotations

from struct import Struct

from crbd.errors import WireError
from crbd.vfiouser import spec
from crbd.vfiouser.configuration import SIZE as CONFIGURATION_SIZE
from crbd.vfiouser.spec import Errno


class RefusedError(Exception):
    """The request is to be answered with `errno`."""

    def __init__(self, errno: Errno) -> None:
        super().__init__(errno)
        self.errno = errno


def unpacked(layout: Struct, body: bytes) -> tuple[int, ...]:
    """The numbers of a body that is that layout and no byte more. Raises WireError."""
    if len(body) != layout.size:
        raise WireError(f"a body of {len(body)} bytes where {layout.size} are wanted")
    return layout.unpack(body)


def device_info(body: bytes) -> bytes:
    """DEVICE_GET_INFO."""
    argsz, *_ = unpacked(spec.DEVICE_INFO, body)
    _expect_room(argsz, spec.DEVICE_INFO)
    flags = spec.DEVICE_RESETTABLE | spec.DEVICE_PCI
    return spec.DEVICE_INFO.pack(spec.DEVICE_INFO.size, flags, spec.REGIONS, spec.IRQS)


def region_info(body: bytes, *, mappable: bool) -> tuple[bytes, bool]:
    """DEVICE_GET_REGION_INFO; and whether the descriptor of the region's memory goes along.

    A client that asks with too little room is told how much is needed, and asks again. (QEMU refuses a capability that
    is said to begin at 0, so the place of one that is left out is told too.)
    """
    argsz, _, index, *_ = unpacked(spec.REGION_INFO, body)
    _expect_room(argsz, spec.REGION_INFO)
    if index >= spec.REGIONS:
        raise RefusedError(Errno.EINVAL)
    size, flags = 0, 0
    if index in SIZES:
        size, flags = SIZES[index], spec.REGION_READABLE | spec.REGION_WRITABLE
    if index != spec.REGISTERS or not mappable:
        return spec.REGION_INFO.pack(spec.REGION_INFO.size, flags, index, 0, size, 0), False
    flags |= spec.REGION_MAPPABLE | spec.REGION_HAS_CAPABILITIES
    whole = spec.REGION_INFO.size + spec.SPARSE_MMAP.size
    head = spec.REGION_INFO.pack(whole, flags, index, spec.REGION_INFO.size, size, 0)
    if argsz < whole:
        return head, False
    area = (1, 0, spec.BUFFER_OFFSET, spec.BAR_SIZE - spec.BUFFER_OFFSET)
    return head + spec.SPARSE_MMAP.pack(spec.SPARSE_MMAP_ID, spec.SPARSE_MMAP_VERSION, 0, *area), True


def region_io_descriptors(body: bytes) -> bytes:
    """DEVICE_GET_REGION_IO_FDS: none."""
    argsz, _, index, _ = unpacked(spec.REGION_IO_FDS, body)
    _expect_room(argsz, spec.REGION_IO_FDS)
    if index >= spec.REGIONS:
        raise RefusedError(Errno.EINVAL)
    return spec.REGION_IO_FDS.pack(spec.REGION_IO_FDS.size, 0, index, 0)


def irq_info(body: bytes) -> bytes:
    """DEVICE_GET_IRQ_INFO: none of any kind."""
    argsz, _, index, _ = unpacked(spec.IRQ_INFO, body)
    _expect_room(argsz, spec.IRQ_INFO)
    if index >= spec.IRQS:
        raise RefusedError(Errno.EINVAL)
    return spec.IRQ_INFO.pack(spec.IRQ_INFO.size, 0, index, 0)


def set_irqs(body: bytes) -> bytes:
    """DEVICE_SET_IRQS: taking all away is done already, anything else cannot be."""
    _, flags, index, start, count = unpacked(spec.SET_IRQS, body[: spec.SET_IRQS.size])
    if index >= spec.IRQS or start or count or flags != spec.IRQ_SET_NOTHING:
        raise RefusedError(Errno.EINVAL)
    return b""


def dma_map(body: bytes) -> bytes:
    """DMA_MAP: acknowledged. The device reads and writes no guest memory."""
    unpacked(spec.DMA_MAP, body)
    return b""


def dma_unmap(body: bytes) -> bytes:
    """DMA_UNMAP: acknowledged by what was asked. There is no record of dirty pages."""
    _, flags, *_ = unpacked(spec.DMA_UNMAP, body)
    if flags & spec.UNMAP_DIRTY_BITMAP:
        raise RefusedError(Errno.ENOTSUP)
    return body


SIZES = {spec.REGISTERS: spec.BAR_SIZE, spec.CONFIGURATION: CONFIGURATION_SIZE}
"""Bytes in the regions that are there."""


def check_access(offset: int, region: int, count: int) -> None:
    """Raises RefusedError for what is not within a region."""
    if offset + count > SIZES.get(region, -1):
        raise RefusedError(Errno.EINVAL)


def written(body: bytes) -> tuple[int, int, bytes]:
    """Region, offset and bytes of REGION_WRITE, which are within the region."""
    if len(body) < spec.REGION_ACCESS.size:
        raise WireError(f"a write of {len(body)} bytes, its head included")
    offset, region, count = spec.REGION_ACCESS.unpack_from(body)
    data = body[spec.REGION_ACCESS.size :]
    if len(data) != count:
        raise WireError(f"a write of {count} bytes with {len(data)}")
    check_access(offset, region, count)
    return region, offset, data


def all_written(body: bytes) -> tuple[tuple[int, int, bytes], ...]:
    """The same of REGION_WRITE_MULTI. One write that is wrong makes them all so."""
    if len(body) < spec.WRITE_COUNT.size:
        raise WireError(f"writes of {len(body)} bytes")
    (number,) = spec.WRITE_COUNT.unpack_from(body)
    rest = body[spec.WRITE_COUNT.size :]
    if len(rest) != number * spec.ONE_WRITE.size:
        raise WireError(f"{number} writes in {len(rest)} bytes")
    writes = []
    for offset, region, count, data in spec.ONE_WRITE.iter_unpack(rest):
        if count > len(data):
            raise WireError(f"a write of {count} bytes in {len(data)}")
        check_access(offset, region, count)
        writes.append((region, offset, data[:count]))
    return tuple(writes)


def _expect_room(argsz: int, layout: Struct) -> None:
    if argsz < layout.size:
        raise RefusedError(Errno.EINVAL)
