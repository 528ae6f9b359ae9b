"""`crbd state`: look at, copy, convert and repair the state of a TPM."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from crbd.cli import state_changes, state_convert, state_copies, state_fleet, state_inspect, state_online

DESCRIPTION = """Work on the state of a TPM that does not run: the directory is locked meanwhile, and where a daemon has
it the command is refused. snapshot and restore also work on a running one, with --ctrl."""


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
    "export": Operation(
        "write the document alone to a file",
        state_copies.add_export_arguments,
        state_copies.export,
    ),
    "import": Operation(
        "make a new state directory of an exported document",
        state_copies.add_import_arguments,
        state_copies.import_,
    ),
    "convert": Operation(
        "write the TPM in another layout, or seal or unseal it",
        state_convert.add_arguments,
        state_convert.run,
    ),
    "clone": Operation(
        "make a second state directory of the first",
        state_copies.add_clone_arguments,
        state_copies.clone,
    ),
    "rekey": Operation(
        "exchange the keys that open the state, without writing the TPM anew",
        state_changes.add_rekey_arguments,
        state_changes.run_rekey,
    ),
    "rollback": Operation(
        "go back to the generation before the newest",
        state_changes.add_rollback_arguments,
        state_changes.run_rollback,
    ),
    "snapshot": Operation(
        "write the TPM to a file, from a directory or from a running daemon",
        state_online.add_snapshot_arguments,
        state_online.run_snapshot,
    ),
    "restore": Operation(
        "go back to a snapshot or an exported document of the same instance",
        state_online.add_restore_arguments,
        state_online.run_restore,
    ),
    "upgrade": Operation(
        "rewrite state of older formats in the newest one",
        state_fleet.add_upgrade_arguments,
        state_fleet.run_upgrade,
    ),
    "prune": Operation(
        "remove what upgrades and conversions kept",
        state_fleet.add_prune_arguments,
        state_fleet.run_prune,
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
