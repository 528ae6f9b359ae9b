"""Long options with one dash or two, as swtpm_ioctl and swtpm_bios take them.

They parse with glibc's getopt_long_only(3) and no short options: every argument that begins with a dash, and is more
than that dash, is an option. Its name may be cut short where that stays unique. Its value follows in the same argument
behind `=` or in the next one. Everything else is an operand, wherever it stands; a `--` ends the options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from crbd.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """An option as it was found. `written` is the argument that named it, dashes, abbreviation, `=` and all."""

    name: str
    written: str
    value: str


@dataclass(frozen=True, slots=True)
class Operand:
    """An argument that is no option."""

    value: str


@dataclass(frozen=True, slots=True)
class Complaint:
    """An option that is unknown, ambiguous, or has a value too few or too many. `text` is what glibc says of it."""

    text: str


Argument = Option | Operand | Complaint


class Arguments(Iterator[Argument]):
    """The arguments one by one. `names` tells of each option whether it takes a value.

    `take` hands out the argument behind the one that was returned last, for an option with more than one value.
    """

    def __init__(self, arguments: Sequence[str], names: Mapping[str, bool]) -> None:
        self._arguments = list(arguments)
        self._names = names
        self._next = 0
        self._options_over = False

    def __next__(self) -> Argument:
        argument = self.take()
        if argument is None:
            raise StopIteration
        if not self._options_over and argument == "--":
            self._options_over = True
            return next(self)
        if self._options_over or argument == "-" or not argument.startswith("-"):
            return Operand(argument)
        return self._option(argument)

    def peek(self) -> str | None:
        """The argument that comes next, None at the end."""
        return self._arguments[self._next] if self._next < len(self._arguments) else None

    def take(self) -> str | None:
        """The argument that comes next, whatever it is, None at the end; it is used up."""
        argument = self.peek()
        if argument is not None:
            self._next += 1
        return argument

    def _option(self, argument: str) -> Option | Complaint:
        dashes = "--" if argument.startswith("--") else "-"
        written, equals, value = argument[len(dashes) :].partition("=")
        fitting = [written] if written in self._names else [name for name in self._names if name.startswith(written)]
        if not fitting:
            return Complaint(f"unrecognized option '{argument}'")
        if len(fitting) > 1:
            possible = " ".join(f"'{dashes}{name}'" for name in fitting)
            return Complaint(f"option '{argument}' is ambiguous; possibilities: {possible}")
        name = fitting[0]
        if not self._names[name]:
            if equals:
                return Complaint(f"option '{dashes}{name}' doesn't allow an argument")
            return Option(name, argument, "")
        if equals:
            return Option(name, argument, value)
        following = self.take()
        if following is None:
            return Complaint(f"option '{dashes}{name}' requires an argument")
        return Option(name, argument, following)


def unsigned(text: str) -> int | None:
    """The 32-bit number that sscanf's `%u` finds at the beginning of `text`; None where there is none.

    Blanks before and anything behind are skipped; a minus sign wraps around; what is too large becomes the largest.
    """
    found = _NUMBER.match(text)
    if found is None:
        return None
    sign, digits = found.groups()
    if len(digits) > _LONGEST or int(digits) > _LARGEST_LONG:
        return 0xFFFFFFFF
    return (-int(digits) if sign == "-" else int(digits)) & 0xFFFFFFFF


def tcp_address(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of `[HOST][:[PORT]]`; the host is 127.0.0.1 unless it is named. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, default_port
    if not host and not port:
        return "127.0.0.1", default_port
    number = unsigned(port)
    if number is None:
        raise UsageError(f"Invalid port '{port}'")
    if number > 0xFFFF:
        raise UsageError(f"Port '{port}' outside valid range.")
    return host or "127.0.0.1", number


_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]+)", re.ASCII)
_LARGEST_LONG = (1 << 64) - 1
_LONGEST = len(str(_LARGEST_LONG))
