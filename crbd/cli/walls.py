"""The options of `crbd serve` that say who is kept out, and how the daemon is walled in."""

from __future__ import annotations

import argparse
from pathlib import Path

from crbd.server.daemon import DaemonOptions
from crbd.server.seccomp import Action
from crbd.server.succession import Program
from crbd.server.walls import Walls, Wanted, places_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
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
