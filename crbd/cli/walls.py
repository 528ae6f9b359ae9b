"""The options of `crbd serve` that say who is let in, and how the daemon is walled in."""

from __future__ import annotations

import argparse
import ipaddress
import os
import pwd
import stat
from dataclasses import replace
from pathlib import Path

from crbd.errors import StateExposedError, UsageError
from crbd.server.endpoint import TcpEndpoint
from crbd.server.options import DaemonOptions
from crbd.server.seccomp import Action
from crbd.server.succession import Program
from crbd.server.walls import Walls, Wanted, places_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    access = parser.add_argument_group("access")
    access.add_argument(
        "--allow-uids", metavar="LIST", help="accept clients of these users alone on UNIX sockets: names or numbers"
    )
    access.add_argument(
        "--allow-remote",
        action="store_true",
        help="listen at TCP addresses that others than this machine reach: whoever connects has the TPM",
    )
    access.add_argument(
        "--allow-exposed-state", action="store_true", help="use state that other users of this machine may change"
    )
    walls = parser.add_argument_group("walls")
    walls.add_argument(
        "--seccomp",
        choices=[action.value for action in Action],
        help="what becomes of system calls that a serving crbd does not need: kill (default), log or none",
    )
    walls.add_argument(
        "--landlock",
        choices=[Wanted.REQUIRED.value, Wanted.OFF.value],
        help="reach no files but the state and those of an upgrade: on, off (default: on where the kernel has it)",
    )
    walls.add_argument(
        "--no-upgrade", action="store_true", help="refuse to become another crbd: no program can be started at all then"
    )


def with_access(arguments: argparse.Namespace, options: DaemonOptions, *, anew: bool) -> DaemonOptions:
    """The options, with those about access. `anew`: no other crbd has served this state in this process.

    Raises UsageError for access that has to be asked for, StateExposedError.
    """
    endpoints = (options.ctrl, options.data)
    for option, endpoint in zip(("--ctrl", "--data"), endpoints, strict=True):
        if isinstance(endpoint, TcpEndpoint):
            if not arguments.allow_remote and not _is_this_machine(endpoint.host):
                raise UsageError(
                    f"{option} {endpoint} is reached from elsewhere, and whoever connects there has the TPM",
                    "use 127.0.0.1, [::1] or localhost, or say --allow-remote",
                )
            if arguments.allow_uids is not None:
                raise UsageError(
                    f"--allow-uids is for UNIX sockets, {option} is {endpoint}: TCP does not say who connects",
                    "leave one out",
                )
    if anew and arguments.state is not None and not arguments.allow_exposed_state:
        refuse_exposed(arguments.state)
    if arguments.allow_uids is None:
        return options
    return replace(options, allowed_users=frozenset(_uid(name) for name in arguments.allow_uids.split(",")))


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # Of names, no other is sure to stay what it is.
        return host == "localhost"


def _uid(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise UsageError(f"--allow-uids: there is no user {name!r}", "give names or numbers, with commas") from None


def refuse_exposed(state: Path) -> None:
    """Refuse state that others than this user and root may change, or put other state in place of: by owner and mode
    of the directory or file, and of the directory that it is in.

    Raises StateExposedError.
    """
    remedy = "make it this user's own (chown, chmod), or say --allow-exposed-state"
    for path in (state.absolute(), state.resolve().parent):
        try:
            status = path.stat()
        except OSError:
            # What is not there exposes nothing; what cannot be reached the store refuses, in better words.
            continue
        around = path != state.absolute()
        if status.st_uid not in {0, os.geteuid()} and not around:
            raise StateExposedError(f"the TPM state {path} belongs to user {status.st_uid}", remedy)
        # In a directory like /tmp nobody but the owner of a file can rename it.
        if status.st_mode & stat.S_IWOTH and not (around and status.st_mode & stat.S_ISVTX):
            raise StateExposedError(f"every user may write to {path}, which holds the TPM state", remedy)


def walls_of(arguments: argparse.Namespace, options: DaemonOptions, program: Program) -> Walls:
    """The walls that the options ask for, with a way through for an upgrade to `program` unless there is to be none."""
    state: Path | None = arguments.state
    allowed = None if arguments.no_upgrade else program
    return Walls(
        seccomp=Action.KILL if arguments.seccomp is None else Action(arguments.seccomp),
        seccomp_required=arguments.seccomp is not None,
        landlock=Wanted.IF_THERE if arguments.landlock is None else Wanted(arguments.landlock),
        places=tuple(
            places_of(options, None if state is None else state.absolute(), allowed, library=arguments.libtpms)
        ),
        program=allowed,
    )
