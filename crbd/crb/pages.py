"""The memory that a guest reads: one 4 KiB page per locality, and the bits of it that say who has the TPM.

LOC_STATE (byte 0) reads the same on every page. Control area and buffer show on the page of the *owner*, the locality
that LOC_STATE.activeLocality names; the other pages hold reset values there. Every field that changes lies in the
lowest byte of its register (INT_ENABLE apart), so that the host's byte order plays no part.
"""

from __future__ import annotations

from typing import Final

from crbd.crb import spec
from crbd.crb.config import BUFFER_OFFSET, PAGE_SIZE, CrbConfig
from crbd.crb.spec import Offset

NOT_ESTABLISHED: Final = 0x01
ASSIGNED: Final = 0x02
ACTIVE_SHIFT: Final = 2
VALID: Final = 0x80
"""LOC_STATE: tpmEstablished, locAssigned, activeLocality, tpmRegValidSts."""
GRANTED: Final = 0x01
SEIZED: Final = 0x02
"""LOC_STS: Granted, beenSeized."""
FATAL: Final = 0x01
IDLE: Final = 0x02
"""CTRL_STS: tpmSts, tpmIdle."""


class Pages:
    """`memory` holds the pages of all localities, `buffer` is the data buffer as the owner sees it (writable).

    `control` is where in `memory` the owner's page begins. `separate` is the data buffer where the configuration says
    that it lies outside the pages.
    """

    __slots__ = ("buffer", "config", "control", "memory", "separate")

    def __init__(self, config: CrbConfig, separate: memoryview | None) -> None:
        if (separate is not None) != config.separate_buffer:
            raise ValueError("a separate buffer is given exactly where the configuration has one")
        if separate is not None and (separate.readonly or separate.nbytes != config.buffer_size):
            raise ValueError(f"the separate buffer must be {config.buffer_size} writable bytes")
        self.config = config
        self.separate = separate
        self.memory = bytearray(config.localities * PAGE_SIZE)
        self.reset(NOT_ESTABLISHED)

    # -- reading
    # --------------------------------------------------------------------------------------------------------------

    def page(self, locality: int) -> memoryview:
        """`locality`'s page, read-only and always current. Raises ValueError for a locality that is not there."""
        self.check(locality, 0, 0)
        start = locality * PAGE_SIZE
        return memoryview(self.memory).toreadonly()[start : start + PAGE_SIZE]

    def check(self, locality: int, offset: int, size: int) -> None:
        """Raises ValueError for what is in no page."""
        if not (0 <= locality < self.config.localities and 0 <= offset <= offset + size <= PAGE_SIZE):
            raise ValueError(f"{size} bytes at {offset:#x} of locality {locality} are in no page")

    @property
    def owner(self) -> int:
        """The locality whose page shows control area and buffer: the active one, or the one that was."""
        return self.control // PAGE_SIZE

    @property
    def active(self) -> int | None:
        """The locality that has the TPM."""
        return self.owner if self.memory[Offset.LOC_STATE] & ASSIGNED else None

    def status(self, locality: int) -> int:
        """LOC_STS of `locality`."""
        return self.memory[locality * PAGE_SIZE + Offset.LOC_STS]

    @property
    def fatal(self) -> int:
        """CTRL_STS.tpmSts, as a bit of CTRL_STS."""
        return self.memory[self.control + Offset.CTRL_STS] & FATAL

    # -- changing
    # -------------------------------------------------------------------------------------------------------------

    def set_status(self, locality: int, status: int) -> None:
        """Replace LOC_STS of `locality`."""
        self.memory[locality * PAGE_SIZE + Offset.LOC_STS] = status

    def set_fatal(self) -> None:
        """Set CTRL_STS.tpmSts."""
        self.memory[self.control + Offset.CTRL_STS] |= FATAL

    def set_assigned(self, *, assigned: bool) -> None:
        """LOC_STATE.locAssigned."""
        state = self.memory[Offset.LOC_STATE] & ~ASSIGNED
        self._show(state | ASSIGNED if assigned else state)

    def set_established(self, *, established: bool) -> None:
        """LOC_STATE.tpmEstablished, which is 0 where the flag is set."""
        state = self.memory[Offset.LOC_STATE] & ~NOT_ESTABLISHED
        self._show(state if established else state | NOT_ESTABLISHED)

    def clear_buffer(self) -> None:
        """All zeros."""
        self.buffer[:] = bytes(len(self.buffer))

    def reset(self, established_bit: int) -> None:
        """Reset values on every page, with LOC_STATE's bit 0 as given; locality 0 owns. The buffer stays."""
        self._own(0)
        for locality in range(self.config.localities):
            self._reset_page(locality)
        self._show(self.memory[Offset.LOC_STATE] & ~NOT_ESTABLISHED | established_bit)

    def move(self, locality: int) -> None:
        """Make `locality` the owner of a clean control area and buffer. LOC_STS and tpmSts stay what they are."""
        old, fatal, state = self.owner, self.fatal, self.memory[Offset.LOC_STATE]
        self.clear_buffer()
        for changed in (old, locality):
            status = self.status(changed)
            self._reset_page(changed)
            self.set_status(changed, status)
        self._own(locality)
        self.memory[self.control + Offset.CTRL_STS] |= fatal
        self._show(state & (NOT_ESTABLISHED | ASSIGNED | VALID) | locality << ACTIVE_SHIFT)

    def load(self, words: tuple[int, ...], statuses: tuple[int, ...], buffer: bytes | None) -> None:
        """Show the owner's page as `words` (checked by the caller), every LOC_STS, and the buffer (None: as it is)."""
        self._own(words[Offset.LOC_STATE // 4] >> ACTIVE_SHIFT & 7)
        for locality, status in enumerate(statuses):
            self.set_status(locality, status)
        self.memory[self.control : self.control + BUFFER_OFFSET] = spec.bytes_of(words)
        self._show(words[Offset.LOC_STATE // 4])
        if buffer is not None:
            self.buffer[:] = buffer

    def relocate(self, config: CrbConfig) -> None:
        """Show the addresses of `config`, which differs in nothing but its base."""
        self.config = config
        for locality in range(config.localities):
            page = locality * PAGE_SIZE
            fixed = spec.bytes_of(spec.reset_words(config, locality))[Offset.CMD_SIZE :]
            self.memory[page + Offset.CMD_SIZE : page + BUFFER_OFFSET] = fixed

    def _reset_page(self, locality: int) -> None:
        start = locality * PAGE_SIZE
        self.memory[start : start + BUFFER_OFFSET] = spec.bytes_of(spec.reset_words(self.config, locality))

    def _own(self, locality: int) -> None:
        self.control = locality * PAGE_SIZE
        self.buffer = self._buffer_of(locality)

    def _buffer_of(self, locality: int) -> memoryview:
        if self.separate is not None:
            return self.separate
        start = locality * PAGE_SIZE + BUFFER_OFFSET
        return memoryview(self.memory)[start : start + self.config.buffer_size]

    def _show(self, state: int) -> None:
        for start in range(0, len(self.memory), PAGE_SIZE):
            self.memory[start] = state
