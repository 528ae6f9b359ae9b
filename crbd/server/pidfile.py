"""The pid file:

the process id in decimal, without a newline (as swtpm writes it), there for as long as clients are served.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crbd.errors import PidFileError


@contextmanager
def pid_file(path: Path) -> Iterator[None]:
    """Write this process's id to `path` (mode 0644, under umask), whole or not at all;

    remove it afterwards. Raises PidFileError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, str(os.getpid()).encode())
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        raise PidFileError(
            f"--pid {path}: {error.strerror}", "name a file in a directory that this user may write"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
