"""The memory of the served registers' data buffer: what a register client maps for its guest."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from crbd.errors import EndpointError, HandoverError
from crbd.vfiouser.spec import BAR_SIZE, BUFFER_OFFSET

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Whoever has the descriptor may write; a file made shorter would end this process at its next access (SIGBUS)."""


class RegisterBuffer:
    """Memory as large as BAR 0, so that an offset there is an offset here; the registers' page in it is not used."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.memory = memoryview(mmap.mmap(descriptor, BAR_SIZE))[BUFFER_OFFSET:]
        """The data buffer, writable."""

    @property
    def mappable(self) -> bool:
        """Whether the buffer begins at a page of this machine, as what is mapped has to."""
        return BUFFER_OFFSET % mmap.PAGESIZE == 0


@contextmanager
def made() -> Iterator[RegisterBuffer]:
    """A new one, all zeros. Raises EndpointError where there is no memory for it."""
    try:
        descriptor = os.memfd_create("crbd-registers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise EndpointError(f"--registers: no memory for the data buffer: {error.strerror}", "make room") from error
    try:
        os.ftruncate(descriptor, BAR_SIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        yield RegisterBuffer(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def adopted(descriptor: int) -> Iterator[RegisterBuffer]:
    """The one that the process before this one had. Raises HandoverError."""
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != _SEALS or os.fstat(descriptor).st_size != BAR_SIZE:
            raise HandoverError("the data buffer that was handed over is none", "start anew")
        yield RegisterBuffer(descriptor)
    finally:
        os.close(descriptor)
