"""Landlock: which files the daemon may still reach once it serves, and that it calls nobody.

Rules are about directories as they are when the daemon starts (landlock(7)): what lies below them later counts, what is
put in their place does not. They stay for good, also with the program that an upgrade executes. Descriptors that are
open stay usable: sockets, the log, what the parent handed over.

They bind the thread that asks and those that it starts, so that it has to ask before there are others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from crbd.errors import WallError
from crbd.server import syscalls


class Files(IntFlag):
    """LANDLOCK_ACCESS_FS_* (linux/landlock.h)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_SINCE = ((1, Files(0x1FFF)), (2, Files.REFER), (3, Files.TRUNCATE), (5, Files.IOCTL_DEV))
"""Which version of the interface brought what."""
_OF_A_FILE = Files.EXECUTE | Files.WRITE_FILE | Files.READ_FILE | Files.TRUNCATE | Files.IOCTL_DEV
"""What can be allowed on something that is no directory."""
READ = Files.READ_FILE | Files.READ_DIR
KEEP = READ | Files.WRITE_FILE | Files.TRUNCATE | Files.MAKE_REG | Files.MAKE_DIR | Files.REMOVE_FILE | Files.IOCTL_DEV
"""State: all but links, devices, sockets and programs."""
CLEAN = Files.REMOVE_FILE
"""Where a socket or a pid file is removed at the end."""
_BIND_TCP, _CONNECT_TCP = 1, 2
_NETWORK = _BIND_TCP | _CONNECT_TCP
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2


@dataclass(frozen=True, slots=True)
class Place:
    """A directory with all below it, or a file, and what may be done there."""

    path: Path
    rights: Files


def restrict(places: Iterable[Place]) -> int:
    """Reach nothing but `places` from now on; open no TCP connection and no TCP listener, send no signal to processes
    that were there before, and talk to none of their abstract UNIX sockets, as far as this kernel knows of these.

    A place that is not there is left away. Needs no_new_privs (crbd.server.walls). Returns the version of the kernel's
    Landlock, or 0 where it has none: nothing is restricted then. Raises WallError.
    """
    version = syscalls.landlock_version()
    if version == 0:
        return 0
    handled = Files(0)
    for since, rights in _SINCE:
        if version >= since:
            handled |= rights
    # The service manager's socket may be an abstract one (sd_notify(3)).
    abstract = 0 if os.environ.get("NOTIFY_SOCKET", "").startswith("@") else _SCOPE_ABSTRACT_SOCKETS
    place: Path | None = None
    try:
        ruleset = syscalls.landlock_ruleset(version, handled, _NETWORK, abstract | _SCOPE_SIGNALS)
        try:
            for each in places:
                place = each.path
                _allow(ruleset, each, handled)
            place = None
            syscalls.landlock_restrict(ruleset)
        finally:
            os.close(ruleset)
    except OSError as error:
        where = "" if place is None else f" for {place}"
        raise WallError(f"Landlock{where}: {error.strerror}", "see that it is there, or use --landlock off") from error
    return version


def _allow(ruleset: int, place: Place, handled: Files) -> None:
    """Raises OSError."""
    try:
        descriptor = os.open(place.path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rights = place.rights & handled
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_A_FILE
        syscalls.landlock_allow(ruleset, rights, descriptor)
    finally:
        os.close(descriptor)
