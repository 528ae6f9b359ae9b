"""The pid file: the process id in decimal without a newline (as swtpm writes it), while the daemon lives."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from types import TracebackType

from crbd.errors import PidFileError

log = logging.getLogger(__name__)

MODE = 0o644
"""Permission bits of a new pid file, under umask (swtpm's)."""
_REMEDY = "name a file that this user may write"


class PidFile:
    """As a context: what `write` wrote is removed at its end.

    `target` is a path, or the number of a descriptor of a regular file that is open for writing; that is closed once
    it is written, and the file it was is removed at the end where its name can be found (swtpm does both).
    """

    def __init__(self, target: Path | int) -> None:
        self._target = target
        self._written: Path | None = None
        if isinstance(target, int):
            try:
                usable = stat.S_ISREG(os.fstat(target).st_mode)
            except OSError:
                usable = False
            if not usable:
                raise PidFileError(f"--pid: descriptor {target} is no regular file", "hand over one opened for writing")

    @classmethod
    def of_this_process(cls, path: Path) -> PidFile:
        """The one that the same process wrote when it ran another program."""
        pid_file = cls(path)
        pid_file._written = path
        return pid_file

    @property
    def written(self) -> Path | None:
        """Where it was written, if it was and its name could be found."""
        return self._written

    def write(self) -> None:
        """Write this process's id, into a file that is there or a new one. Raises PidFileError."""
        try:
            if isinstance(self._target, int):
                self._written = _name_of(self._target)
                _write_and_close(self._target)
            else:
                _put(self._target)
                self._written = self._target
        except OSError as error:
            raise PidFileError(f"--pid {self._target}: {error.strerror}", _REMEDY) from error

    def __enter__(self) -> PidFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._written is None:
            return
        try:
            self._written.unlink(missing_ok=True)
        except OSError as problem:
            log.warning("the pid file %s stays behind: %s", self._written, problem.strerror)


def _put(path: Path) -> None:
    """Write into the file that is there: who made it may hold it open and wait (swtpm_setup does). A new one appears
    whole.
    """
    try:
        _write_and_close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC))
    except FileNotFoundError:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        _write_and_close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE))
        temporary.replace(path)


def _write_and_close(descriptor: int) -> None:
    try:
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)


def _name_of(descriptor: int) -> Path | None:
    """The file's name; None without /proc, as in a chroot."""
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:
        return None
