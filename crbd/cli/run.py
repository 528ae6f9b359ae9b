"""`crbd run -- COMMAND`: a command with a TPM of its own, which is gone when the command has ended.

Theory. Three processes: this one keeps the TPM (crbd.testing) and the command. The TPM is this process forked, before
anything is started in it; the command is started when the TPM can be talked to. This process then does nothing but
wait: for signals, which it passes on, and for its children.

A signal that a terminal sends (Ctrl-C) goes to the command too, without our doing; one that another process sends
comes to this process alone. The kernel says who sent it, and only the second kind is passed on. So the command gets
each once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from crbd.cli import faults
from crbd.errors import UsageError
from crbd.testing import leash as leashes
from crbd.testing import places
from crbd.testing.serving import be_a_tpm
from crbd.testing.tpm import Leash

DESCRIPTION = """Run a command with a new TPM that only it uses: TPM2TOOLS_TCTI and the variables that other software
reads (docs/ci.md) name it. Ends with the command's status, or 128 + N where signal N ended it, and the TPM ends with
it; 127 if there is no such command, 126 if it cannot be run. What crbd itself cannot do has the statuses of
docs/exit-codes.md."""

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""As shells and env(1) have them."""
_SI_KERNEL: Final = 0x80
"""siginfo_t's si_code of a signal from the kernel, such as a terminal's (sigaction(2))."""
_PASSED_ON: Final = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH}
)
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `crbd run`."""
    faults.add_option(parser)
    parser.add_argument(
        "--libtpms", metavar="FILE", help="the libtpms library to load (default: libtpms.so.0 of the system)"
    )
    parser.add_argument("command", metavar="-- COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its status. Raises OperatorError where there is no TPM for it."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UsageError("there is no command to run", "write crbd run -- COMMAND")
    planned = None if arguments.faults is None else faults.checked(arguments.faults)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    place = places.private_directory()
    leash, tpm = _fork(place, arguments.libtpms, before)
    try:
        leash.wait_until_ready()
        if planned is not None:
            leash.ask(faults=planned)
        environment = os.environ | places.environment(place, os.environ)
        return _attend(command, environment, tpm, before)
    finally:
        leash.let_go()
        shutil.rmtree(place, ignore_errors=True)


def _fork(place: Path, library: str | None, mask: set[int]) -> tuple[Leash, int]:
    """The TPM: its leash and its process."""
    ours, theirs = leashes.pair()
    process = os.fork()
    if process == 0:
        ours.close()
        _become(place, theirs, library, mask)
    theirs.close()
    return Leash(ours), process


def _become(place: Path, leash: socket.socket, library: str | None, mask: set[int]) -> NoReturn:
    """In the forked process: never back into the frames of this one."""
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = be_a_tpm(place, leash, library)
    finally:
        if error := sys.exception():
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(status)


def _attend(command: list[str], environment: Mapping[str, str], tpm: int, mask: set[int]) -> int:
    """Start the command, pass signals on to it, and return its status."""
    try:
        process = os.posix_spawnp(command[0], command, environment, setsigmask=mask, setsigdef=_IGNORED_BY_PYTHON)
    except FileNotFoundError:
        print(f"crbd: {command[0]}: there is no such command", file=sys.stderr)
        return NOT_FOUND
    except OSError as error:
        print(f"crbd: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_EXECUTABLE
    while True:
        information = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
        if information.si_signo != signal.SIGCHLD:
            if information.si_code != _SI_KERNEL:
                os.kill(process, information.si_signo)
            continue
        ended = dict(_ended())
        if process in ended:
            code = ended[process]
            return code if code >= 0 else 128 - code
        if tpm in ended:
            print("crbd: the TPM has ended before the command", file=sys.stderr)


def _ended() -> Iterator[tuple[int, int]]:
    """Children that have ended, with their status, or minus a signal's number.

    Others' too: in a container this may be the process that orphans fall to.
    """
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])
