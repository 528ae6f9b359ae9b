"""swtpm's linear layout (`backend-uri=file://…`): all kinds of state in one file or block device.

Layout (swtpm 0.7 to 0.11), little-endian: a head of 192 bytes

    u64 magic 0x737774706d6c696e (so the file begins with the bytes `nilmptws`), u8 version (1), u8 0, u16 head size
    then 15 entries: u32 offset (0: absent), u32 data length, u32 section length

of which a TPM 2.0 uses the first three: permanent, volatile, savestate. Data is in swtpm's file form (crbd.state.swtpm)
and lies in a section that is longer, a power of two. swtpm moves sections about by the section lengths of those before
them: sections must follow one another without a gap. A gap before the first does not matter to it.

Theory. swtpm writes in place, so that a power cut leaves what it will. This store writes all sections anew in a place
where none lies, behind the present ones or before them, syncs, writes the head, and syncs again. The head is within
one sector of the disk, which is written whole or not at all: a commit takes place in that moment, for all kinds at
once. (A sector torn in itself would be the end of the file: this layout has no second head. crbd.store.slots is the
remedy.) After a failed sync of the head either head may be on disk, and what either refers to is not overwritten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from struct import Struct

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateEmptyError,
    StateError,
    StateForeignError,
    StateNewerError,
    StateUnfinishedError,
    StoreError,
    StoreFencedError,
)
from crbd.state.document import Document
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.state.swtpm import MAX_BLOB, decode_file, encode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.files import BlockFile, RegularFile, modified
from crbd.store.options import DEFAULT, PRIVATE, FileOptions
from crbd.store.port import Estate
from crbd.store.side import SideFile
from crbd.store.snapshot import plain_snapshot, read_plain_snapshot

log = logging.getLogger(__name__)

MAGIC = b"nilmptws"
VERSION = 1
HEAD_SIZE = 192
_BLOCK = 4096
_FRONT = Struct("<8sBBH")
_ENTRY = Struct("<III")
_ENTRIES = 15
_PLACES = {StateKind.PERMANENT: 0, StateKind.VOLATILE: 1, StateKind.SAVESTATE: 2}
SIDE_SUFFIX = ".registers"
_RESTORE = "restore it from a backup"


@dataclass(frozen=True, slots=True)
class Section:
    """Where one kind of state lies; bytes from the beginning of the file."""

    offset: int
    length: int
    reserved: int

    @property
    def end(self) -> int:
        return self.offset + self.reserved


def encode_head(sections: Mapping[StateKind, Section]) -> bytes:
    """The 192 bytes at the beginning of the file."""
    head = bytearray(HEAD_SIZE)
    _FRONT.pack_into(head, 0, MAGIC, VERSION, 0, HEAD_SIZE)
    for kind, section in sections.items():
        place = _FRONT.size + _PLACES[kind] * _ENTRY.size
        _ENTRY.pack_into(head, place, section.offset, section.length, section.reserved)
    return bytes(head)


def decode_head(head: bytes, name: str) -> dict[StateKind, Section]:
    """Where each kind lies. `name` goes into the errors.

    Raises StateEmptyError, StateForeignError, StateNewerError or StateDamagedError.
    """
    if not any(head):
        raise StateEmptyError(
            f"{name} is empty", "restore it from a backup; to make a new TPM in it, start with --create"
        )
    if not head.startswith(MAGIC):
        raise StateForeignError(f"{name} is not swtpm's linear file", "check the path; nothing was changed")
    if len(head) < HEAD_SIZE:
        raise StateDamagedError(f"{name} is cut short: {len(head)} bytes", _RESTORE)
    _, version, _, head_size = _FRONT.unpack_from(head)
    if version > VERSION:
        raise StateNewerError(
            f"{name} is a linear file of version {version}, this release reads up to {VERSION}",
            "use the release of swtpm or crbd that wrote it, or a newer one",
        )
    entries = [Section(*_ENTRY.unpack_from(head, _FRONT.size + place * _ENTRY.size)) for place in range(_ENTRIES)]
    if any(entry.offset for entry in entries[len(_PLACES) :]):
        raise StateForeignError(f"{name} holds more than one TPM", "keep every TPM in a file of its own")
    sections = {kind: entries[place] for kind, place in _PLACES.items() if entries[place].offset}
    if head_size != HEAD_SIZE or not _plausible(sorted(sections.values(), key=lambda section: section.offset)):
        raise StateDamagedError(f"{name} has a head that contradicts itself", _RESTORE)
    return sections


def _plausible(ordered: list[Section]) -> bool:
    end = HEAD_SIZE
    for section in ordered:
        if section.offset < end or not section.length <= section.reserved:
            return False
        end = section.end
    return True


class LinearStore:
    """A `Store` in one file. While it is not locked every `load` opens the file anew. One thread at a time."""

    def __init__(
        self,
        path: Path,
        open_file: Callable[[bool], BlockFile],
        *,
        create: bool,
        key: SwtpmKey | None = None,
        options: FileOptions = DEFAULT,
    ) -> None:
        """It is not locked, and nothing is looked at yet. `open_file` is told whether it may make the file.

        `create`: an empty or absent file may become a new TPM's. With `key` what is read must be encrypted, and what is
        written is. A backup is not kept.
        """
        self._path = path
        self._open_file = open_file
        self._create = create
        self._key = key
        self._engine = EngineStamp(0, 0, 0)
        self._options = options
        self._side = SideFile(path.with_name(path.name + SIDE_SUFFIX), key)
        self._file: BlockFile | None = None
        self._head = bytes(HEAD_SIZE)
        """As last read, or written and synced."""
        self._sections: dict[StateKind, Section] = {}
        self._kept: list[Section] = []
        """What a head on disk may refer to beside `_sections`, after a failed sync."""
        self._in_doubt = False
        """The last head was not synced."""
        self._held_a_tpm = False

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def locked(self) -> bool:
        return self._file is not None

    @property
    def keeps_checkpoints(self) -> bool:
        return False

    @property
    def written(self) -> int | None:
        return modified(self._path)

    def lock(self) -> None:
        if self._file is not None:
            return
        # A TPM that was here once is not made anew.
        file = self._open_file(self._create and not self._held_a_tpm)
        try:
            if self._options.locking:
                file.lock()
            self._survey(file)
            self._refuse_orphans()
            if self._options.adopt_mode and file.published:
                self._set_mode()
        except OSError as error:
            file.close()
            raise self._unreadable(error) from error
        except BaseException:
            file.close()
            raise
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            # The descriptor's end is the lock's end.
            self._file.close()
            self._file = None

    def estate(self) -> Estate:
        return Estate(lock=None if self._file is None else self._file.lock_descriptor)

    def use_engine(self, stamp: EngineStamp) -> None:
        """swtpm's file does not say which engine wrote it; libtpms judges its blobs itself."""
        self._engine = stamp

    def load(self, kind: StateKind) -> bytes | None:
        if self._file is not None:
            return self._load(self._file, kind)
        try:
            file = self._open_file(False)
        except (StateAbsentError, StateUnfinishedError):
            if self._create:
                return None
            raise
        try:
            self._survey(file)
            return self._load(file, kind)
        finally:
            file.close()

    def load_side(self) -> SideState | None:
        return self._side.load(self._volatile())

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        file = self._file
        if file is None:
            raise StoreError(f"{self._path} is not locked, and nothing is written without the lock")
        before = None if side is None else self._volatile()
        after = changes.get(StateKind.VOLATILE, before)
        if side is not None and after is None:
            raise ValueError("registers are kept beside volatile state, and there is none")
        try:
            self._refuse_if_fenced(file)
            blobs = {kind: self._carry_over(file, kind) for kind in self._sections.keys() - changes.keys()}
            if side is not None and after is not None:
                self._keep_side(before, after, side)
            new = {kind: encode_file(data, self._key) for kind, data in changes.items() if data is not None}
            self._write(file, blobs | new)
            if not file.published:
                file.publish()
                self._set_mode()
            if side is None and StateKind.VOLATILE in changes:
                self._side.remove()
        except OSError as error:
            raise StoreError(f"TPM state could not be written to {self._path}: {error.strerror}") from error

    def snapshot(self, states: Mapping[StateKind, bytes], side: SideState) -> bytes:
        if self._key is not None:
            raise StoreError(
                f"{self._path} is encrypted as swtpm does it, which no document is: a snapshot would be plain"
            )
        return plain_snapshot(states, side, self._engine)

    def read_snapshot(self, data: bytes, name: str) -> Document:
        return read_plain_snapshot(data, name)

    def overtake(self, generation: int) -> int | None:
        return None

    def swap_backup(self) -> bool:
        return False

    def close(self) -> None:
        self.release()

    def _survey(self, file: BlockFile) -> None:
        """Read the head, as another may have been the user until now. Raises a StateError."""
        self._sections, self._head, self._kept, self._in_doubt = {}, bytes(HEAD_SIZE), [], False
        if not file.published:
            return
        try:
            file.settle()
            head = self._read_head(file)
        except OSError as error:
            raise self._unreadable(error) from error
        may_be_empty = self._create and not self._held_a_tpm
        self._sections = {} if may_be_empty and not any(head) else decode_head(head, self.name)
        self._head = head
        self._held_a_tpm = bool(self._sections)

    def _load(self, file: BlockFile, kind: StateKind) -> bytes | None:
        section = self._sections.get(kind)
        if section is None:
            return None
        try:
            blob = self._read(file, section)
        except OSError as error:
            raise self._unreadable(error) from error
        return decode_file(blob, f"{self._path} ({kind.nvram_name})", self._key)

    def _volatile(self) -> bytes | None:
        """As `load`; None too for what cannot be read: no registers belong to that."""
        try:
            return self.load(StateKind.VOLATILE)
        except StateError:
            return None

    def _refuse_orphans(self) -> None:
        """Raises StateDamagedError where volatile state lies without the permanent state it belongs to."""
        if self._sections and StateKind.PERMANENT not in self._sections:
            raise StateDamagedError(f"{self._path} holds no permanent state, but what belongs to one", _RESTORE)

    def _keep_side(self, before: bytes | None, after: bytes, side: SideState) -> None:
        """Beside a device there is no place for it: /dev is not on the disk. Raises OSError."""
        if self._path.is_block_device():
            log.warning(
                "%s is a device: its registers are not kept, and the TPM starts with them as after a reset", self._path
            )
            return
        self._side.prepare(before, after, side)

    def _set_mode(self) -> None:
        """Of a regular file; a device's is its administrator's. Raises OSError."""
        if (self._options.mode != PRIVATE or self._options.adopt_mode) and self._path.is_file():
            self._path.chmod(self._options.mode)

    @staticmethod
    def _read_head(file: BlockFile) -> bytes:
        """Zeros where the file does not reach: a failed first write may have made it longer than it was."""
        head = file.pread(HEAD_SIZE, 0)
        return head if any(head) else bytes(HEAD_SIZE)

    @staticmethod
    def _read(file: BlockFile, section: Section) -> bytes:
        """Up to one byte more than the largest blob, so that the decoder sees an oversized one and memory does not."""
        return file.pread(min(section.length, MAX_BLOB + 1), section.offset)

    def _carry_over(self, file: BlockFile, kind: StateKind) -> bytes:
        """A kind that does not change, as it lies there. Raises StoreError, OSError."""
        section = self._sections[kind]
        blob = self._read(file, section)
        if len(blob) != section.length or len(blob) > MAX_BLOB:
            raise StoreError(f"{self._path} ({kind.nvram_name}) is damaged, and nothing is written beside it")
        return blob

    def _refuse_if_fenced(self, file: BlockFile) -> None:
        """After a failed attempt any piece of a head may lie there: the lock must do. Raises StoreError, OSError."""
        file.check_place()
        if not self._in_doubt and self._read_head(file) != self._head:
            raise StoreFencedError(f"another program wrote to {self._path}; this TPM is not the one on disk any more")

    def _write(self, file: BlockFile, blobs: dict[StateKind, bytes]) -> None:
        """Raises OSError; then the sections are as before."""
        lengths = {kind: len(blobs[kind]) for kind in sorted(blobs)}
        sections = self._place(lengths)
        body = b"".join(blobs[kind].ljust(section.reserved, b"\0") for kind, section in sections.items())
        if body:
            file.pwrite(body, min(section.offset for section in sections.values()))
            file.fdatasync()
        head = encode_head(sections)
        self._kept, self._in_doubt = [*self._kept, *sections.values()], True
        file.pwrite(head, 0)
        file.fdatasync()
        self._kept, self._in_doubt = [], False
        self._head, self._sections = head, sections
        self._held_a_tpm = bool(sections)

    def _place(self, lengths: dict[StateKind, int]) -> dict[StateKind, Section]:
        """Sections one after another where nothing lies that a head may refer to; before all that, if there is room."""
        reserved = {kind: 1 << (length - 1).bit_length() for kind, length in lengths.items()}
        held = [*self._sections.values(), *self._kept]
        begin = min((section.offset for section in held), default=HEAD_SIZE)
        end = max((section.end for section in held), default=HEAD_SIZE)
        offset = _BLOCK if _BLOCK + sum(reserved.values()) <= begin else -(-end // _BLOCK) * _BLOCK
        sections = {}
        for kind, length in lengths.items():
            sections[kind] = Section(offset, length, reserved[kind])
            offset += reserved[kind]
        return sections

    def _unreadable(self, error: OSError) -> StateAccessError:
        return StateAccessError(f"{self._path} cannot be read: {error.strerror}", "check the disk it is on")


def open_linear(
    path: Path,
    *,
    create: bool,
    key: SwtpmKey | None = None,
    options: FileOptions = DEFAULT,
    lock: bool = True,
) -> LinearStore:
    """Open the file; with `lock`, lock it and see that what lies there can be read. A new one appears with its first
    commit.

    Raises a StateError; nothing is changed.
    """
    open_file = partial(_open_file, path)
    store = LinearStore(path, open_file, create=create, key=key, options=options)
    if lock:
        store.lock()
    elif not create:
        open_file(False).close()
    return store


def _open_file(path: Path, create: bool) -> BlockFile:
    return RegularFile.open(path, create=create)
