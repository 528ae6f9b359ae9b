"""`--log` of the swtpm command: where messages go, how many, and with what in front.

Without `--log` they go to stderr behind `swtpm: `. Levels: 0 nothing, 1 (the default) what went wrong, 2 what happens,
5 and more what the daemon does step by step. swtpm's own messages are other ones, and fewer.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys

from crbd.compat.swtpm_grammar import Values
from crbd.errors import UsageError

DEFAULT_PREFIX = "swtpm: "
LOG_MODE = 0o600
"""Permission bits of a new log file, under umask."""


def start_log(values: Values | None, *, anew: bool = True) -> int | None:
    """Send messages where the option says. Returns the descriptor of a log that is not stderr, or None.

    Without `anew` a file is gone on with, whatever the option says of it. Raises UsageError.
    """
    if values is None:
        _configure(logging.StreamHandler(sys.stderr), DEFAULT_PREFIX, logging.WARNING)
        return None
    path, number = values.string("file"), values.descriptor("fd")
    level = values.number("level") or 0
    descriptor: int | None = None
    silent = path == "-"
    if path is not None and not silent:
        descriptor = _open(path, truncate=anew and values.flag("truncate"))
    elif path is None and number is not None:
        descriptor = _writable(number)
    if path is not None or number is not None:
        level = level or 1
    if silent or (level == 0 and "level" in values):
        _configure(logging.NullHandler(), "", logging.CRITICAL)
        return None
    handler = (
        logging.StreamHandler(sys.stderr)
        if descriptor is None
        else logging.StreamHandler(os.fdopen(descriptor, "w", buffering=1, closefd=False, errors="replace"))
    )
    _configure(handler, values.string("prefix") or "", _level(level))
    return descriptor


def _level(level: int) -> int:
    if level >= 5:
        return logging.DEBUG
    return logging.INFO if level > 1 else logging.WARNING


def _configure(handler: logging.Handler, prefix: str, level: int) -> None:
    # A percent sign in the prefix is one.
    handler.setFormatter(logging.Formatter(prefix.replace("%", "%%") + "%(message)s"))
    logging.basicConfig(handlers=[handler], level=level, force=True)


def _open(path: str, *, truncate: bool) -> int:
    how = os.O_TRUNC if truncate else os.O_APPEND
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how, LOG_MODE)
    except OSError as error:
        raise UsageError(f"Could not open logfile for writing: {error.strerror}") from error


def _writable(number: int) -> int:
    try:
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
    except OSError as error:
        raise UsageError(f"Could not access logfile using fd {number}: {error.strerror}") from error
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise UsageError(f"Could not access logfile using fd {number}: Operation not permitted")
    return number
