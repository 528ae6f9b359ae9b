"""`crbd state snapshot` and `restore`: of a directory, or of the TPM of a running daemon."""

from __future__ import annotations

import argparse
from pathlib import Path

from crbd.cli import state_changes
from crbd.cli.control_client import ask, unknown_to
from crbd.cli.state_options import add_keys, keys_of
from crbd.control.messages import Outcome, Restore, RestoreFlag, Snapshot, TakeSnapshot
from crbd.errors import SnapshotRefusedError, UsageError
from crbd.server.endpoint import Endpoint, parse_endpoint
from crbd.state.document import peek_header, verify
from crbd.store.offline import OfflineState, read_document, write_file, write_new_file
from crbd.store.transfer import exported

PATIENCE = 120.0
"""Seconds: the TPM's command under way comes first."""


def add_snapshot_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `snapshot`."""
    _add_which(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="where the document goes (mode 0600)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    add_keys(parser)


def run_snapshot(arguments: argparse.Namespace) -> int:
    """Write the TPM as a document to a file; returns 0. Raises an OperatorError."""
    endpoint = _endpoint(arguments)
    if endpoint is None:
        with keys_of(arguments) as keys, OfflineState(arguments.directory) as state:
            data = exported(state.current().payload, keys, None, state.name)
    else:
        reply = ask(endpoint, TakeSnapshot(), PATIENCE)
        if not isinstance(reply, Snapshot):
            raise unknown_to(endpoint, "TAKE_SNAPSHOT", reply)
        if not reply.done:
            raise SnapshotRefusedError(_line(reply.document), "the daemon goes on as before")
        data = reply.document
        verify(data, f"the snapshot from {endpoint}")
    (write_file if arguments.force else write_new_file)(arguments.file, data)
    header = peek_header(data, str(arguments.file))
    sealed = "sealed" if header.sealed else "plain"
    print(f"{arguments.file}: generation {header.generation} of {header.uuid}, {sealed}")
    return 0


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `restore`."""
    _add_which(parser)
    state_changes.add_restore_arguments(parser)


def run_restore(arguments: argparse.Namespace) -> int:
    """Go back to a document; returns 0. Raises an OperatorError."""
    endpoint = _endpoint(arguments)
    if endpoint is None:
        return state_changes.run_restore(arguments)
    data = read_document(arguments.file)
    verify(data, str(arguments.file))
    flags = RestoreFlag.ALLOW_ROLLBACK if arguments.allow_rollback else RestoreFlag(0)
    reply = ask(endpoint, Restore(flags, data), PATIENCE)
    if not isinstance(reply, Outcome):
        raise unknown_to(endpoint, "RESTORE", reply)
    if not reply.done:
        raise SnapshotRefusedError(_line(reply.text), "the TPM is as it was")
    print(f"{endpoint}: {_line(reply.text)}")
    return 0


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="directory that holds the TPM's state")
    parser.add_argument(
        "--ctrl", metavar="ENDPOINT", help="in place of DIR: the control socket of the daemon that runs the TPM"
    )


def _endpoint(arguments: argparse.Namespace) -> Endpoint | None:
    """Of the daemon; None for a directory. Raises UsageError."""
    if (arguments.ctrl is None) == (arguments.directory is None):
        raise UsageError("whose state is it?", "give either DIR or --ctrl ENDPOINT, and FILE")
    if arguments.ctrl is None:
        return None
    if arguments.key is not None or arguments.passphrase is not None:
        raise UsageError("a daemon has its key already", "leave --key and --passphrase out")
    return parse_endpoint(arguments.ctrl, "--ctrl")


def _line(said: bytes) -> str:
    """What a daemon said, as one line."""
    return " ".join(said.decode("utf-8", "replace").split())
