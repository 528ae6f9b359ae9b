"""The walls around the daemon: what it can no longer do once it serves, whoever has taken it over.

    from the first moment    no core dump, and no other process of its user looks into its memory: it holds keys
    when everything is open, before any client is served and any thread runs
                             no new privileges (execve(2) of a set-user-id program gives none)
                             Landlock (crbd.server.landlock): the state, and the programs and libraries of an upgrade
                             seccomp (crbd.server.seccomp): the system calls of a daemon that serves

All of them stay with the program that an upgrade executes. It is told which there are, by the environment, and raises
only those that are missing: neither filters nor Landlock's layers can be stacked without end (16 of these). The process
id beside them says whose walls they are.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import crbd
from crbd.errors import WallError
from crbd.server import seccomp, syscalls
from crbd.server.endpoint import UnixEndpoint
from crbd.server.landlock import CLEAN, KEEP, READ, Files, Place, restrict
from crbd.server.options import DaemonOptions
from crbd.server.seccomp import Action, can_filter
from crbd.server.succession import Program

log = logging.getLogger(__name__)

VARIABLE = "CRBD_WALLS"
_SECCOMP, _LANDLOCK = "seccomp", "landlock"
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc")
"""Where interpreters, libraries and their configuration lie."""
_MAX_LINKS = 40


class Wanted(Enum):
    """How much a wall is wanted."""

    OFF = "off"
    IF_THERE = "where the kernel has it"
    REQUIRED = "on"


@dataclass(frozen=True, slots=True)
class Walls:
    """Which walls there are to be. `program` is what an upgrade starts; None where there is none."""

    seccomp: Action
    """Of the filter of system calls."""
    seccomp_required: bool
    """An error where there can be none."""
    landlock: Wanted
    places: tuple[Place, ...]
    """What Landlock leaves."""
    program: Program | None

    def raise_all(self) -> None:
        """Put this process behind them, for good. To be called once, while there is one thread. Raises WallError."""
        try:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        except OSError as error:
            raise WallError(f"no_new_privs: {error.strerror}", "crbd needs Linux 3.5 or later") from error
        standing = _standing()
        if self.landlock is not Wanted.OFF and _LANDLOCK not in standing and self._restrict():
            standing.append(_LANDLOCK)
        if self.seccomp is not Action.NONE and _SECCOMP not in standing and self._filter():
            standing.append(_SECCOMP)
        if standing:
            os.environ[VARIABLE] = ":".join((str(os.getpid()), *standing))
        log.info("walls: %s", ", ".join(("no_new_privs", *standing)))

    def _restrict(self) -> bool:
        version = restrict(self.places)
        if version == 0 and self.landlock is Wanted.REQUIRED:
            raise WallError("this kernel has no Landlock, or it is switched off", "use --landlock off")
        return version > 0

    def _filter(self) -> bool:
        if not self.seccomp_required and not can_filter():
            log.warning("system calls are not filtered: there is no filter for %s", syscalls.machine())
            return False
        seccomp.install(self.seccomp, upgradable=self.program is not None)
        return True


def forbid_core_dumps() -> None:
    """Neither a crash nor a debugger of the same user gets at the memory of this process. Raises WallError."""
    try:
        # Not where there is none any more: the filter allows no new limits.
        if resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The limit means nothing to a handler that the kernel pipes dumps into (core(5)).
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise WallError(
            f"core dumps cannot be switched off: {error.strerror}", "see the limits of this user"
        ) from error


def places_of(options: DaemonOptions, state: Path | None, program: Program | None, library: str | None) -> list[Place]:
    """What a daemon needs to reach while it serves, until its end; and to start `program`, where there is one.

    `library` is the libtpms that is asked for.
    """
    places = [Place(Path("/dev/null"), READ | Files.WRITE_FILE), Place(Path("/dev/urandom"), READ)]
    if state is not None:
        # Beside a linear file lie its lock and what belongs to it; and a directory may not have been made yet.
        place = state if state.is_dir() or state.is_block_device() else state.parent
        places.append(Place(place, KEEP))
    for endpoint in (options.ctrl, options.data, options.registers):
        if isinstance(endpoint, UnixEndpoint):
            places.append(Place(endpoint.path.absolute().parent, CLEAN))
    if isinstance(options.pid_file, Path):
        places.append(Place(options.pid_file.absolute().parent, CLEAN))
    rights = READ if program is None else READ | Files.EXECUTE
    places.extend(Place(path, rights) for path in sorted(set(_programs(program, library))))
    return places


def _programs(program: Program | None, library: str | None) -> Iterator[Path]:
    """Where the interpreter, its modules, libraries and the program lie. Never the root directory."""
    found = [Path(text) for text in (*_SYSTEM, sys.prefix, sys.base_prefix, *sys.path) if text]
    found.append(Path(crbd.__file__).parents[1])
    found.extend(Path(text) for text in os.environ.get("LD_LIBRARY_PATH", "").split(":") if text)
    if library is not None and "/" in library:
        found.append(Path(library).absolute().parent)
    if program is not None:
        found.extend(_on_the_way_to(Path(program.arguments[0])))
        found.extend(_on_the_way_to(Path(sys.executable)))
    for path in found:
        if path.absolute() != Path("/"):
            yield path.absolute()


def _on_the_way_to(path: Path) -> Sequence[Path]:
    """The directories of a file, of all links that lead to it, and of what these lead to:

    a link that is turned to another release in one of them is followed by an upgrade.
    """
    passed: list[Path] = [path.parent]
    for _ in range(_MAX_LINKS):
        link = next((each for each in (path, *path.parents) if each.is_symlink()), None)
        if link is None:
            break
        target = link.parent / link.readlink()
        passed += [link.parent, target.parent]
        path = target / path.relative_to(link)
    return [*passed, path.parent]


def _standing() -> list[str]:
    """The walls that the program before this one has raised around this process."""
    pid, *names = os.environ.get(VARIABLE, "").split(":")
    return names if pid == str(os.getpid()) else []
