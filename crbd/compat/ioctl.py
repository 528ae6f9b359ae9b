"""`swtpm_ioctl`: one request to a TPM's control channel, from a shell.

Options, output, messages and exit status are those of swtpm's own (its manual page, and Debian's 0.7.1 as the oracle);
docs/swtpm-differences.md lists where it is better to differ. Sending ioctls to a character device (swtpm_cuse) is not
offered: every device is refused as swtpm_ioctl refuses one that is no TPM.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from crbd.compat import ioctl_commands as commands
from crbd.compat.ioctl_connection import ControlClient, connect_tcp, connect_unix
from crbd.compat.ioctl_options import Arguments, Complaint, Operand, Option, tcp_address
from crbd.errors import DaemonError, OperatorError, UsageError

DEFAULT_PORT: Final = 6546
TARGETS: Final = ("tpm-device", "tcp", "unix")
WITH_VALUE: Final = frozenset((*TARGETS, "r", "l", "h", "b", "save", "load", "info", "lock-storage"))
# In the order of swtpm's, which the message about an ambiguous short form shows.
OPTIONS: Final = "tpm-device tcp unix c i stop s e r v C l h g b save load version info lock-storage help"
NAMES: Final = {name: name in WITH_VALUE for name in OPTIONS.split()}
"""Every option, and whether it takes a value."""


@dataclass(slots=True)
class CommandLine:
    """What was asked for."""

    command: str = ""
    """The request's name in swtpm's words."""
    action: commands.Action | None = None
    targets: dict[str, str] = field(default_factory=dict)
    """Where the TPM is, by option; the last of each counts."""
    operands: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 1 with the reason on stderr."""
    arguments = Arguments(sys.argv[1:] if argv is None else argv, NAMES)
    line = CommandLine()
    try:
        for argument in arguments:
            match argument:
                case Complaint(text):
                    print(f"swtpm_ioctl: {text}", file=sys.stderr)
                case Operand(value):
                    line.operands.append(value)
                case Option("version" | "help" as name):
                    sys.stdout.write(commands.VERSION if name == "version" else commands.HELP)
                    return 0
                case Option(name, _, value) if name in TARGETS:
                    if name == "tcp":
                        tcp_address(value, DEFAULT_PORT)
                    line.targets[name] = value
                case option:
                    _take_command(line, option, arguments)
        return _run(line)
    except OperatorError as error:
        print(error, file=sys.stderr)
        return 1


def _take_command(line: CommandLine, option: Option, arguments: Arguments) -> None:
    """The option names a command. Raises UsageError for a value that cannot be one, and for a second command."""
    if "=" in option.written:
        # swtpm_ioctl takes the whole argument for the value then, and so does not understand it.
        option = replace(option, value=option.written)
    action = commands.action(option, arguments)
    dashes = "-" if len(option.name) == 1 else "--"
    if option.written != dashes + option.name:
        action = commands.show_help
    if line.action is not None:
        raise UsageError("Only one command may be given.")
    line.action = action
    line.command = commands.NAMES[option.name]


def _run(line: CommandLine) -> int:
    if line.action is None:
        raise UsageError("No valid command.")
    if not line.targets:
        if not line.operands:
            raise UsageError("Error: Missing device name.")
        line.targets["tpm-device"] = line.operands[0]
    with ControlClient(_connect(line)) as client:
        return line.action(client)


def _connect(line: CommandLine) -> socket.socket:
    """A device goes before a TCP port and that before a UNIX socket. Raises OperatorError."""
    if "tpm-device" in line.targets:
        raise _refuse_device(line.targets["tpm-device"], line.command)
    if "tcp" in line.targets:
        host, port = tcp_address(line.targets["tcp"], DEFAULT_PORT)
        try:
            return connect_tcp(host, port)
        except socket.gaierror as error:
            raise UsageError(f"getaddrinfo failed on host '{host}': {error.strerror}") from error
        except OSError as error:
            reason = f"using TCP socket: {error.strerror}"
            raise DaemonError(f"Could not connect to host '{host}' on port '{port}' {reason}") from error
    try:
        return connect_unix(line.targets["unix"])
    except OSError as error:
        raise DaemonError(f"Connect failed: {error.strerror}") from error


def _refuse_device(path: str, command: str) -> OperatorError:
    """The error for a device: it cannot be opened, or it is no TPM emulator. Nothing is written to it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError:
        return UsageError(f"Unable to open device '{path}'.")
    return UsageError(f"Could not execute {command}: {os.strerror(errno.ENOTTY)}")
