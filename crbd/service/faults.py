"""Faults on request, for people who test TPM software: which, when, and how many have struck so far.

    PCR_Extend:2=retry          the second TPM2_PCR_Extend is answered with TPM_RC_RETRY and not run
    NV_Write:3+=nv-rate         every TPM2_NV_Write from the third on
    GetRandom:1-4=delay:250ms   the first four wait a quarter of a second and are run then
    *=lockout                   every command
    Sign=failure-mode           the first, and from then on all but TPM2_GetTestResult and TPM2_GetCapability are
                                answered with TPM_RC_FAILURE, until the TPM is reset
    Quote:1=reset               before the first, the machine is reset and the firmware starts the TPM (CLEAR)
    Quote:1=power-cut           the same without the firmware: what follows is answered with TPM_RC_INITIALIZE
    store:2=enospc              the second write of changed state fails: no space left (eio: an I/O error)

Several stand one to a line or with semicolons between them; a line that begins with # says nothing. A command is named
as in TPM 2.0 Part 3, in any case, or by its code. `*` is every command but TPM2_Startup and TPM2_Shutdown: those crbd
sends too. Counting begins at 1 when the fault is set; no number is every time. An answer is any response code of TPM
2.0 Part 2 by name or by number, as in `rc:0x922`.

A guest cannot set any of this: there is no command for it. Nothing here is in the way of a command unless crbd was
started to inject faults (crbd.service.injection).
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from crbd.errors import UsageError
from crbd.tpm.codes import CommandCode
from crbd.tpm.names import command_named, response_named

MAX_DELAY = 3600.0
"""Seconds."""

_FAULT: Final = re.compile(
    r"(?P<target>[^:=\s]+)(?::(?P<first>\d+)(?:(?P<on>\+)|-(?P<last>\d+))?)?\s*=\s*(?P<action>\S+)", re.ASCII
)
_DELAY: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s)", re.ASCII)
_ERRORS: Final = {"enospc": errno.ENOSPC, "eio": errno.EIO, "edquot": errno.EDQUOT, "erofs": errno.EROFS}
_NOT_EVERY: Final = {CommandCode.STARTUP, CommandCode.SHUTDOWN}
_FORM: Final = "write COMMAND[:N[+|-M]]=ACTION, as in PCR_Extend:2=retry"
_ACTIONS: Final = (
    "it takes a response code's name, rc:NUMBER, delay:NUMBERms, failure-mode, reset or power-cut, "
    f"and for store {', '.join(_ERRORS)}"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The command is not run, and answered with this response code."""

    code: int


@dataclass(frozen=True, slots=True)
class Delay:
    """The command is run so many seconds later, unless it is cancelled meanwhile."""

    seconds: float


@dataclass(frozen=True, slots=True)
class FailureMode:
    """The TPM is in failure mode from this command on."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Power is cut before the command, and comes back; `started`: by firmware, which sends TPM2_Startup(CLEAR)."""

    started: bool


@dataclass(frozen=True, slots=True)
class WriteError:
    """State is not written; `number` is the errno."""

    number: int


Action = Answer | Delay | FailureMode | Reset | WriteError


@dataclass(frozen=True, slots=True)
class Fault:
    """One action, and what brings it about."""

    text: str
    """As it was written."""
    target: int | Literal["*", "store"]
    """A command code, every command, or a write of state."""
    action: Action
    first: int = 1
    last: int | None = None
    """None is for ever."""

    def concerns(self, code: int) -> bool:
        """Whether a command of this code counts."""
        return code not in _NOT_EVERY if self.target == "*" else self.target == code


def parse_faults(text: str, source: str) -> tuple[Fault, ...]:
    """Faults as they are written. `source` goes into errors: an option, or a file. Raises UsageError with the line."""
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("#"):
            continue
        for piece in filter(None, map(str.strip, line.split(";"))):
            faults.append(_parse_fault(piece, f"{source}, line {number}" if "\n" in text else source))
    return tuple(faults)


def _parse_fault(text: str, where: str) -> Fault:
    match = _FAULT.fullmatch(text)
    if match is None:
        raise UsageError(f"{where}: {text!r} is no fault", _FORM)
    first = int(match["first"] or 1)
    last = None if match["on"] or not match["first"] else int(match["last"] or first)
    if first < 1 or (last is not None and last < first):
        raise UsageError(f"{where}: {text!r} never happens", "count from 1, and upwards")
    target = _parse_target(match["target"], where)
    action = _parse_action(match["action"], where)
    if isinstance(action, WriteError) != (target == "store"):
        raise UsageError(f"{where}: {text!r} cannot be", f"store takes {', '.join(_ERRORS)}, and commands the rest")
    return Fault(text, target, action, first, last)


def _parse_target(text: str, where: str) -> int | Literal["*", "store"]:
    if text == "store":
        return "store"
    if text == "*":
        return "*"
    code = _number(text) if text[:2].lower() == "0x" else command_named(text)
    if code is None:
        raise UsageError(f"{where}: there is no TPM command {text!r}", "name it as in TPM 2.0 Part 3, as in NV_Write")
    return code


def _parse_action(text: str, where: str) -> Action:
    kind, _, value = text.partition(":")
    match kind:
        case "failure-mode" if not value:
            return FailureMode()
        case "reset" | "power-cut" if not value:
            return Reset(started=kind == "reset")
        case "delay" if match := _DELAY.fullmatch(value):
            seconds = float(match[1]) / (1000 if match[2] == "ms" else 1)
            if seconds > MAX_DELAY:
                raise UsageError(f"{where}: {text!r} is too long", f"delay by at most {MAX_DELAY:.0f} s")
            return Delay(seconds)
        case "rc" if (code := _number(value)) is not None and code > 0:
            return Answer(code)
    if text in _ERRORS:
        return WriteError(_ERRORS[text])
    code = response_named(text)
    if code is None:
        raise UsageError(f"{where}: there is no action {text!r}", _ACTIONS)
    return Answer(code)


def _number(text: str) -> int | None:
    """A 32-bit number, decimal or 0x…; None if it is none."""
    try:
        number = int(text, 0)
    except ValueError:
        return None
    return number if 0 <= number < 1 << 32 else None


class FaultPlan:
    """The faults in force, and how often what brings them about has happened. Any thread."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self.replace(faults)

    def replace(self, faults: Sequence[Fault]) -> None:
        """These faults from now on; everything is counted anew."""
        with self._lock:
            self._faults = tuple(faults)
            self._seen = [0] * len(self._faults)
            self._struck = 0

    @property
    def struck(self) -> int:
        """How many times a fault has struck since they were set."""
        with self._lock:
            return self._struck

    def of_command(self, code: int) -> tuple[Fault, ...]:
        """What happens to a command of this code, which is counted, in the order it was written."""
        return self._due([fault.concerns(code) for fault in self._faults])

    def of_store(self) -> WriteError | None:
        """What happens to a write of state, which is counted."""
        due = self._due([fault.target == "store" for fault in self._faults])
        return next((fault.action for fault in due if isinstance(fault.action, WriteError)), None)

    def _due(self, concerned: Sequence[bool]) -> tuple[Fault, ...]:
        with self._lock:
            due = []
            for index, (fault, counts) in enumerate(zip(self._faults, concerned, strict=True)):
                if counts:
                    self._seen[index] += 1
                    if fault.first <= self._seen[index] and (fault.last is None or self._seen[index] <= fault.last):
                        due.append(fault)
            self._struck += len(due)
            return tuple(due)
