"""The command line grammar of swtpm_ioctl and swtpm_bios, without a TPM."""

from __future__ import annotations

import pytest

from crbd.compat.ioctl_options import Argument, Arguments, Complaint, Operand, Option, tcp_address, unsigned
from crbd.errors import UsageError

NAMES = {"tpm-device": True, "tcp": True, "tpm2": False, "c": False, "cs": False, "h": True, "stop": False}

LINES: list[tuple[list[str], list[Argument]]] = [
    (["-c", "--c"], [Option("c", "-c", ""), Option("c", "--c", "")]),
    (["-cs"], [Option("cs", "-cs", "")]),
    (["--sto"], [Option("stop", "--sto", "")]),
    (["-h", "-c"], [Option("h", "-h", "-c")]),
    (["-h="], [Option("h", "-h=", "")]),
    (["--tcp=a=b", "x"], [Option("tcp", "--tcp=a=b", "a=b"), Operand("x")]),
    (["x", "-c", "y"], [Operand("x"), Option("c", "-c", ""), Operand("y")]),
    (["-", "--", "-c", "--"], [Operand("-"), Operand("-c"), Operand("--")]),
    (["--foo=x", "-c"], [Complaint("unrecognized option '--foo=x'"), Option("c", "-c", "")]),
    (["-x"], [Complaint("unrecognized option '-x'")]),
    (["-c=1"], [Complaint("option '-c' doesn't allow an argument")]),
    (["--tc"], [Complaint("option '--tcp' requires an argument")]),
    (
        ["--t=x"],
        [Complaint("option '--t=x' is ambiguous; possibilities: '--tpm-device' '--tcp' '--tpm2'")],
    ),
    (["-tp"], [Complaint("option '-tp' is ambiguous; possibilities: '-tpm-device' '-tpm2'")]),
    ([], []),
]


@pytest.mark.parametrize(("line", "expected"), LINES, ids=lambda value: " ".join(map(str, value)) or "none")
def test_arguments(line: list[str], expected: list[Argument]) -> None:
    assert list(Arguments(line, NAMES)) == expected


def test_a_second_value_is_taken_by_the_caller() -> None:
    arguments = Arguments(["-h", "a", "b", "-c"], NAMES)
    assert next(arguments) == Option("h", "-h", "a")
    assert arguments.peek() == "b"
    assert arguments.take() == "b"
    assert list(arguments) == [Option("c", "-c", "")]
    assert arguments.peek() is None
    assert arguments.take() is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        (" 12abc", 12),
        ("007", 7),
        ("+3", 3),
        ("-1", 0xFFFFFFFF),
        ("4294967296", 0),
        ("99999999999999999999", 0xFFFFFFFF),
        ("9" * 5000, 0xFFFFFFFF),
        ("", None),
        ("x", None),
        ("- 1", None),
        ("٣", None),
    ],
)
def test_unsigned(text: str, number: int | None) -> None:
    assert unsigned(text) == number


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", ("host", 7)),
        ("host:1", ("host", 1)),
        (":1", ("127.0.0.1", 1)),
        (":", ("127.0.0.1", 7)),
        ("::1:65535", ("::1", 65535)),
        ("", ("", 7)),
    ],
)
def test_tcp_addresses(text: str, address: tuple[str, int]) -> None:
    assert tcp_address(text, 7) == address


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("host:", "Invalid port ''"),
        (":x", "Invalid port 'x'"),
        ("host:65536", "Port '65536' outside valid range."),
        ("host:-1", "Port '-1' outside valid range."),
    ],
)
def test_addresses_that_cannot_be(text: str, error: str) -> None:
    with pytest.raises(UsageError) as caught:
        tcp_address(text, 7)
    assert str(caught.value) == error
