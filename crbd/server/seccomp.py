"""The filter of system calls: what the daemon may still ask of the kernel once it serves.

Theory. An allow list, with three answers for what is not on it. What crbd never does and an intruder might (ptrace,
mount, bpf, becoming another user) ends the process. What has a rule and breaks it (a socket that is no UNIX socket,
memory that is writable and executable) fails with the rule's error. Everything else fails with ENOSYS, as on a kernel
that does not have it: a later glibc or Python that tries a new call first falls back to the old one, where a kill
would take a TPM away from its guest.

The filter stays for good, also with the program that an upgrade executes. So there are two: with an upgrade the calls
are allowed that start a program; where there can be none they end the process, like those of an intruder. What the
installed program needs and this filter refuses shows in the trial, and is why there is no upgrade then.

The kernel runs a classic BPF program on struct seccomp_data (seccomp(2)): i32 number, u32 architecture, u64 instruction
pointer, u64 arguments[6], in the machine's byte order, here little-endian.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from typing import Final

from crbd.errors import WallError
from crbd.server import syscalls
from crbd.server.seccomp_calls import (
    DESCRIPTORS,
    FACTS,
    FILES,
    FORBIDDEN,
    JUDGED,
    MEMORY,
    SOCKETS,
    STARTING,
    THREADS,
    Numbers,
)


class Action(Enum):
    """What becomes of calls that are not allowed."""

    KILL = "kill"
    """They end the process or fail, as the theory has it."""
    LOG = "log"
    """The kernel writes them into its audit log, and does them."""
    NONE = "none"
    """There is no filter."""


# linux/seccomp.h
KILL_PROCESS: Final = 0x80000000
ERRNO: Final = 0x00050000
LOG: Final = 0x7FFC0000
ALLOW: Final = 0x7FFF0000

_INSTRUCTION = Struct("<HBBI")
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_ALL = 0xFFFFFFFF
_X32 = 0x40000000
"""On x86-64: numbers from here on are those of the x32 ABI."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor architecture: linux/audit.h's number, and which of a call's two numbers is meant."""

    audit: int
    column: int


MACHINES: Final[Mapping[str, Machine]] = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}


@dataclass(frozen=True, slots=True)
class Test:
    """Whether `argument & mask == value`, of the lower 32 bits, or the upper ones."""

    argument: int
    value: int
    mask: int = _ALL
    upper: bool = False

    @property
    def offset(self) -> int:
        """Of these bits in struct seccomp_data."""
        return _ARGUMENTS + 8 * self.argument + 4 * self.upper


@dataclass(frozen=True, slots=True)
class Rule:
    """A call is allowed where all tests of one alternative hold; if none does `refusal` is the answer."""

    alternatives: tuple[tuple[Test, ...], ...]
    refusal: int


def _one_of(argument: int, values: tuple[int, ...], refusal: int) -> Rule:
    return Rule(tuple((Test(argument, value),) for value in values), refusal)


_PROT_WRITE, _PROT_EXEC = 2, 4
_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_PR_SET_NAME, _PR_GET_NAME, _PR_GET_DUMPABLE = 15, 16, 3
_IOCTLS = (
    *(0x5421, 0x5450, 0x5451),  # FIONBIO, FIONCLEX, FIOCLEX: what sockets and pipes are set up with
    *(0x5401, 0x802C542A, 0x5413),  # TCGETS, TCGETS2, TIOCGWINSZ: whether something is a terminal
    *(0x541B, 0x80081272),  # FIONREAD, BLKGETSIZE64
)
_UNIX_ONLY = _one_of(0, (socket.AF_UNIX,), ERRNO | errno.EAFNOSUPPORT)

_RULES: Final[Mapping[str, Rule]] = {
    "socket": _UNIX_ONLY,
    "socketpair": _UNIX_ONLY,
    "ioctl": _one_of(1, _IOCTLS, ERRNO | errno.ENOTTY),
    "prctl": Rule(
        (
            *((Test(0, option),) for option in (_PR_SET_NAME, _PR_GET_NAME, _PR_GET_DUMPABLE)),
            (Test(0, syscalls.PR_SET_NO_NEW_PRIVS),),
            # Core dumps off, never on.
            (Test(0, syscalls.PR_SET_DUMPABLE), Test(1, 0)),
        ),
        ERRNO | errno.EINVAL,
    ),
    # Limits may be asked for: there are no new ones.
    "prlimit64": Rule(((Test(2, 0), Test(2, 0, upper=True)),), ERRNO | errno.EPERM),
    "mmap": Rule(((Test(2, 0, _PROT_EXEC),), (Test(2, 0, _PROT_WRITE),)), ERRNO | errno.EPERM),
    "mprotect": Rule(((Test(2, 0, _PROT_EXEC),),), ERRNO | errno.EPERM),
    # Its flags lie in memory, where no filter looks; clone(2) does the same.
    "clone3": Rule((), ERRNO | errno.ENOSYS),
}
_THREADS_ALONE = Rule(((Test(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NAMESPACES),),), KILL_PROCESS)
_NO_NAMESPACES = Rule(((Test(0, 0, _CLONE_NAMESPACES),),), KILL_PROCESS)


def program(machine: str, action: Action, *, upgradable: bool) -> bytes:
    """The filter for `machine` (a key of `MACHINES`), an array of struct sock_filter: 8 bytes each, little-endian.

    `upgradable`: it may start a program.
    """
    target = MACHINES[machine]
    allowed: dict[str, tuple[int | None, int | None]] = {}
    for group in (FILES, DESCRIPTORS, SOCKETS, MEMORY, THREADS, FACTS):
        allowed |= group
    if upgradable:
        allowed |= STARTING
    rules = dict(_RULES) | {"clone": _NO_NAMESPACES if upgradable else _THREADS_ALONE}
    killed = FORBIDDEN if upgradable else {**FORBIDDEN, **STARTING}
    refused = LOG if action is Action.LOG else None
    kill = refused or KILL_PROCESS
    return b"".join(
        (
            _step(_LOAD, _ARCHITECTURE),
            _step(_IF_EQUAL, target.audit, yes=1),
            _step(_RETURN, kill),
            _step(_LOAD, _NUMBER),
            *((_step(_IF_AT_LEAST, _X32, no=1), _step(_RETURN, kill)) if machine == "x86_64" else ()),
            *_answers(allowed, target, ALLOW),
            *(
                _judgement(number, rules[name], refused or rules[name].refusal)
                for name, number in _numbers(JUDGED, target)
            ),
            *_answers(killed, target, kill),
            _step(_RETURN, refused or ERRNO | errno.ENOSYS),
        )
    )


def can_filter() -> bool:
    """Whether there is a filter for this machine."""
    return syscalls.machine() in MACHINES


def install(action: Action, *, upgradable: bool) -> None:
    """Filter the calls of this process from now on, all its threads, for good. Needs no_new_privs (crbd.server.walls).

    Raises WallError where there is no filter to be had.
    """
    machine = syscalls.machine()
    if not can_filter():
        raise WallError(f"there is no filter of system calls for {machine}", "switch it off: seccomp action none")
    try:
        syscalls.install_filter(program(machine, action, upgradable=upgradable))
    except OSError as error:
        raise WallError(
            f"system calls cannot be filtered: {error.strerror}",
            "see that the kernel has seccomp filters, or switch it off: seccomp action none",
        ) from error


def _step(code: int, operand: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction. `yes` and `no`: how many instructions a comparison skips."""
    return _INSTRUCTION.pack(code, yes, no, operand)


def _numbers(calls: Numbers, target: Machine) -> Iterator[tuple[str, int]]:
    for name, numbers in calls.items():
        number = numbers[target.column]
        if number is not None:
            yield name, number


def _answers(calls: Numbers, target: Machine, answer: int) -> Iterator[bytes]:
    """The same answer for each call; an instruction of its own for each, as jumps reach 255 instructions at most."""
    for _, number in _numbers(calls, target):
        yield _step(_IF_EQUAL, number, no=1)
        yield _step(_RETURN, answer)


def _judgement(number: int, rule: Rule, refusal: int) -> bytes:
    """Judge the call by its arguments; any other call goes on behind."""
    judged = b""
    for tests in rule.alternatives:
        alternative = _step(_RETURN, ALLOW)
        for test in reversed(tests):
            behind = len(alternative) // _INSTRUCTION.size
            alternative = (
                _step(_LOAD, test.offset)
                + _step(_AND, test.mask)
                + _step(_IF_EQUAL, test.value, no=behind)
                + alternative
            )
        judged += alternative
    judged += _step(_RETURN, refusal)
    return _step(_IF_EQUAL, number, no=len(judged) // _INSTRUCTION.size) + judged
