"""`crbd state`: look at, copy, convert and repair the state of a TPM that does not run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from crbd.cli import state_inspect

DESCRIPTION = """Work on the state of a TPM that does not run: the directory is locked meanwhile, and where a daemon has
it the command is refused. There is no way yet to ask a running daemon for a snapshot."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: what it does in a line, its arguments, and its run, which returns the exit status."""

    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


OPERATIONS = {
    "inspect": Operation(
        "show what a state directory or an exported document is",
        state_inspect.add_inspect_arguments,
        state_inspect.inspect,
    ),
    "verify": Operation(
        "see that a state directory or an exported document is whole",
        state_inspect.add_verify_arguments,
        state_inspect.verify,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the operations and their arguments."""
    operations = parser.add_subparsers(required=True, metavar="OPERATION")
    for name, operation in OPERATIONS.items():
        command = operations.add_parser(name, help=operation.text, allow_abbrev=False)
        command.description = f"{operation.text[0].upper()}{operation.text[1:]}."
        operation.add_arguments(command)
        command.set_defaults(operation=operation)


def run(arguments: argparse.Namespace) -> int:
    """Do it; returns the exit status. Raises OperatorError; nothing is changed then."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="crbd: %(levelname)s: %(message)s")
    operation: Operation = arguments.operation
    return operation.run(arguments)
