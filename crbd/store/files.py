"""The few system calls a store of fixed places in one file is made of, behind one small port.

The port exists because the order of these calls is all that stands between a TPM and a power cut: the tests put a
recorder in its place and play every crash.

Theory. A new file is made under another name, `.NAME.new`, and gets its own by `publish` when its first contents are
durable. So a file that has its name holds a whole state, always, and what is left of an interrupted creation bears the
other name: that can be told from damage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateError,
    StateForeignError,
    StateUnfinishedError,
    StoreError,
    StoreFencedError,
)
from crbd.store.lockfile import lock_whole, unlock_whole


class BlockFile(Protocol):
    """An open file. Offsets and sizes in bytes. Unless it says otherwise, a method raises OSError."""

    @property
    def published(self) -> bool:
        """Whether the file has its name, durably."""

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer only at the end of the file."""

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write all of it; not yet durable. After an OSError any part of it may be written."""

    def pwritev(self, pieces: Sequence[bytes | memoryview], size: int, offset: int) -> None:
        """As `pwrite`, of all pieces one behind the other; `size` is that of all together."""

    def fdatasync(self) -> None:
        """Everything written before is durable when this returns.

        After an OSError nothing is known about any of it, and a second call that succeeds proves nothing: the kernel
        may have dropped what it could not write. It must be written again.
        """

    def settle(self) -> None:
        """Make sure that what `pread` returns is what the disk holds, not what an earlier process left in memory."""

    def check_place(self) -> None:
        """Raises StoreFencedError unless this file still has its name, or, unpublished, the name is still free;

        StoreError where the directory is gone.
        """

    def publish(self) -> None:
        """Give a new file its name, durably. Its contents must be durable. To be called again after an OSError."""

    def lock(self) -> None:
        """Become the only user. Locking twice is no error. Raises StateLockedError, StateAccessError."""

    def unlock(self) -> None:
        """Let others become the only user. Raises StateAccessError."""

    @property
    def lock_descriptor(self) -> int | None:
        """What holds the lock, where it is held by a descriptor that can be passed on."""

    def close(self) -> None:
        """Closing twice is no error. A file that was never published is removed."""


class RegularFile:
    """A `BlockFile` on a regular file or block device."""

    def __init__(self, path: Path, descriptor: int, *, named: bool) -> None:
        self._path = path
        self._descriptor = descriptor
        self._named = named
        self._name_is_durable = named
        self._place = str(path if named else _unnamed(path))
        """Where it must be found: `path`, or the name before that."""
        status = os.fstat(descriptor)
        self._device, self._inode = status.st_dev, status.st_ino

    @classmethod
    def open(cls, path: Path, *, create: bool, writable: bool = True) -> RegularFile:
        """Open what is at `path`; if nothing is and `create` is true, make a new empty file (mode 0600) without name.

        Raises StateAbsentError, StateUnfinishedError (a creation was interrupted), StateForeignError (no file) or
        StateAccessError.
        """
        path = path.absolute()
        try:
            return cls._open(path, writable)
        except FileNotFoundError:
            if not create:
                raise _absent(path) from None
        except OSError as error:
            raise StateAccessError(
                f"{path} cannot be opened: {error.strerror}", "name a file that this user may read and write"
            ) from error
        try:
            _unnamed(path).unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            return cls(path, os.open(_unnamed(path), flags, 0o600), named=False)
        except OSError as error:
            raise StateAccessError(
                f"{path} cannot be made: {error.strerror}", "make the directory, writable for this user"
            ) from error

    @classmethod
    def _open(cls, path: Path, writable: bool) -> RegularFile:
        access = os.O_RDWR if writable else os.O_RDONLY
        # Without O_NONBLOCK a FIFO at the path would hold the start up for ever.
        descriptor = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(descriptor)
            raise StateForeignError(f"{path} is no file", "check the path; nothing was changed")
        return cls(path, descriptor, named=True)

    @property
    def published(self) -> bool:
        return self._name_is_durable

    def pread(self, size: int, offset: int) -> bytes:
        found = os.pread(self._descriptor, size, offset)
        while len(found) < size and (piece := os.pread(self._descriptor, size - len(found), offset + len(found))):
            found += piece
        return found

    def pwrite(self, data: bytes, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest = rest[written:]
            offset += written

    def pwritev(self, pieces: Sequence[bytes | memoryview], size: int, offset: int) -> None:
        written = os.pwritev(self._descriptor, pieces, offset)
        if written != size:
            # A full disk, mostly: the rest is what says so.
            self.pwrite(b"".join(pieces)[written:], offset + written)

    def fdatasync(self) -> None:
        os.fdatasync(self._descriptor)

    def settle(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def check_place(self) -> None:
        try:
            found = os.lstat(self._place)
        except FileNotFoundError as error:
            if not self._path.parent.exists():
                raise StoreError(f"{self._path} cannot be written: its directory is gone") from error
            raise StoreFencedError(f"{self._place} was removed while crbd used it") from error
        if found.st_ino != self._inode or found.st_dev != self._device:
            raise StoreFencedError(f"{self._place} was replaced by another file while crbd used it")
        if not self._named and os.path.lexists(self._path):
            raise StoreFencedError(f"{self._path} was made by another program while crbd was making it")

    def publish(self) -> None:
        if not self._named:
            _unnamed(self._path).rename(self._path)
            self._named, self._place = True, str(self._path)
        if not self._name_is_durable:
            sync_directory(self._path.parent)
            self._name_is_durable = True

    def lock(self) -> None:
        lock_whole(self._descriptor, self._path)

    def unlock(self) -> None:
        unlock_whole(self._descriptor, self._path)

    @property
    def lock_descriptor(self) -> int | None:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor < 0:
            return
        if not self._named:
            self._remove_unnamed()
        os.close(self._descriptor)
        self._descriptor = -1

    def _remove_unnamed(self) -> None:
        """A leftover does no harm beyond its message, so that failing to remove it is no error."""
        with contextlib.suppress(OSError):
            found = os.lstat(self._place)
            if (found.st_ino, found.st_dev) == (self._inode, self._device):
                _unnamed(self._path).unlink()


def _unnamed(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _absent(path: Path) -> StateError:
    if _unnamed(path).exists():
        return StateUnfinishedError(
            f"the making of {path} was interrupted before anything was stored in it", "run again with --create"
        )
    return StateAbsentError(f"{path} does not exist", "check the path, or make a new TPM there with --create")


def write_durably(path: Path, data: bytes) -> None:
    """Put a whole file (0600) at `path`, replacing what is there: after a power cut it is the old or the new one.

    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory for state (0700) if it is not there, durably: what lies in one that is lost is lost too.

    Raises StateAccessError.
    """
    try:
        path.mkdir(mode=0o700)
        sync_directory(path.parent)
    except FileExistsError:
        return
    except OSError as error:
        remedy = "make the directory above it, writable for this user"
        raise StateAccessError(f"{path} cannot be made: {error.strerror}", remedy) from error


def is_there(path: Path) -> bool:
    """Whether anything has that name, be it a link to nowhere: that is no absence. Raises StateAccessError."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def read_regular(path: Path, limit: int) -> bytes:
    """Up to `limit` bytes of a file.

    Raises OSError, or StateForeignError for what is no file: a link, too, which a replacement of the file would remove.
    """
    try:
        # Without O_NONBLOCK a FIFO would hold the start up for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_file(path, "a symbolic link") from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _no_file(path, "a directory" if stat.S_ISDIR(mode) else "a device or a pipe")
        found = b""
        while len(found) < limit and (piece := os.read(descriptor, limit - len(found))):
            found += piece
        return found
    finally:
        os.close(descriptor)


def unreadable(path: Path, error: OSError) -> StateAccessError:
    """The error for what the operating system would not let be read."""
    return StateAccessError(f"{path} cannot be read: {error.strerror}", "let the user that runs crbd read it")


def _no_file(path: Path, what: str) -> StateForeignError:
    return StateForeignError(f"{path} is no file: it is {what}", "put the state itself there; nothing was changed")


def modified(path: Path) -> int | None:
    """When a regular file was last written, in seconds since 1970; None for what is absent or no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return int(found.st_mtime) if stat.S_ISREG(found.st_mode) else None
