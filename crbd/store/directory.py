"""swtpm's directory layout: one file per kind of state, `tpm2-00.permall` and its sisters, byte-compatible both ways.

A commit replaces a file whole: the new bytes go into a file beside it, are synced, renamed over the old one, and the
directory is synced. After a power cut a file is either the old or the new one. A leftover of an interrupted commit
(`.tpm2-00.permall.new`) means nothing and is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from crbd.errors import StateAbsentError, StateAccessError, StateDamagedError, StateError, StoreError
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.swtpm import MAX_BLOB, decode_file, encode_file
from crbd.store.files import make_directory, sync_directory, write_durably
from crbd.store.lockfile import LockFile


class DirectoryStore:
    """A `Store` in one directory. Files are made with mode 0600, a new directory with 0700."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Raises StateAbsentError if there is no such directory and `create` is false;

        StateAccessError if it cannot be made or used.
        """
        self._path = path
        self._lock: LockFile | None = None
        if create:
            make_directory(path)
        try:
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # What a killed predecessor renamed and did not sync must not be shown to a guest before it is durable.
            os.fsync(self._directory)
        except FileNotFoundError as error:
            raise StateAbsentError(
                f"{path} does not exist", "check the path, or make a new TPM there with --create"
            ) from error
        except OSError as error:
            raise StateAccessError(
                f"{path} cannot be opened: {error.strerror}", "name a directory that this user may read and write"
            ) from error

    @property
    def name(self) -> str:
        return str(self._path)

    def use_engine(self, stamp: EngineStamp) -> None:
        """swtpm's files do not say which engine wrote them; libtpms judges its blobs itself."""

    def lock(self) -> None:
        if self._lock is None:
            self._lock = LockFile.acquire(self._path / ".lock")

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
        return decode_file(blob, str(path))

    def commit(self, changes: Mapping[StateKind, bytes | None]) -> None:
        try:
            for kind in sorted(changes):
                data = changes[kind]
                # Each is durable by itself: volatile state must not outlive a power cut that the permanent state before
                # it does not.
                if data is None:
                    self._file(kind).unlink(missing_ok=True)
                    sync_directory(self._path)
                else:
                    write_durably(self._file(kind), encode_file(data))
        except OSError as error:
            raise StoreError(f"TPM state in {self._path} could not be written: {error.strerror}") from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def refuse_orphans(self) -> None:
        """Raises StateDamagedError where volatile state lies without the permanent state it belongs to:

        something was lost, this is no empty directory.
        """
        if self._file(StateKind.PERMANENT).exists():
            return
        for kind in (StateKind.VOLATILE, StateKind.SAVESTATE):
            if self._file(kind).exists():
                raise StateDamagedError(
                    f"{self._file(StateKind.PERMANENT)} is missing while {self._file(kind).name} is there",
                    "restore the missing file from a backup; to give this TPM up, empty the directory",
                )

    def _file(self, kind: StateKind) -> Path:
        return self._path / f"tpm2-00.{kind.nvram_name}"

    @staticmethod
    def _read(path: Path) -> bytes:
        """Up to one byte more than the largest blob, so that the decoder sees an oversized file and memory does not."""
        with path.open("rb") as file:
            return file.read(MAX_BLOB + 1)


def open_directory(path: Path, *, create: bool) -> DirectoryStore:
    """Open and lock the directory and see that what lies there can be read.

    Raises a StateError; nothing is changed but the lock file.
    """
    store = DirectoryStore(path, create=create)
    try:
        store.lock()
        store.refuse_orphans()
    except StateError:
        store.close()
        raise
    return store
