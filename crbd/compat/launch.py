"""`crbd-compat`: what the launchers in libexec/crbd run. It finds the command that goes by the launcher's name.

    PREFIX/libexec/crbd/swtpm ARGUMENTS  ->  exec PREFIX/bin/crbd-compat LAUNCHER ARGUMENTS  ->  crbd.compat.swtpm.main

pip writes PREFIX/bin/crbd-compat with the interpreter it belongs to, in a virtual environment as anywhere else; the
launchers need to know nothing but where they lie themselves. They are never on PATH unless somebody puts them there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import PurePath

COMMANDS = {
    "swtpm": "swtpm",
    "swtpm_ioctl": "ioctl",
    "swtpm_bios": "bios",
    "swtpm_setup": "setup",
    "swtpm_localca": "localca",
    "swtpm_cert": "cert",
}
"""By name: the module of this room whose `main(arguments)` is the command; its result is the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` begins with this program's name and the launcher's path. Returns the exit status.

    The command finds the launcher's path in sys.argv[0], as if it had been run directly.
    """
    argv = sys.argv if argv is None else argv
    launcher, arguments = (argv[1], list(argv[2:])) if len(argv) > 1 else ("", [])
    name = PurePath(launcher).name
    if name not in COMMANDS:
        print(f"crbd-compat: there is no command {name!r}; it is one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 1
    module = f"crbd.compat.{COMMANDS[name]}"
    try:
        command: Callable[[Sequence[str]], int] = import_module(module).main
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        print(f"{name}: this release of crbd does not have it", file=sys.stderr)
        return 1
    sys.argv = [launcher, *arguments]
    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
