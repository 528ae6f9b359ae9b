"""The command line of `swtpm socket`, as of swtpm 0.11: every option, and the values that they come to.

Whatever is wrong with it is said in swtpm's own words (swtpm.c, common.c). What swtpm was built without it does not
know either; here that is TPM 1.2 and, with libtpms before 0.10, profiles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from crbd.compat.swtpm_grammar import Kind, Table, Values, parse_arguments, parse_values
from crbd.errors import UsageError

SHORT = "dhp:f:tr:R:"
LONG = (
    "daemon",
    "help",
    "port=",
    "fd=",
    "server=",
    "runas=",
    "chroot=",
    "terminate",
    "locality=",
    "log=",
    "key=",
    "migration-key=",
    "pid=",
    "tpmstate=",
    "ctrl=",
    "flags=",
    "tpm2",
    "seccomp=",
    "migration=",
    "print-capabilities",
    "print-states",
    "profile=",
    "print-profiles",
    "print-info=",
    "pcap=",
)
_FULL_NAMES = {"-d": "--daemon", "-h": "--help", "-p": "--port", "-f": "--fd", "-t": "--terminate", "-r": "--runas"}
_FULL_NAMES["-R"] = "--chroot"

_SOCKET: Table = {
    "type": Kind.STRING,
    "path": Kind.STRING,
    "port": Kind.INT,
    "bindaddr": Kind.STRING,
    "ifname": Kind.STRING,
    "fd": Kind.INT,
    "mode": Kind.MODE,
    "uid": Kind.UID,
    "gid": Kind.GID,
}
KEY_TABLE: Table = {
    "file": Kind.STRING,
    "mode": Kind.STRING,
    "format": Kind.STRING,
    "remove": Kind.BOOLEAN,
    "pwdfile": Kind.STRING,
    "kdf": Kind.STRING,
    "fd": Kind.INT,
    "pwdfd": Kind.INT,
}
TABLES: Mapping[str, tuple[str, Table]] = {
    "--log": (
        "logging",
        {
            "file": Kind.STRING,
            "fd": Kind.INT,
            "level": Kind.UINT,
            "prefix": Kind.STRING,
            "truncate": Kind.BOOLEAN,
        },
    ),
    "--key": ("key", KEY_TABLE),
    "--migration-key": ("key", KEY_TABLE),
    "--pid": ("pid", {"file": Kind.STRING, "fd": Kind.INT}),
    "--tpmstate": (
        "tpmstate",
        {
            "dir": Kind.STRING,
            "mode": Kind.MODE,
            "backend-uri": Kind.STRING,
            "lock": Kind.BOOLEAN,
            "backup": Kind.BOOLEAN,
            "fsync": Kind.BOOLEAN,
        },
    ),
    "--ctrl": ("ctrl", {**_SOCKET, "clientfd": Kind.INT, "terminate": Kind.BOOLEAN}),
    "--server": ("server", {**_SOCKET, "disconnect": Kind.BOOLEAN}),
    "--locality": ("locality", {"reject-locality-4": Kind.BOOLEAN, "allow-set-locality": Kind.BOOLEAN}),
    "--flags": (
        "flags",
        {
            "not-need-init": Kind.BOOLEAN,
            "startup-none": Kind.BOOLEAN,
            "startup-clear": Kind.BOOLEAN,
            "startup-state": Kind.BOOLEAN,
            "startup-deactivated": Kind.BOOLEAN,
            "disable-auto-shutdown": Kind.BOOLEAN,
        },
    ),
    "--seccomp": ("seccomp", {"action": Kind.STRING}),
    "--migration": ("migration", {"incoming": Kind.BOOLEAN, "release-lock-outgoing": Kind.BOOLEAN}),
    "--profile": (
        "profile",
        {
            "name": Kind.STRING,
            "profile": Kind.STRING,
            "file": Kind.STRING,
            "fd": Kind.INT,
            "remove-disabled": Kind.STRING,
        },
    ),
    "--pcap": (
        "pcap",
        {
            "file": Kind.STRING,
            "mode": Kind.MODE,
            "fd": Kind.INT,
            "truncate": Kind.BOOLEAN,
            "checksums": Kind.BOOLEAN,
        },
    ),
}
"""By option: how swtpm calls it in complaints, and what its value may hold."""


class HelpWantedError(UsageError):
    """`--help` was met: everything after it does not count."""


@dataclass(slots=True)
class CommandLine:
    """`swtpm socket` as it was called: the switches, and the values of the other options."""

    texts: dict[str, str] = field(default_factory=dict)
    """The value of each option that takes one, by its whole name; the last one counts."""
    daemon: bool = False
    tpm2: bool = False
    terminate: bool = False
    client_fd: int | None = None
    """Of `--fd`."""
    port: int | None = None
    """Of `--port`, unless a `--server` stands behind it."""
    print_capabilities: bool = False
    print_states: bool = False
    print_profiles: bool = False
    print_info: int = 0

    def values(self, option: str) -> Values | None:
        """The value of an option in its parts; None where it was not given. Raises UsageError."""
        if option not in self.texts:
            return None
        what, table = TABLES[option]
        return parse_values(self.texts[option], table, what)


def parse(arguments: Sequence[str], program: str = "socket") -> CommandLine:
    """The options behind `swtpm socket`. Raises UsageError, HelpWantedError."""
    line = CommandLine()
    options, rest = parse_arguments(arguments, SHORT, LONG, program)
    for name, value in options:
        _take(line, _FULL_NAMES.get(name, name), value)
    if rest:
        raise UsageError(f"Unknown parameter '{rest[0]}'")
    return line


def _take(line: CommandLine, name: str, value: str) -> None:
    match name:
        case "--help":
            raise HelpWantedError("")
        case "--daemon":
            line.daemon = True
        case "--tpm2":
            line.tpm2 = True
        case "--terminate":
            line.terminate = True
        case "--print-capabilities":
            line.print_capabilities = True
        case "--print-states":
            line.print_states = True
        case "--print-profiles":
            line.print_profiles = True
        case "--print-info":
            line.print_info = _c_number(value, f"Cannot parse info value '{value}'.")
        case "--fd":
            line.client_fd = _client_fd(value)
        case "--port":
            line.port = _port(value)
            line.texts.pop("--server", None)
        case _:
            line.texts[name] = value
            if name == "--server":
                line.port = None


def _port(text: str) -> int:
    port = _c_number(text, f"Cannot parse socket port number '{text}'.")
    if port > 0xFFFF:
        raise UsageError("Port is outside valid range.")
    return port


def _client_fd(text: str) -> int:
    if not text.isdecimal() or int(text) > 2**32 - 1:
        raise UsageError("Cannot parse socket file descriptor.")
    number = int(text)
    try:
        os.fstat(number)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "Bad file descriptor"
        raise UsageError(f"Cannot stat file descriptor: {reason}") from error
    if number < 3:
        raise UsageError("Error: Cannot accept file descriptors with values 0, 1, or 2")
    return number


def _c_number(text: str, complaint: str) -> int:
    """A number as strtoul(3) with base 0 reads it, of 32 bits. Raises UsageError with the complaint."""
    converters: tuple[tuple[str, Callable[[str], int]], ...] = (
        (r"0[xX][0-9a-fA-F]+", lambda found: int(found, 16)),
        (r"0[0-7]*", lambda found: int(found, 8)),
        (r"[1-9][0-9]*", int),
    )
    for pattern, convert in converters:
        if re.fullmatch(pattern, text) and convert(text) < 2**32:
            return convert(text)
    raise UsageError(complaint)
