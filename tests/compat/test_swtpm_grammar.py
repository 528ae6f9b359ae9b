"""swtpm's option grammar: what every text comes to, and every complaint."""

from __future__ import annotations

import os

import pytest

from crbd.compat.swtpm_grammar import GetoptError, Kind, parse_arguments, parse_values
from crbd.errors import UsageError

TABLE = {
    "text": Kind.STRING,
    "fd": Kind.INT,
    "level": Kind.UINT,
    "lock": Kind.BOOLEAN,
    "mode": Kind.MODE,
    "uid": Kind.UID,
    "gid": Kind.GID,
}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("text=/tmp/a b", "text", "/tmp/a b"),
        ("text=a=b", "text", "a=b"),
        ("text=one,text=two", "text", "one"),
        ('text={"a":{"b":[1,2]},"c":3},fd=4', "text", '{"a":{"b":[1,2]},"c":3}'),
        ('lock,text={"a":1}', "text", '{"a":1}'),
        ("text=a{b,fd=3", "text", "a{b"),
        ("fd=-1", "fd", -1),
        ("fd= 7", "fd", 7),
        ("fd=2147483647", "fd", 2147483647),
        ("level=4294967295", "level", 4294967295),
        ("mode=0640", "mode", 0o640),
        ("mode=777", "mode", 0o777),
        ("uid=4294967295", "uid", 4294967295),
        ("uid=root", "uid", 0),
        ("gid=root", "gid", 0),
        ("fd=3,lock,mode=0600", "mode", 0o600),
    ],
)
def test_values(text: str, name: str, value: str | int) -> None:
    values = parse_values(text, TABLE, "log")
    assert (values.string(name) if isinstance(value, str) else values.number(name)) == value
    assert name in values
    assert "nothing" not in values


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("lock", True),
        ("lock=true", True),
        ("lock=TRUE", True),
        ("lock=1", True),
        ("lock=false", False),
        ("lock=yes", False),
        ("lock=false,lock=true", False),
        ("fd=1", False),
    ],
)
def test_flags(text: str, flag: bool) -> None:
    assert parse_values(text, TABLE, "log").flag("lock") is flag


def test_a_negative_descriptor_is_none() -> None:
    values = parse_values("fd=-1", TABLE, "log")
    assert values.descriptor("fd") is None
    assert values.number("fd") == -1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Unknown option ''"),
        ("foo", "Unknown option 'foo'"),
        ("foo=1", "Unknown option 'foo=1'"),
        ("lock,", "Unknown option ''"),
        ("text=", "Unknown option 'text='"),
        ("fd", "invalid number 'true'"),
        ("fd=x", "invalid number 'x'"),
        ("fd=3x", "invalid number '3x'"),
        ("fd=2147483648", "number 2147483648 outside valid range"),
        ("level=-1", "invalid required positive number '-1'"),
        ("level=4294967296", "number 4294967296 outside valid range"),
        ("mode=9", "invalid mode type '9'"),
        ("mode=-1", "invalid required positive number '-1'"),
        ("mode=1000", "mode 1000 is invalid"),
        ("uid=4294967296", "uid 4294967296 outside valid range"),
        ("uid=nosuchuser", "User 'nosuchuser' does not exist."),
        ("gid=nosuchgroup", "Group 'nosuchgroup' does not exist."),
        ('text={"a":1', "Unterminated JSON map."),
        ('text={"a":1}x', "Unexpected character following JSON map."),
    ],
)
def test_complaints(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_values(text, TABLE, "log")
    assert str(caught.value) == f"Error parsing log options: {complaint}"


LONG = ("print-states", "print-info=", "port=", "pid=", "daemon")


def test_options_in_every_form() -> None:
    options, rest = parse_arguments(["--po", "1", "-p2", "rest", "--port=3", "-d", "--dae"], "dp:", LONG, "socket")
    assert options == [("--port", "1"), ("-p", "2"), ("--port", "3"), ("-d", ""), ("--daemon", "")]
    assert rest == ["rest"]
    assert parse_arguments(["--", "-d"], "d", LONG, "socket") == ([], ["-d"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--foo"], "socket: unrecognized option '--foo'"),
        (["-x"], "socket: invalid option -- 'x'"),
        (["-p"], "socket: option requires an argument -- 'p'"),
        (["--port"], "socket: option '--port' requires an argument"),
        (["--daemon=1"], "socket: option '--daemon' doesn't allow an argument"),
        (["--print"], "socket: option '--print' is ambiguous; possibilities: '--print-states' '--print-info'"),
    ],
)
def test_getopt_complaints(arguments: list[str], complaint: str) -> None:
    assert "POSIXLY_CORRECT" not in os.environ
    with pytest.raises(GetoptError) as caught:
        parse_arguments(arguments, "dp:", LONG, "socket")
    assert str(caught.value) == complaint
