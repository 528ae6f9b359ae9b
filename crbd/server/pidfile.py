"""The pid file: the process id in decimal without a newline (as swtpm writes it), while the daemon lives."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from crbd.errors import PidFileError


class PidFile:
    """As a context: what `write` wrote is removed at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = False

    def write(self) -> None:
        """Write this process's id (mode 0644, under umask), whole or not at all. Raises PidFileError."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, str(os.getpid()).encode())
            finally:
                os.close(descriptor)
            temporary.replace(self._path)
        except OSError as error:
            remedy = "name a file in a directory that this user may write"
            raise PidFileError(f"--pid {self._path}: {error.strerror}", remedy) from error
        self._written = True

    def __enter__(self) -> PidFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._written:
            self._path.unlink(missing_ok=True)
