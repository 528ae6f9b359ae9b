"""The system calls behind the walls that the standard library does not have: prctl(2), seccomp(2), landlock(7).

Beside the engine the only module that sees ctypes (docs/decisions/0006-seccomp.md). No memory is made executable for
them: plain calls into libc, no callbacks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from struct import Struct
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
_libc.syscall.restype = ctypes.c_long

PR_SET_DUMPABLE: Final = 4
PR_SET_NO_NEW_PRIVS: Final = 38

_SECCOMP: Final[Mapping[str, int]] = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_INSTRUCTION_SIZE: Final = 8

_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1
_RULESET: Final = Struct("=QQQ")
"""struct landlock_ruleset_attr: file system, network (from version 4 on), scope (from version 6 on)."""
_RULESET_SIZES: Final = ((6, 24), (4, 16), (1, 8))
"""How much of it a kernel of that version and later knows, in bytes."""
_PATH_BENEATH: Final = Struct("=Qi")
"""struct landlock_path_beneath_attr (packed): rights, descriptor of the directory or file."""


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def machine() -> str:
    """The kernel's name of the processor: x86_64, aarch64."""
    return os.uname().machine


def prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument. Raises OSError."""
    _checked(_libc.prctl(option, argument, 0, 0, 0), "prctl")


def install_filter(program: bytes) -> None:
    """Filter the system calls of all threads of this process, and of what it executes, for good.

    `program` is made of struct sock_filter, 8 bytes each, in the machine's byte order. Needs `PR_SET_NO_NEW_PRIVS`.
    Raises OSError.
    """
    number = _SECCOMP.get(machine())
    if number is None:
        raise OSError(f"the number of seccomp(2) on {machine()} is not known")
    fprog = _Program(len(program) // _INSTRUCTION_SIZE, program)
    result = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(fprog),
    )
    # A positive result is the thread that could not be filtered as well.
    _checked(-1 if result > 0 else result, "seccomp")


def landlock_version() -> int:
    """The version of Landlock's interface in this kernel; 0 where there is none, or it is switched off."""
    result: int = _libc.syscall(
        ctypes.c_long(_LANDLOCK_CREATE_RULESET),
        None,
        ctypes.c_ulong(0),
        ctypes.c_ulong(_LANDLOCK_CREATE_RULESET_VERSION),
    )
    return max(0, result)


def landlock_ruleset(version: int, files: int, network: int, scope: int) -> int:
    """A descriptor of a new set of rules that handles these rights; what this version does not know is left away.

    Raises OSError.
    """
    size = next(size for since, size in _RULESET_SIZES if version >= since)
    attributes = _RULESET.pack(files, network, scope)[:size]
    return _checked(
        _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), attributes, ctypes.c_ulong(size), ctypes.c_ulong(0)),
        "landlock_create_ruleset",
    )


def landlock_allow(ruleset: int, rights: int, place: int) -> None:
    """Allow `rights` on the open file or directory `place` and what is below it. Raises OSError."""
    _checked(
        _libc.syscall(
            ctypes.c_long(_LANDLOCK_ADD_RULE),
            ctypes.c_long(ruleset),
            ctypes.c_ulong(_LANDLOCK_RULE_PATH_BENEATH),
            _PATH_BENEATH.pack(rights, place),
            ctypes.c_ulong(0),
        ),
        "landlock_add_rule",
    )


def landlock_restrict(ruleset: int) -> None:
    """Put this thread, and what it starts from now on, under the rules, for good. Needs `PR_SET_NO_NEW_PRIVS`.

    Raises OSError.
    """
    _checked(
        _libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ctypes.c_long(ruleset), ctypes.c_ulong(0)),
        "landlock_restrict_self",
    )


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result
