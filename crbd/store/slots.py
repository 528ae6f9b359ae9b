"""The two-slot file: one sync a commit, and the state before it as an undo. Format and theory: crbd.state.slots.

Theory of a commit. The slot that does not hold the state is overwritten, head and payload in one write, and synced
once. Until the sync returns that slot is *in doubt*: neither trusted nor relied upon, and after a failed sync it is
written again in full, because a later sync that succeeds says nothing about what an earlier one lost. The generation
of a failed attempt is not used again. The other slot is not touched before the new one is durable, so that every crash
leaves the acknowledged generation intact.

Fencing. State on shared storage may be taken over by another process. Before every commit the file's identity and both
heads are compared with what this process last read or wrote there; any difference ends in StoreFencedError, and
nothing is written. The comparison and the write are not one step: it is the lock that keeps two writers apart, and the
fence that notices when the lock did not (taken over by force, or a file system whose locks do not work).

Allocation. Both slots are written over with zeros when the file is made, and a slot that must grow is zeroed first, so
that an ordinary commit changes no metadata and a disk that is full is noticed before the undo is overwritten. A
shorter payload is followed by zeros as far as the longer one before it reached: what a slot held before is gone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from crbd.errors import StateAccessError, StateDamagedError, StoreError, StoreFencedError
from crbd.state.slots import (
    BLOCK,
    MAX_GENERATION,
    MAX_PAYLOAD,
    SECTOR,
    SLOT_OFFSETS,
    SLOT_SIZE,
    Condition,
    Slot,
    SlotHead,
    check_payload,
    choose,
    decode_head,
    encode_head,
)
from crbd.store.files import BlockFile, RegularFile

log = logging.getLogger(__name__)

GROWTH = 64 * 1024
"""Bytes by which a slot's allocation grows; new slots begin with one such step."""

WRITER_ID_SIZE = 16

_ZEROS = memoryview(bytes(BLOCK))


@dataclass(frozen=True, slots=True)
class Loaded:
    """One generation as it lies in the file. `writer_id` is of the process that wrote it."""

    payload: bytes
    generation: int
    writer_id: bytes
    fell_back: bool = False
    """The other slot is unreadable and may have held a newer generation, which is lost then (crbd.state.slots)."""


@dataclass(slots=True)
class _Place:
    """What this process knows of one slot."""

    offset: int
    head: bytes = bytes(SECTOR)
    """Its first sector, as last read or written."""
    generation: int = 0
    """Of the intact commit that lies there; 0 for none."""
    in_doubt: bool = False
    """A write began and was not synced: any mixture of old and new may lie there."""
    used: int = 0
    """Bytes from its beginning that may be other than zero."""
    allocated: int = 0
    """Bytes from its beginning that can be overwritten without allocating."""


class SlotFile:
    """An open two-slot file. Used from one thread at a time. It does not lock: whoever opens it holds the lock."""

    def __init__(self, path: Path, file: BlockFile) -> None:
        """Read what the file holds; made by `open`."""
        self._path = path
        self._file = file
        self._writer_id = os.urandom(WRITER_ID_SIZE)
        self._places = tuple(_Place(offset) for offset in SLOT_OFFSETS)
        self._current: int | None = None
        """The place that holds the state; None in a new file."""
        self._has_undo = False
        self._fell_back = False
        self._generation = 0
        """The last that was attempted or found."""
        if file.published:
            self._survey()
        else:
            self._prepare()

    @classmethod
    def open(cls, path: Path, *, create: bool, file: BlockFile | None = None, writable: bool = True) -> SlotFile:
        """Open the file at `path`. Where there is none and `create` is true, a new one, which appears at `path` with
        its first commit, whole, or not at all.

        `file` takes the place of the file at `path`, which then serves in messages only. With `writable` false the file
        is opened for reading, and commits fail. Raises StateAbsentError, StateUnfinishedError (only the leftover of an
        interrupted creation is there), StateEmptyError, StateDamagedError (neither slot is intact), StateForeignError,
        StateNewerError or StateAccessError; nothing was changed then. One unusable slot is logged as a warning.
        """
        if file is None:
            file = RegularFile.open(path, create=create, writable=writable)
        try:
            return cls(path, file)
        except BaseException:
            file.close()
            raise

    @property
    def name(self) -> str:
        """What messages call it: its path."""
        return str(self._path)

    @property
    def writer_id(self) -> bytes:
        """16 random bytes that stand in every head that this object writes."""
        return self._writer_id

    def load(self) -> Loaded | None:
        """The newest intact generation; None in a new file before its first commit.

        Raises StateDamagedError if it has been damaged since it was opened, StateAccessError.
        """
        return None if self._current is None else self._read(self._current, self._fell_back)

    def previous(self) -> Loaded | None:
        """The generation that the newest one was built upon, if the other slot holds it: the undo.

        To go back to it, commit its payload again. Raises as `load`.
        """
        if self._current is None or not self._has_undo:
            return None
        return self._read(1 - self._current, fell_back=False)

    def commit(self, payload: bytes, digest: bytes | None = None) -> int:
        """Make `payload` (at most MAX_PAYLOAD bytes) the state, durably; returns its generation.

        `digest` is the payload's SHA-256, from whoever has it already; the slot is damaged if it is not.
        Raises StoreFencedError if the file moved on under this process: then nothing was written. Raises StoreError if
        the disk would not take it: the state is as before, or, after a crash, perhaps this one; the next commit works
        as soon as the disk does.
        """
        if len(payload) > MAX_PAYLOAD:
            raise StoreError(f"{len(payload)} bytes of TPM state do not fit {self._path} (at most {MAX_PAYLOAD})")
        if self._generation >= MAX_GENERATION:
            raise StoreError(f"{self._path} is at generation {self._generation}, the last there can be")
        if digest is None:
            digest = hashlib.sha256(payload).digest()
        file = self._file
        try:
            # The fence, in as few steps as can be: every commit pays for them.
            file.check_place()
            for place in self._places:
                if file.pread(SECTOR, place.offset) != place.head:
                    self._refuse_if_not_ours(place)
            self._write(file, payload, digest)
            if not file.published:
                file.publish()
        except OSError as error:
            raise StoreError(f"TPM state could not be written to {self._path}: {error.strerror}") from error
        return self._generation

    def close(self) -> None:
        """Closing twice is no error."""
        self._file.close()

    # -- reading

    def _survey(self) -> None:
        try:
            self._file.settle()
            looks = [self._look(place) for place in self._places]
        except OSError as error:
            raise self._unreadable(error) from error
        for place, (sector, _) in zip(self._places, looks, strict=True):
            place.head = sector
        found = [slot for _, slot in looks]
        choice = choose((found[0], found[1]), self._places[0].head, self.name)
        if choice.complaint:
            log.warning("%s: %s", self._path, choice.complaint)
        for place, slot in zip(self._places, found, strict=True):
            if slot.head is not None:
                place.used = SECTOR + slot.head.length
            if slot.condition is Condition.INTACT and slot.head is not None:
                place.generation = slot.head.generation
                place.allocated = _rounded(place.used, BLOCK)
            elif slot.condition is Condition.BLANK:
                place.allocated = GROWTH
        self._current, self._has_undo, self._fell_back = choice.current, choice.has_undo, choice.fell_back
        self._generation = self._places[choice.current].generation

    def _prepare(self) -> None:
        """Allocate both slots of a new file."""
        try:
            for place in self._places:
                self._file.pwrite(bytes(GROWTH), place.offset)
                place.allocated = GROWTH
        except OSError as error:
            raise StateAccessError(f"{self._path} cannot be made: {error.strerror}", "make room for it") from error

    def _look(self, place: _Place) -> tuple[bytes, Slot]:
        """The first sector of a slot, and the slot judged whole; its payload is not kept. Raises OSError."""
        sector = self._file.pread(SECTOR, place.offset)
        slot = decode_head(sector)
        if slot.condition is Condition.INTACT and slot.head is not None:
            slot = check_payload(sector, slot.head, self._file.pread(slot.head.length, place.offset + SECTOR))
        return sector, slot

    def _read(self, which: int, fell_back: bool) -> Loaded:
        place = self._places[which]
        try:
            sector = self._file.pread(SECTOR, place.offset)
            head = self._expect_head(sector, place)
            payload = self._file.pread(head.length, place.offset + SECTOR)
        except OSError as error:
            raise self._unreadable(error) from error
        if check_payload(sector, head, payload).condition is not Condition.INTACT:
            raise self._changed()
        return Loaded(payload, head.generation, head.writer_id, fell_back)

    def _expect_head(self, sector: bytes, place: _Place) -> SlotHead:
        head = decode_head(sector).head
        if head is None or sector != place.head:
            raise self._changed()
        return head

    def _changed(self) -> StateDamagedError:
        return StateDamagedError(f"{self._path} changed while crbd had it open", "let one program at a time use it")

    def _unreadable(self, error: OSError) -> StateAccessError:
        return StateAccessError(f"{self._path} cannot be read: {error.strerror}", "check the disk it is on")

    # -- writing

    def _refuse_if_not_ours(self, place: _Place) -> None:
        """Judge a slot whose head is not what it was: where our own last attempt failed, a piece of it may lie;
        another's whole commit it must not be.

        Raises StoreFencedError, OSError.
        """
        _, slot = self._look(place)
        others = slot.condition is Condition.NEWER or (
            slot.condition is Condition.INTACT and slot.head is not None and slot.head.writer_id != self._writer_id
        )
        if others or not place.in_doubt:
            raise self._fenced(slot)

    def _fenced(self, slot: Slot) -> StoreFencedError:
        what = f"generation {slot.head.generation}" if slot.head is not None else "something else"
        return StoreFencedError(
            f"another program wrote {what} to {self._path}, where this one had written generation {self._generation}; "
            "this TPM is not the one on disk any more and writes nothing"
        )

    def _write(self, file: BlockFile, payload: bytes, digest: bytes) -> None:
        """Raises OSError; then the slot is in doubt and the state is as before."""
        current = self._current
        if current is None:
            target, base = 0, 0
        else:
            target, base = 1 - current, self._places[current].generation
        place = self._places[target]
        self._generation = generation = self._generation + 1
        head = encode_head(generation, base, self._writer_id, len(payload), digest)
        size = SECTOR + len(payload)
        allocated = place.allocated if size <= place.allocated else self._allocate(place, size)
        place.in_doubt = True
        place.used = max(place.used, size)
        whole = -(-place.used // BLOCK) * BLOCK
        rest = whole - size
        file.pwritev((head, payload, _ZEROS[:rest] if rest <= BLOCK else bytes(rest)), whole, place.offset)
        file.fdatasync()
        place.in_doubt = False
        place.head, place.generation, place.used, place.allocated = head, generation, size, allocated
        self._current, self._has_undo, self._fell_back = target, current is not None, False

    def _allocate(self, place: _Place, size: int) -> int:
        """Zero what the slot grows by, before anything in it is overwritten; returns what is allocated once synced.

        Raises OSError.
        """
        end = min(_rounded(size, GROWTH), SLOT_SIZE)
        self._file.pwrite(bytes(end - place.allocated), place.offset + place.allocated)
        return end


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
