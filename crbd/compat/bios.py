"""`swtpm_bios`: the commands that a firmware sends to a TPM when a machine starts.

Options, output, messages and exit status are those of swtpm's own (its manual page, and Debian's 0.7.1 as the oracle);
docs/swtpm-differences.md lists where it is better to differ. The TPM is one behind a data channel (UNIX socket or TCP)
or a device of the kernel; the sequence is that of a TPM 1.2 unless --tpm2 is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from crbd.compat.bios_connection import DEFAULT_PORT, Device, Target, Tcp, Unix, talk, target_of
from crbd.compat.bios_sequence import PASSWORD_SIZE, Startup, Wanted, is_deactivated, tpm2_steps, tpm12_steps
from crbd.compat.ioctl_options import Arguments, Complaint, Operand, Option, tcp_address
from crbd.errors import DaemonError, UsageError
from crbd.tpm.head import response_code

TPM_REFUSED: Final = 128
NEEDS_RESET: Final = 129
NO_CONNECTION: Final = 255

VERSION: Final = "TPM emulator BIOS emulator version 0.11.0, of crbd\n"
HELP: Final = (
    VERSION
    + f"""
swtpm_bios [options]

Sends what a machine's firmware sends to its TPM: startup, and to a TPM 1.2
physical presence, enable and activate.

Where the TPM is:
\t--tpm-device <device>  a TPM device; default is $TPM_DEVICE or /dev/tpm0
\t--tcp [<host>]:[<prt>] data channel at a TCP port;
\t                       default is 127.0.0.1:{DEFAULT_PORT}
\t--unix <path>          data channel at a UNIX socket
\t--tpm2                 it is a TPM 2.0

What is sent:
\t-c                     startup CLEAR (default)
\t-s                     startup STATE
\t-d                     startup DEACTIVATED, and no more; none to a TPM 2.0
\t-n                     no startup
\t-o                     startup, and no more
\t-cs                    a self-test: ContinueSelfTest to a TPM 1.2,
\t                       IncrementalSelfTest to a TPM 2.0
\t-ea                    make sure that the TPM 1.2 is active; exit status
\t                       129 if that needs a reset
\t-u                     at the end give up physical presence (TPM 1.2), or
\t                       give the platform hierarchy a random password
\t-v                     show the version
\t-h                     show this
"""
)

# In the order of swtpm's, which the message about an ambiguous short form shows.
OPTIONS: Final = "tpm-device tcp unix c d h v n s o cs ea u tpm2"
NAMES: Final = {name: name in ("tpm-device", "tcp", "unix") for name in OPTIONS.split()}
"""Every option, and whether it takes a value."""

STARTUPS: Final = {"c": Startup.CLEAR, "s": Startup.STATE, "n": Startup.NONE}


@dataclass(slots=True)
class CommandLine:
    """What was asked for."""

    wanted: Wanted = field(default_factory=Wanted)
    tpm2: bool = False
    targets: dict[str, Target] = field(default_factory=dict)
    """By option; the last of each counts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status.

    0: all commands succeeded; 128: the TPM refused one; 129: it needs a reset; 255: it cannot be talked to; 1: wrong
    options.
    """
    line = CommandLine()
    try:
        for argument in Arguments(sys.argv[1:] if argv is None else argv, NAMES):
            match argument:
                case Complaint(text):
                    print(f"swtpm_bios: {text}", file=sys.stderr)
                    sys.stdout.write(HELP)
                    return 1
                case Operand():
                    pass
                case Option("v" | "h" as name):
                    sys.stdout.write(VERSION if name == "v" else HELP)
                    return 0
                case Option(name, _, value):
                    _take(line, name, value)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        return _run(line)
    except (DaemonError, UsageError) as error:
        print(error, file=sys.stderr)
        return NO_CONNECTION


def _take(line: CommandLine, name: str, value: str) -> None:
    """One option. Raises UsageError for a TCP address that cannot be one."""
    match name:
        case "tpm-device":
            line.targets[name] = Device(value)
        case "tcp":
            line.targets[name] = Tcp(*tcp_address(value, DEFAULT_PORT))
        case "unix":
            line.targets[name] = Unix(value)
        case "tpm2":
            line.tpm2 = True
        case "d":
            line.wanted = replace(line.wanted, startup=Startup.DEACTIVATED, more=False)
        case "o":
            line.wanted = replace(line.wanted, more=False)
        case "cs":
            line.wanted = replace(line.wanted, self_test=True)
        case "ea":
            line.wanted = replace(line.wanted, ensure_activated=True)
        case "u":
            line.wanted = replace(line.wanted, give_up=True)
        case startup:
            # As with swtpm's, a startup option behind -o takes it back.
            line.wanted = replace(line.wanted, startup=STARTUPS[startup], more=True)


def _run(line: CommandLine) -> int:
    """Send the sequence to its end, or to where the TPM turns out to need a reset. Raises DaemonError, UsageError."""
    target = next((line.targets[name] for name in NAMES if name in line.targets), None) or target_of(os.environ)
    steps = tpm2_steps(line.wanted, os.urandom(PASSWORD_SIZE)) if line.tpm2 else tpm12_steps(line.wanted)
    # swtpm_bios tells of a TPM 1.2's refusals on stderr and of a TPM 2.0's on stdout.
    out = sys.stdout if line.tpm2 else sys.stderr
    status = 0
    deactivated = False
    for step in steps:
        response = talk(target, step.command, step.seconds)
        code = response_code(response)
        if code:
            status = TPM_REFUSED
            print(f"{step.name} returned error code 0x{code:08x}", file=out)
        elif step.tells_flags:
            deactivated = is_deactivated(response)
        if deactivated and step.activates:
            print("TPM requires a reset")
            return NEEDS_RESET
    return status
