"""The `crbd` command:

parses the command line, runs the subcommand, turns operator errors into one line and an exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from crbd import __version__
from crbd.cli import serve
from crbd.errors import OperatorError, UsageError


class Parser(argparse.ArgumentParser):
    """argparse, with crbd's own form of error: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see {self.prog} --help")


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="crbd", description="A TPM 2.0 for virtual machines and CI jobs.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"crbd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve.add_arguments(
        commands.add_parser("serve", help="serve one TPM", description=serve.DESCRIPTION, allow_abbrev=False)
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (docs/exit-codes.md). SystemExit comes only from --help and --version."""
    try:
        parsed = build_parser().parse_args(arguments)
        return serve.run(parsed)
    except OperatorError as error:
        print(f"crbd: {error}", file=sys.stderr)
        return error.exit_code
