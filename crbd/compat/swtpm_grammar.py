"""swtpm's option grammar: getopt_long, and below it `name=value,name,name={…}`.

    --key value, --key=value, --ke value (a name may be cut short where it stays unique), -p 2321, -p2321
    dir=/tmp,mode=0640,lock           a name alone means true
    profile={"Name":"a,b"},fd=3       a value that begins with a brace ends at the brace that closes it

The first of two values of one name counts. The words of every complaint are the ones that swtpm and glibc use, for
programs and people that look for them (swtpm 0.11: options.c; getopt_long(3)).
"""

from __future__ import annotations

import getopt
import grp
import pwd
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from crbd.errors import UsageError

_INT_MAX = 2**31 - 1
_UINT_MAX = 2**32 - 1


class Kind(Enum):
    """What a value is."""

    STRING = "string"
    INT = "int"
    UINT = "uint"
    BOOLEAN = "boolean"
    MODE = "mode"
    UID = "uid"
    GID = "gid"


class GetoptError(UsageError):
    """An option that is not known, is ambiguous, or lacks its value: swtpm prints its help besides."""


Table = Mapping[str, Kind]
Value = str | int | bool


class Values:
    """What a value of the command line said; `of` tells which option it stood at."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        """Whether it was given at all."""
        return name in self._values

    def string(self, name: str) -> str | None:
        """The text behind `name=`; None where it was not given."""
        value = self._values.get(name)
        return value if isinstance(value, str) else None

    def number(self, name: str) -> int | None:
        """The number, file mode or numeric id behind `name=`; None where it was not given."""
        value = self._values.get(name)
        return value if isinstance(value, int) else None

    def descriptor(self, name: str) -> int | None:
        """The descriptor behind `name=`; a negative one counts as none."""
        value = self.number(name)
        return None if value is None or value < 0 else value

    def flag(self, name: str, default: bool = False) -> bool:
        """Whether `name`, `name=true` or `name=1` was given."""
        return bool(self._values.get(name, default))


def parse_values(text: str, table: Table, what: str) -> Values:
    """The value of one option, by the table of its names. `what` is how swtpm calls the option in its complaint.

    Raises UsageError.
    """
    values: dict[str, Value] = {}
    try:
        for token in _tokens(text):
            name, equals, value = token.partition("=")
            # swtpm takes an empty value for no value at all, and then does not know the name with its sign.
            if name not in table or (equals and not value):
                raise _ComplaintError(f"Unknown option '{token}'")
            converted = _CONVERTERS[table[name]](value if equals else "true")
            values.setdefault(name, converted)
    except _ComplaintError as complaint:
        raise UsageError(f"Error parsing {what} options: {complaint}") from None
    return Values(values)


def parse_arguments(
    arguments: Sequence[str], short: str, long: Sequence[str], program: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Options in their order, by their whole name with its dashes, and what is no option.

    `short` and `long` are as for getopt.gnu_getopt. Raises GetoptError with what glibc would print, `program` in front.
    """
    try:
        return getopt.gnu_getopt(list(arguments), short, list(long))
    except getopt.GetoptError as error:
        raise GetoptError(f"{program}: {_as_glibc(error, long)}") from None


class _ComplaintError(Exception):
    """What is wrong with a value, in swtpm's words."""


def _as_glibc(error: getopt.GetoptError, long: Sequence[str]) -> str:
    name = error.opt
    if "not a unique prefix" in error.msg:
        names = " ".join(f"'--{known.rstrip('=')}'" for known in long if known.startswith(name))
        return f"option '--{name}' is ambiguous; possibilities: {names}"
    if "must not have an argument" in error.msg:
        return f"option '--{name}' doesn't allow an argument"
    is_short = error.msg.startswith(f"option -{name} ")
    if "requires argument" in error.msg:
        return f"option requires an argument -- '{name}'" if is_short else f"option '--{name}' requires an argument"
    return f"invalid option -- '{name}'" if is_short else f"unrecognized option '--{name}'"


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    rest: str | None = text
    while rest is not None:
        match = re.match(r"[^,=]*=\{", rest)
        if match is None:
            token, comma, behind = rest.partition(",")
        else:
            end = _end_of_map(rest, match.end())
            token, comma, behind = rest[:end], rest[end : end + 1], rest[end + 1 :]
            if comma not in ("", ","):
                raise _ComplaintError("Unexpected character following JSON map.")
        tokens.append(token)
        rest = behind if comma else None
    return tokens


def _end_of_map(text: str, inside: int) -> int:
    depth = 1
    for at in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise _ComplaintError("Unterminated JSON map.")


def _integer(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?[0-9]+", text):
        raise _ComplaintError(f"invalid number '{text}'")
    value = int(text)
    if not -_INT_MAX - 1 <= value <= _INT_MAX:
        raise _ComplaintError(f"number {value} outside valid range")
    return value


def _refuse_negative(text: str) -> None:
    if text.lstrip().startswith("-"):
        raise _ComplaintError(f"invalid required positive number '{text}'")


def _unsigned(text: str) -> int:
    _refuse_negative(text)
    if not re.fullmatch(r"\s*\+?[0-9]+", text):
        raise _ComplaintError(f"invalid number '{text}'")
    value = int(text)
    if value > _UINT_MAX:
        raise _ComplaintError(f"number {value} outside valid range")
    return value


def _mode(text: str) -> int:
    _refuse_negative(text)
    if not re.fullmatch(r"\s*\+?[0-7]+", text):
        raise _ComplaintError(f"invalid mode type '{text}'")
    value = int(text, 8)
    if value > 0o777:
        raise _ComplaintError(f"mode {text} is invalid")
    return value


def _owner(kind: str, word: str, look_up: Callable[[str], int]) -> Callable[[str], int]:
    def convert(text: str) -> int:
        _refuse_negative(text)
        if re.fullmatch(r"\s*\+?[0-9]+", text):
            if int(text) > _UINT_MAX:
                raise _ComplaintError(f"{kind} {text} outside valid range")
            return int(text)
        try:
            return look_up(text)
        except KeyError:
            raise _ComplaintError(f"{word} '{text}' does not exist.") from None

    return convert


_CONVERTERS: Mapping[Kind, Callable[[str], Value]] = {
    Kind.STRING: str,
    Kind.INT: _integer,
    Kind.UINT: _unsigned,
    Kind.BOOLEAN: lambda text: text.lower() in ("true", "1"),
    Kind.MODE: _mode,
    Kind.UID: _owner("uid", "User", lambda name: pwd.getpwnam(name).pw_uid),
    Kind.GID: _owner("gid", "Group", lambda name: grp.getgrnam(name).gr_gid),
}
