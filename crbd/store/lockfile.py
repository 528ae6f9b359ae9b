"""The `.lock` file of a state directory.

swtpm locks the whole of `.lock` with a POSIX record lock. An open-file-description lock on the same range excludes
swtpm and other crbd processes alike, and is not lost when some other descriptor of the file is closed, nor by exec.
The holder's pid stands in the file, for messages only: the lock itself, not the text, decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from struct import Struct
from typing import Final

from crbd.errors import StateAbsentError, StateAccessError, StateLockedError

_FLOCK = Struct("@hhqqi0q")
"""struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for open-file-description locks)."""

_PID_TEXT_MAX = 32
_inherited: Final[dict[tuple[int, int], int]] = {}
"""Descriptors with locks of the process whose successor this one is, by the device and inode of the locked file."""


def inherit(descriptor: int) -> None:
    """Be the holder of the lock on this descriptor, which becomes ours: who next locks that file here has it.

    Raises OSError for what is no descriptor.
    """
    _inherited[_identity(descriptor)] = descriptor


def let_go() -> None:
    """Give up every lock that was inherited and that nobody has taken: the files were of other state."""
    while _inherited:
        os.close(_inherited.popitem()[1])


class LockFile:
    """A held lock; made by `acquire`, given back by `release`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, mode: int = 0o600) -> LockFile:
        """Lock `path`, which is created with `mode` if need be.

        Raises StateLockedError if another process holds it, StateAbsentError if its directory is not there,
        StateAccessError if it cannot be opened.
        """
        while True:
            lock = cls._acquire(path, mode)
            if lock.is_at(path):
                break
            # It was removed between its opening and its locking: whoever comes next would lock another file.
            lock.release()
        lock._say(f"{os.getpid()}\n")
        return lock

    @classmethod
    def _acquire(cls, path: Path, mode: int) -> LockFile:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        except FileNotFoundError as error:
            raise StateAbsentError(f"{path.parent} does not exist", "check the path") from error
        except OSError as error:
            raise StateAccessError(f"{path}: {error.strerror}", "let the user that runs crbd write there") from error
        _take_inherited(descriptor)
        try:
            if not _set_lock(descriptor, fcntl.F_WRLCK, path):
                raise StateLockedError(
                    f"{path.parent} is in use by {_holder(descriptor, _pid_text(descriptor))}",
                    "stop that process, or give this TPM a directory of its own",
                )
        except (StateLockedError, StateAccessError):
            os.close(descriptor)
            raise
        return cls(descriptor)

    def is_at(self, path: Path) -> bool | None:
        """Whether the file that is locked is the one at `path`; None where none is there. Raises OSError."""
        assert self._descriptor is not None
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        return (found.st_dev, found.st_ino) == _identity(self._descriptor)

    def _say(self, text: str) -> None:
        """For messages of others. A disk that is full or broken keeps nobody from locking."""
        assert self._descriptor is not None
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    @property
    def descriptor(self) -> int | None:
        """What holds the lock."""
        return self._descriptor

    def release(self) -> None:
        """Give the lock back; the file stays, as swtpm's does. Releasing twice is no error."""
        if self._descriptor is not None:
            self._say("")
            os.close(self._descriptor)
            self._descriptor = None


def lock_whole(descriptor: int, path: Path) -> None:
    """Lock an open state file itself, as swtpm (0.10 and later) locks a linear one; closing the descriptor releases it.

    Locking twice is no error. Raises StateLockedError if another process holds it, StateAccessError if the file system
    has no locks.
    """
    _take_inherited(descriptor)
    if not _set_lock(descriptor, fcntl.F_WRLCK, path):
        raise StateLockedError(
            f"{path} is in use by {_holder(descriptor)}", "stop that process, or give this TPM a file of its own"
        )


def unlock_whole(descriptor: int, path: Path) -> None:
    """Give the lock of `lock_whole` back. Raises StateAccessError."""
    _set_lock(descriptor, fcntl.F_UNLCK, path)


def _take_inherited(descriptor: int) -> None:
    """Where this process inherited the lock of this file, make `descriptor` the one that holds it."""
    inherited = _inherited.pop(_identity(descriptor), None)
    if inherited is not None:
        os.dup2(inherited, descriptor, inheritable=False)
        os.close(inherited)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _set_lock(descriptor: int, kind: int, path: Path) -> bool:
    """Set or release; false if another holds it. Raises StateAccessError."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise StateAccessError(
            f"{path} cannot be locked: {error.strerror}", "keep TPM state on a file system that has locks"
        ) from error
    return True


def _holder(descriptor: int, text: bytes = b"") -> str:
    """Who holds the lock, in words: swtpm's pid comes from the kernel, crbd's from the text in its lock file."""
    asked = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    pid = _FLOCK.unpack(asked)[4]
    if pid > 0:
        return f"process {pid}"
    return f"process {int(text)}" if text.isdigit() else "another process"


def _pid_text(descriptor: int) -> bytes:
    return os.pread(descriptor, _PID_TEXT_MAX, 0).strip()
