"""swtpm's directory layout: one file per kind of state, `tpm2-00.permall` and its sisters, byte-compatible both ways.

A commit replaces a file whole: the new bytes go into a file beside it, are synced, renamed over the old one, and the
directory is synced. After a power cut a file is either the old or the new one. A leftover of an interrupted commit
(`.tpm2-00.permall.new`) means nothing and is overwritten.

With a backup (swtpm 0.11's `backup`) the permanent state as it was before stays as `tpm2-00.permall.bak`. It takes the
place of `tpm2-00.permall` where that is missing or damaged. swtpm renames one to the other and then writes, so that
for a moment only the backup is there; here it is a second name of the old file, and both are always there.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateError,
    StateForeignError,
    StoreError,
)
from crbd.state.document import Document
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.state.swtpm import MAX_BLOB, decode_file, encode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.files import make_directory, modified, sync_directory, write_durably
from crbd.store.lockfile import LockFile
from crbd.store.options import DEFAULT, PRIVATE, FileOptions
from crbd.store.port import Estate
from crbd.store.side import NAME as SIDE_NAME
from crbd.store.side import SideFile
from crbd.store.snapshot import plain_snapshot, read_plain_snapshot

log = logging.getLogger(__name__)

BACKUP = ".bak"


class DirectoryStore:
    """A `Store` in one directory. A new directory gets mode 0700."""

    def __init__(
        self, path: Path, *, create: bool, key: SwtpmKey | None = None, options: FileOptions = DEFAULT
    ) -> None:
        """It is not locked, and nothing is looked at yet. With `key` what is read must be encrypted, and what is
        written is. Raises StateAbsentError if there is no such directory and `create` is false.
        """
        self._path = path
        self._create = create
        self._key = key
        self._engine = EngineStamp(0, 0, 0)
        self._options = options
        self._side = SideFile(path / SIDE_NAME, key)
        self._lock: LockFile | None = None
        self._locked = False
        self._held_a_tpm = False
        if not create:
            self._refuse_unless_there()

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def locked(self) -> bool:
        return self._locked

    @property
    def keeps_checkpoints(self) -> bool:
        return False

    @property
    def written(self) -> int | None:
        return modified(self._file(StateKind.PERMANENT))

    def estate(self) -> Estate:
        return Estate(lock=None if self._lock is None else self._lock.descriptor)

    def use_engine(self, stamp: EngineStamp) -> None:
        """swtpm's files do not say which engine wrote them; libtpms judges its blobs itself."""
        self._engine = stamp

    def lock(self) -> None:
        if self._locked:
            return
        if self._create and not self._held_a_tpm:
            make_directory(self._path)
        with ExitStack() as undo:
            lock = None
            self._refuse_unless_there()
            if self._options.locking:
                lock = LockFile.acquire(self._path / ".lock", self._options.lock_mode)
                undo.callback(lock.release)
                if (self._path / "tpm.crbd").exists():
                    # Made by another process since this one chose the layout.
                    raise StateForeignError(
                        f"{self._path} holds state in the crbd layout by now", "start again, for what is there"
                    )
            self._settle()
            self._restore_missing()
            self._refuse_orphans()
            self._fall_back()
            self._adopt_modes()
            undo.pop_all()
        self._lock, self._locked = lock, True

    def release(self) -> None:
        self._locked = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def load(self, kind: StateKind) -> bytes | None:
        path = self._file(kind)
        try:
            blob = self._read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateAccessError(
                f"{path} cannot be read: {error.strerror}", "let the user that runs crbd read it"
            ) from error
        return decode_file(blob, str(path), self._key)

    def load_side(self) -> SideState | None:
        return self._side.load(self._volatile())

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        if not self._locked:
            raise StoreError(f"{self._path} is not locked, and nothing is written without the lock")
        before = None if side is None else self._volatile()
        after = changes.get(StateKind.VOLATILE, before)
        if side is not None and after is None:
            raise ValueError("registers are kept beside volatile state, and there is none")
        try:
            # Each is durable by itself: volatile state must not outlive a power cut that the permanent state before it
            # does not.
            if StateKind.PERMANENT in changes:
                self._replace(StateKind.PERMANENT, changes[StateKind.PERMANENT])
            if side is not None and after is not None:
                self._side.prepare(before, after, side)
            for kind in sorted(changes.keys() - {StateKind.PERMANENT}):
                self._replace(kind, changes[kind])
            if side is None and StateKind.VOLATILE in changes:
                self._side.remove()
            if StateKind.PERMANENT in changes:
                self._held_a_tpm = changes[StateKind.PERMANENT] is not None
        except OSError as error:
            raise StoreError(f"TPM state in {self._path} could not be written: {error.strerror}") from error

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

    def close(self) -> None:
        self.release()

    def swap_backup(self) -> bool:
        """Exchange the permanent state and its backup, where backups are kept and there is one; returns whether.

        For state that the engine rejects: a second call takes it back. Raises StateAccessError.
        """
        state, backup = self._file(StateKind.PERMANENT), self._backup
        if not self._options.backup or not backup.exists():
            return False
        aside = state.with_name(f"{state.name}.tmp")
        try:
            # The name stays taken all the while: a crash leaves a TPM, this or that one.
            aside.unlink(missing_ok=True)
            os.link(state, aside)
            backup.replace(state)
            aside.replace(backup)
            sync_directory(self._path)
        except OSError as error:
            raise StateAccessError(
                f"{backup} cannot take the place of {state.name}: {error.strerror}", "let this user write there"
            ) from error
        return True

    # -- looking

    @property
    def _backup(self) -> Path:
        state = self._file(StateKind.PERMANENT)
        return state.with_name(state.name + BACKUP)

    def _file(self, kind: StateKind) -> Path:
        return self._path / f"tpm2-00.{kind.nvram_name}"

    @staticmethod
    def _read(path: Path) -> bytes:
        """Up to one byte more than the largest blob, so that the decoder sees an oversized file and memory does not."""
        with path.open("rb") as file:
            return file.read(MAX_BLOB + 1)

    def _volatile(self) -> bytes | None:
        """As `load`; None too for what cannot be read: no registers belong to that."""
        try:
            return self.load(StateKind.VOLATILE)
        except StateError:
            return None

    def _absent(self) -> StateAbsentError:
        return StateAbsentError(f"{self._path} does not exist", "check the path, or make a new TPM there with --create")

    def _unusable(self, why: str | None) -> StateAccessError:
        return StateAccessError(
            f"{self._path} cannot be opened: {why}", "name a directory that this user may read and write"
        )

    def _refuse_unless_there(self) -> None:
        """Before the lock file's own errors, which would name the lock file. Raises a StateError."""
        try:
            is_directory = stat.S_ISDIR(self._path.stat().st_mode)
        except FileNotFoundError as error:
            raise self._absent() from error
        except OSError as error:
            raise self._unusable(error.strerror) from error
        if not is_directory:
            raise self._unusable("it is no directory")

    def _settle(self) -> None:
        """What a killed predecessor renamed and did not sync must not be shown to a guest before it is durable."""
        try:
            sync_directory(self._path)
        except OSError as error:
            raise self._unusable(error.strerror) from error

    def _restore_missing(self) -> None:
        """As swtpm: a backup without the state it is of becomes the state. Raises StateAccessError."""
        state = self._file(StateKind.PERMANENT)
        if not self._options.backup or state.exists() or not self._backup.exists():
            return
        try:
            self._backup.replace(state)
            sync_directory(self._path)
        except OSError as error:
            raise StateAccessError(
                f"{self._backup} cannot be renamed: {error.strerror}", "let this user write there"
            ) from error
        log.warning("%s was missing: its backup took its place, which may be older than what was lost", state)

    def _refuse_orphans(self) -> None:
        """Raises StateDamagedError where something lies without the permanent state it belongs to:

        something was lost, this is no empty directory. StateAbsentError where a TPM was here before.
        """
        state = self._file(StateKind.PERMANENT)
        if state.exists():
            self._held_a_tpm = True
            return
        if self._held_a_tpm:
            raise StateAbsentError(f"the TPM that was in {self._path} is gone", "see who removed it: none is made anew")
        if self._backup.exists():
            raise StateDamagedError(
                f"{state} is missing while {self._backup.name} is there",
                f"if that is this TPM's newest state, rename it to {state.name}; else move it away",
            )
        for kind in (StateKind.VOLATILE, StateKind.SAVESTATE):
            if self._file(kind).exists():
                raise StateDamagedError(
                    f"{state} is missing while {self._file(kind).name} is there",
                    "restore the missing file from a backup; to give this TPM up, empty the directory",
                )

    def _fall_back(self) -> None:
        """As swtpm: state that is damaged is replaced by its backup, if that is whole. Raises StateAccessError."""
        if not self._options.backup:
            return
        try:
            self.load(StateKind.PERMANENT)
        except StateDamagedError as error:
            if not self.swap_backup():
                return
            try:
                self.load(StateKind.PERMANENT)
            except StateError:
                self.swap_backup()
                return
            log.warning("%s: its backup took its place, and the last change to the TPM is lost", error.what)
        except StateError:
            # A key that is missing or wrong is no damage; whoever loads the state says so.
            return

    # -- writing

    def _replace(self, kind: StateKind, data: bytes | None) -> None:
        """Raises OSError."""
        path = self._file(kind)
        if data is None:
            path.unlink(missing_ok=True)
            sync_directory(self._path)
            return
        if kind is StateKind.PERMANENT and self._options.backup:
            self._keep_backup()
        write_durably(path, encode_file(data, self._key))
        if self._options.mode != PRIVATE:
            path.chmod(self._options.mode)

    def _keep_backup(self) -> None:
        """A second name for the permanent state that is there. Raises OSError."""
        making = self._backup.with_name(f".{self._backup.name}.new")
        making.unlink(missing_ok=True)
        try:
            os.link(self._file(StateKind.PERMANENT), making)
        except FileNotFoundError:
            return
        making.replace(self._backup)

    def _adopt_modes(self) -> None:
        """Raises StateAccessError."""
        if not self._options.adopt_mode:
            return
        for path in map(self._file, StateKind):
            try:
                path.chmod(self._options.mode)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StateAccessError(
                    f"{path} cannot be given mode {self._options.mode:04o}: {error.strerror}",
                    "let its owner run crbd, or leave the mode out",
                ) from error


def open_directory(
    path: Path,
    *,
    create: bool,
    key: SwtpmKey | None = None,
    options: FileOptions = DEFAULT,
    lock: bool = True,
) -> DirectoryStore:
    """Open the directory; with `lock`, lock it and see that what lies there belongs together.

    Raises a StateError; nothing is changed but the lock file.
    """
    store = DirectoryStore(path, create=create, key=key, options=options)
    if lock:
        store.lock()
    return store
