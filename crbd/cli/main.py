"""The `crbd` command: finds and runs the subcommand, turns operator errors into one line and an exit code.

Only the subcommand that is asked for is imported: a daemon's start should not wait for what it does not need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from crbd import __version__
from crbd.errors import OperatorError, UsageError

COMMANDS = {
    "serve": "serve one TPM",
    "run": "run a command with a TPM of its own",
    "reload": "put the crbd that is installed now in the place of a running one",
    "registers": "show the CRB registers of a running TPM",
    "state": "look at, copy, convert, snapshot and repair the state of a TPM",
    "acpi": "write the ACPI tables by which a guest finds served registers",
    "compat-path": "print the directory that takes swtpm's place in PATH",
    "check": "see whether serve would find a TPM that it can run",
    "provision": "make a TPM with endorsement keys, certificates and PCR banks, as a factory does",
    "ca": "look at, make and connect the authority that certifies TPMs",
    "ek": "show the endorsement keys and certificates of a TPM",
}
"""Each is a module of this room with `DESCRIPTION`, `add_arguments(parser)` and `run(arguments) -> exit status`."""


class Parser(argparse.ArgumentParser):
    """argparse, with crbd's own form of error: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see {self.prog} --help")


def build_parser(wanted: str | None) -> Parser:
    """The parser of the whole command line, with the arguments of the subcommand `wanted` alone."""
    parser = Parser(prog="crbd", description="A TPM 2.0 for virtual machines and CI jobs.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"crbd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        if name == wanted:
            module = import_module(f"crbd.cli.{name.replace('-', '_')}")
            command.description = module.DESCRIPTION
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (docs/exit-codes.md). SystemExit comes only from --help and --version."""
    arguments = sys.argv[1:] if arguments is None else arguments
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        parsed = build_parser(wanted).parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except OperatorError as error:
        print(f"crbd: {error}", file=sys.stderr)
        return error.exit_code
