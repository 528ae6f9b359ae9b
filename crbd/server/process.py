"""What a daemon does to its own process before it serves: another root directory, another user, the background.

swtpm's order: into the background first, so that everything else is done and, if need be, reported by the process that
stays; then the root directory, then the user; files and sockets are opened after all three.
"""

from __future__ import annotations

import os
import pwd
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from crbd.errors import OperatorError, UsageError

_ID_MAX = 2**32 - 2
_LATE_IMPORTS = ("encodings.idna", "cryptography.hazmat.primitives.ciphers.aead", "traceback")
"""Modules that the standard library and crbd import when they first need them."""


@dataclass(frozen=True, slots=True)
class User:
    """Whom to become."""

    uid: int
    gid: int
    name: str | None = None
    """Where it is known; the supplementary groups go by it. Without a name they stay as they are."""


def find_user(text: str) -> User:
    """The user with that name, or with that number: its group has the same number then (swtpm's rule).

    Raises UsageError.
    """
    if text.isdecimal():
        if int(text) > _ID_MAX:
            raise UsageError(f"Error: uid {text} outside valid range.")
        return User(int(text), int(text))
    try:
        found = pwd.getpwnam(text)
    except KeyError:
        raise UsageError(f"Error: User '{text}' does not exist.") from None
    return User(found.pw_uid, found.pw_gid, found.pw_name)


def become(user: User) -> None:
    """Be that user from now on, for good. Raises OperatorError."""
    step = ""
    try:
        if user.name is not None:
            step = f"initgroups({user.name}, {user.gid})"
            os.initgroups(user.name, user.gid)
        step = f"setgid({user.gid})"
        os.setgid(user.gid)
        step = f"setuid({user.uid})"
        os.setuid(user.uid)
    except OSError as error:
        raise OperatorError(f"Error: {step} failed.", f"{error.strerror}; start as root, or leave the user") from error


def change_root(path: Path) -> None:
    """See nothing but what is below `path` from now on. The modules that would be loaded later are loaded before; the
    TPM engine is its caller's to load.

    Raises OperatorError.
    """
    for name in _LATE_IMPORTS:
        import_module(name)
    try:
        os.chroot(path)
        os.chdir("/")
    except OSError as error:
        raise OperatorError(
            f"chroot failed: {error.strerror}", f"start as root, with a directory; not {path}"
        ) from error


class Background:
    """This process, gone into the background. The one that was started waits until `finish`, and then ends with 0;

    if this one ends before, it ends the same way.
    """

    def __init__(self) -> None:
        """Fork twice, so that no terminal can ever be had; what returns is the process that stays.

        No thread may run yet. Raises OperatorError.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            # Before a chroot takes it away.
            self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            child = os.fork()
            if child:
                _end_as(child)
            os.setsid()
            reading, self._writing = os.pipe()
            grandchild = os.fork()
        except OSError as error:
            raise OperatorError(
                f"Could not prepare to daemonize: {error.strerror}", "see the limits of this user"
            ) from error
        if grandchild:
            os.close(self._writing)
            if os.read(reading, 1):
                os._exit(0)
            _end_as(grandchild)
        os.close(reading)

    def finish(self) -> None:
        """Tell the process that was started that it may end; what is printed from now on goes nowhere."""
        os.dup2(self._null, 1)
        os.dup2(self._null, 2)
        os.close(self._null)
        os.write(self._writing, b"\0")
        os.close(self._writing)


def _end_as(child: int) -> NoReturn:
    """Wait for the child's end, and end as it did."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
