"""swtpm's directory layout: one file per kind of state, `tpm2-00.permall` and its sisters, byte-compatible both ways.

A commit replaces a file whole: the new bytes go into a file beside it, are synced, renamed over the old one, and the
directory is synced. After a power cut a file is either the old or the new one. A leftover of an interrupted commit
(`.tpm2-00.permall.new`) means nothing and is overwritten.

Where one commit changes permanent and volatile state, another TPM may be taking the place of this one, and neither may
ever be found with the volatile state of the other. So both volatile states, the old and the new, are first put aside
under names that say which permanent state they belong to (`.tpm2-00.volatilestate.of-DIGEST`, the SHA-256 of that
file), then the permanent state is replaced, and then what belongs to it takes the name: now, or when the directory is
locked the next time. (swtpm, started in between, finds no volatile state: a TPM whose power was cut.)

Fencing. Before every commit the lock file and the permanent state are compared with what this process locked, and read
or wrote: what another put there, into this directory or in its place, is not written over. It is the lock that keeps
two writers apart; the fence notices where it did not, or where the state was replaced under a running TPM.

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
from hashlib import sha256
from pathlib import Path

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateError,
    StateForeignError,
    StoreError,
    StoreFencedError,
)
from crbd.state.document import Document
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.state.swtpm import MAX_BLOB, decode_file, encode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.files import (
    is_there,
    make_directory,
    modified,
    read_regular,
    sync_directory,
    unreadable,
    write_durably,
)
from crbd.store.lockfile import LockFile
from crbd.store.options import DEFAULT, PRIVATE, FileOptions
from crbd.store.port import Estate
from crbd.store.side import NAME as SIDE_NAME
from crbd.store.side import SideFile
from crbd.store.snapshot import plain_snapshot, read_plain_snapshot

log = logging.getLogger(__name__)

BACKUP = ".bak"
_OF = ".of-"


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
        self._ours: set[bytes] = set()
        """Digests of permanent state that may lie there: as last read or written, and of writes that failed."""
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
            self._settle_volatile()
            self._refuse_orphans()
            self._fall_back()
            self._adopt_modes()
            self._know()
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
            blob = read_regular(path, MAX_BLOB + 1)
        except FileNotFoundError:
            if kind is StateKind.PERMANENT and self._locked and self._held_a_tpm:
                raise self._gone() from None
            return None
        except OSError as error:
            raise unreadable(path, error) from error
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
            self._refuse_if_fenced()
            if {StateKind.PERMANENT, StateKind.VOLATILE} <= changes.keys() and self._has_volatile(after):
                self._exchange(changes, before, side)
            else:
                self._write_one_by_one(changes, before, side)
            if side is None and StateKind.VOLATILE in changes:
                self._side.remove()
            if StateKind.PERMANENT in changes:
                self._held_a_tpm = changes[StateKind.PERMANENT] is not None
        except StateError as error:
            raise StoreError(f"TPM state in {self._path} could not be written: {error}") from error
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
        if not self._options.backup or not is_there(backup):
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
        self._know()
        return True

    # -- looking

    @property
    def _backup(self) -> Path:
        state = self._file(StateKind.PERMANENT)
        return state.with_name(state.name + BACKUP)

    def _file(self, kind: StateKind) -> Path:
        return self._path / f"tpm2-00.{kind.nvram_name}"

    def _digest(self) -> bytes | None:
        """Of the permanent state's file; None where there is none. Raises OSError, StateForeignError."""
        try:
            return sha256(read_regular(self._file(StateKind.PERMANENT), MAX_BLOB + 1)).digest()
        except FileNotFoundError:
            return None

    def _know(self) -> None:
        """What lies there now is this process's to write over. Raises StateAccessError, StateForeignError."""
        try:
            found = self._digest()
        except OSError as error:
            raise unreadable(self._file(StateKind.PERMANENT), error) from error
        self._ours = set() if found is None else {found}

    def _has_volatile(self, after: bytes | None) -> bool:
        """Whether there is any, or is to be. Raises StateAccessError."""
        return after is not None or is_there(self._file(StateKind.VOLATILE))

    def _volatile(self) -> bytes | None:
        """As `load`; None too for what cannot be read: no registers belong to that."""
        try:
            return self.load(StateKind.VOLATILE)
        except StateError:
            return None

    def _absent(self) -> StateAbsentError:
        return StateAbsentError(f"{self._path} does not exist", "check the path, or make a new TPM there with --create")

    def _gone(self) -> StateAbsentError:
        return StateAbsentError(f"the TPM that was in {self._path} is gone", "see who removed it: none is made anew")

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
        if not self._options.backup or is_there(state) or not is_there(self._backup):
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
        if is_there(state):
            self._held_a_tpm = True
            return
        if self._held_a_tpm:
            raise self._gone()
        if is_there(self._backup):
            raise StateDamagedError(
                f"{state} is missing while {self._backup.name} is there",
                f"if that is this TPM's newest state, rename it to {state.name}; else move it away",
            )
        for kind in (StateKind.VOLATILE, StateKind.SAVESTATE):
            if is_there(self._file(kind)):
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

    def _refuse_if_fenced(self) -> None:
        """Raises StoreFencedError, StoreError, OSError."""
        if self._lock is not None and self._lock.is_at(self._path / ".lock") is False:
            raise StoreFencedError(
                f"the lock file of {self._path} is another one than was locked: the state may be another program's by "
                "now, and nothing is written there"
            )
        try:
            found = self._digest()
        except StateForeignError as error:
            raise StoreFencedError(f"another program replaced the state: {error.what}") from error
        if found is not None and found not in self._ours:
            raise StoreFencedError(
                f"another program wrote {self._file(StateKind.PERMANENT)}; this TPM is not the one on disk any more "
                "and writes nothing"
            )

    def _write_one_by_one(
        self, changes: Mapping[StateKind, bytes | None], before: bytes | None, side: SideState | None
    ) -> None:
        """Each durably by itself. Raises OSError."""
        after = changes.get(StateKind.VOLATILE, before)
        if StateKind.PERMANENT in changes:
            self._replace_permanent(changes[StateKind.PERMANENT])
        if side is not None and after is not None:
            self._side.prepare(before, after, side)
        for kind in sorted(changes.keys() - {StateKind.PERMANENT}):
            self._replace(kind, changes[kind])

    def _exchange(
        self, changes: Mapping[StateKind, bytes | None], before: bytes | None, side: SideState | None
    ) -> None:
        """Permanent and volatile state, in the moment that the permanent state changes. Raises OSError, StateError."""
        permanent, after = changes[StateKind.PERMANENT], changes[StateKind.VOLATILE]
        volatile = self._file(StateKind.VOLATILE)
        old, blob = self._digest(), None if permanent is None else encode_file(permanent, self._key)
        try:
            if side is not None and after is not None:
                self._side.prepare(before, after, side)
            if after is not None and blob is not None:
                self._put(self._aside(sha256(blob).digest()), after)
            if old is not None and is_there(volatile):
                volatile.replace(self._aside(old))
                sync_directory(self._path)
            self._replace_permanent(permanent, blob)
        finally:
            # Whether that succeeded or not: what belongs to the permanent state that is there takes its name.
            self._settle_volatile()
        for kind in sorted(changes.keys() - {StateKind.PERMANENT, StateKind.VOLATILE}):
            self._replace(kind, changes[kind])

    def _aside(self, permanent: bytes) -> Path:
        return self._path / f".{self._file(StateKind.VOLATILE).name}{_OF}{permanent.hex()}"

    def _settle_volatile(self) -> None:
        """What was put aside and belongs to the permanent state that is there becomes the volatile state.

        Raises StateAccessError, StateForeignError.
        """
        volatile = self._file(StateKind.VOLATILE)
        try:
            asides = sorted(self._path.glob(f".*{volatile.name}{_OF}*"))
            if not asides:
                return
            sync_directory(self._path)
            found = self._digest()
            for aside in asides:
                if found is not None and aside == self._aside(found):
                    aside.replace(volatile)
            sync_directory(self._path)
            for aside in asides:
                aside.unlink(missing_ok=True)
            sync_directory(self._path)
        except OSError as error:
            raise StateAccessError(
                f"{volatile} cannot be put back: {error.strerror}", "let this user write there"
            ) from error

    def _replace_permanent(self, data: bytes | None, blob: bytes | None = None) -> None:
        """`blob`: the file's bytes, where they are known. Raises OSError."""
        if data is None:
            self._replace(StateKind.PERMANENT, None)
            self._ours = set()
            return
        if self._options.backup:
            self._keep_backup()
        blob = encode_file(data, self._key) if blob is None else blob
        self._ours.add(digest := sha256(blob).digest())
        self._put_blob(self._file(StateKind.PERMANENT), blob)
        self._ours = {digest}

    def _replace(self, kind: StateKind, data: bytes | None) -> None:
        """Raises OSError."""
        path = self._file(kind)
        if data is None:
            path.unlink(missing_ok=True)
            sync_directory(self._path)
        else:
            self._put(path, data)

    def _put(self, path: Path, data: bytes) -> None:
        self._put_blob(path, encode_file(data, self._key))

    def _put_blob(self, path: Path, blob: bytes) -> None:
        write_durably(path, blob)
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
