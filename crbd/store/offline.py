"""State at rest: a directory in crbd's layout opened by a tool, and documents in files of their own. No engine here.

Theory. A tool holds the lock that a daemon would hold, so that the two never meet. What it reads are documents as
bytes; what it writes is one document more, in the slot that does not hold the state, so that everything here is as
safe against a power cut as a daemon's commit. A directory that is to hold a TPM for the first time must be absent or
empty, and is left so where anything fails.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateError,
    StateForeignError,
    StateWriteError,
    StoreError,
)
from crbd.state.header import MAX_DOCUMENT, peek_header
from crbd.state.slots import MAGIC as SLOT_MAGIC
from crbd.store.document import FILE_NAME
from crbd.store.files import make_directory, sync_directory, write_durably
from crbd.store.layout import Layout, found_in, is_kept
from crbd.store.linear import MAGIC as LINEAR_MAGIC
from crbd.store.lockfile import LockFile
from crbd.store.side import NAME as REGISTERS
from crbd.store.slots import Loaded, SlotFile

_LOCK_NAME = ".lock"


class OfflineState:
    """A directory with a `tpm.crbd`, locked until `close`. A context manager."""

    def __init__(self, directory: Path, *, writable: bool = False) -> None:
        """Raises a StateError; nothing is changed then but the lock file."""
        require_layout(directory, Layout.CRBD)
        self.directory = directory
        self._path = directory / FILE_NAME
        self._lock = LockFile.acquire(directory / _LOCK_NAME)
        try:
            self._slots = SlotFile.open(self._path, create=False, writable=writable)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What messages call it: the file's path."""
        return str(self._path)

    @property
    def writer_id(self) -> bytes:
        """16 random bytes for the documents that are written through this object."""
        return self._slots.writer_id

    def current(self) -> Loaded:
        """The newest intact slot. Raises a StateError."""
        loaded = self._slots.load()
        assert loaded is not None
        return loaded

    def previous(self) -> Loaded | None:
        """The one before, which is the undo; None where there is none. Raises a StateError."""
        return self._slots.previous()

    def commit(self, payload: bytes) -> None:
        """Make the document `payload` the state, durably.

        One of an older format than its own is kept beside it first, in `tpm.crbd.format-N`. Raises a StateError;
        the state is as before then.
        """
        before = self.current().payload
        old = peek_header(before, self.name).format_version
        if old < peek_header(payload, self.name).format_version:
            write_file(self._path.with_name(f"{FILE_NAME}.format-{old}"), before)
        try:
            self._slots.commit(payload)
        except StoreError as error:
            raise StateWriteError.of(error) from error

    def close(self) -> None:
        """Closing twice is no error."""
        self._slots.close()
        self._lock.release()


def require_layout(directory: Path, layout: Layout) -> None:
    """Raises StateAbsentError or StateForeignError unless `directory` holds state in `layout`."""
    there = layout_of(directory)
    if there is not layout:
        raise StateForeignError(
            f"{directory} holds state in the {there.value} layout, and this works on the {layout.value} layout only",
            f"convert it first: crbd state convert --to {layout.value}",
        )


def require_directory(path: Path) -> None:
    """Raises StateForeignError for a linear file: nothing is ever kept beside one. StateAbsentError, too."""
    if layout_of(path) is Layout.LINEAR:
        raise StateForeignError(f"{path} is a linear file", "name a directory")


def layout_of(directory: Path) -> Layout:
    """As `found_in`; raises StateAbsentError where there is no state."""
    there = found_in(directory)
    if there is None:
        raise StateAbsentError(f"there is no TPM state in {directory}", "check the path")
    return there


def kept_files(directory: Path) -> list[Path]:
    """What upgrades and conversions left, for the case of need or for want of power, by name.

    Raises StateAccessError.
    """
    try:
        names = sorted(path for path in directory.iterdir() if is_kept(path.name))
    except OSError as error:
        raise StateAccessError(f"{directory} cannot be read: {error.strerror}", "let this user read it") from error
    return names


def read_document(path: Path) -> bytes:
    """The bytes of a document in a file of its own; of one that is too long, only so much that the decoder sees it.

    Raises StateAbsentError, StateAccessError, or StateForeignError for what is no such file.
    """
    try:
        # Without O_NONBLOCK a FIFO would hold the command up for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise StateAbsentError(f"{path} does not exist", "check the path") from error
    except OSError as error:
        raise StateAccessError(f"{path} cannot be opened: {error.strerror}", "let this user read it") from error
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StateForeignError(f"{path} is no file", "name a document that crbd state export wrote")
        try:
            data = file.read(MAX_DOCUMENT + 1)
        except OSError as error:
            raise StateAccessError(f"{path} cannot be read: {error.strerror}", "check the disk it is on") from error
    if data.startswith(SLOT_MAGIC):
        raise StateForeignError(f"{path} is the state file itself, not a document", "name the directory that it is in")
    if data.startswith(LINEAR_MAGIC):
        raise StateForeignError(f"{path} is swtpm's linear file, not a document", "this command does not read those")
    return data


def read_file(path: Path) -> bytes:
    """A file of state; of one that is too long, only so much that the decoder sees it. Raises StateAccessError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_DOCUMENT + 1)
    except OSError as error:
        raise StateAccessError(f"{path} cannot be read: {error.strerror}", "let this user read it") from error


def write_file(path: Path, data: bytes) -> None:
    """Put a file (0600) at `path`, durably, whatever is there.

    Raises StateAccessError; nothing of `data` stays behind then.
    """
    try:
        write_durably(path, data)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.with_name(f".{path.name}.new").unlink()
        raise unwritable(path, error) from error


def write_new_file(path: Path, data: bytes) -> None:
    """Put a file (0600) at `path`, durably, where nothing is. Raises StateError (something is), StateAccessError."""
    try:
        # Takes the name: what another program puts there from now on is its own mistake.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise StateError(f"{path} exists", "choose another name, or give --force to replace it") from error
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        write_file(path, data)
    except StateAccessError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def unwritable(path: Path, error: OSError) -> StateAccessError:
    """The error for what the operating system would not let be written at `path`."""
    return StateAccessError(f"{path} cannot be written: {error.strerror}", "make room, or let this user write there")


def create_state(directory: Path, payload: bytes) -> None:
    """Make a `tpm.crbd` with the document `payload` in a directory that is absent or empty.

    Raises a StateError; the directory is as before then.
    """
    with vacant(directory):
        create_slots(directory / FILE_NAME, payload)


def create_slots(path: Path, payload: bytes) -> None:
    """Make a two-slot file at `path`, where none is, and see that it reads back. The caller holds the lock.

    Raises a StateError; there is no file then.
    """
    slots = SlotFile.open(path, create=True)
    try:
        slots.commit(payload)
        loaded = slots.load()
    except StoreError as error:
        raise StateWriteError.of(error) from error
    finally:
        slots.close()
    if loaded is None or loaded.payload != payload:
        raise StateDamagedError(f"{path} does not read back as it was written", "see to the disk it is on")


@contextmanager
def vacant(directory: Path) -> Iterator[None]:
    """A locked directory for a new TPM: made if it is absent, else it must be empty but for a lock file.

    Raises StateError, StateAccessError, StateLockedError. Where the body raises, what it put there is removed again.
    """
    was_there = directory.exists()
    had_lock = (directory / _LOCK_NAME).exists()
    if was_there:
        _refuse_unless_vacant(directory)
    try:
        make_directory(directory)
        lock = LockFile.acquire(directory / _LOCK_NAME)
        try:
            _refuse_unless_vacant(directory)
            try:
                yield
            except BaseException:
                _clear(directory)
                raise
        except BaseException:
            if not had_lock:
                with contextlib.suppress(OSError):
                    (directory / _LOCK_NAME).unlink()
            raise
        finally:
            lock.release()
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _refuse_unless_vacant(directory: Path) -> None:
    try:
        names = sorted(entry.name for entry in directory.iterdir() if entry.name != _LOCK_NAME)
    except OSError as error:
        raise StateAccessError(f"{directory} cannot be read: {error.strerror}", "name a directory") from error
    if names:
        raise StateError(f"{directory} is not empty: it holds {names[0]}", "name a directory that is absent or empty")


def _clear(directory: Path) -> None:
    """Remove every file of state from a directory that held none when it was locked."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if path.name.lstrip(".").startswith((FILE_NAME, "tpm2-00.", REGISTERS)):
                path.unlink()
        sync_directory(directory)
