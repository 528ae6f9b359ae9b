"""`crbd state rekey`, `rollback` and `restore`: what a state directory's next document is to be."""

from __future__ import annotations

import argparse
from pathlib import Path

from crbd.cli.state_options import add_directory, add_keys, add_new_keys, keys_of, new_keys_of
from crbd.errors import UsageError
from crbd.store.offline import OfflineState, kept_files, read_document
from crbd.store.transfer import Rollback, rekey, roll_back, undo_of


def add_rekey_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `rekey`."""
    add_directory(parser)
    add_keys(parser)
    add_new_keys(parser)
    parser.add_argument("--keep-old", action="store_true", help="only add the new keys; the old ones still open it")


def run_rekey(arguments: argparse.Namespace) -> int:
    """Exchange keys; returns 0. Raises a StateError or UsageError."""
    with keys_of(arguments) as keys, new_keys_of(arguments) as new_keys:
        if not new_keys:
            raise UsageError("there is no new key", "give --new-key or --new-passphrase")
        with OfflineState(arguments.directory, writable=True) as state:
            done = rekey(state, keys, new_keys, keep_old=arguments.keep_old)
            kept = kept_files(arguments.directory)
    print(f"{arguments.directory}: opens by {' or '.join(slot.says for slot in done.now)}; there is no undo now")
    if kept and done.removed:
        print(f"{arguments.directory}: {kept[0].name} may still open by the old key: crbd state prune removes it")
    return 0


def add_rollback_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `rollback`."""
    add_directory(parser)
    _add_allow(parser)
    add_keys(parser)


def run_rollback(arguments: argparse.Namespace) -> int:
    """Go back to the generation before the newest; returns 0. Raises a StateError or UsageError."""
    with keys_of(arguments) as keys, OfflineState(arguments.directory, writable=True) as state:
        name = f"{state.name} (the generation before)"
        done = roll_back(state, undo_of(state), keys, name, allowed=arguments.allow_rollback)
    return _told(arguments.directory, done)


def add_restore_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `restore` but DIR."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a document from crbd state export, of this instance")
    _add_allow(parser)
    add_keys(parser)


def run_restore(arguments: argparse.Namespace) -> int:
    """Go back to an exported document; returns 0. Raises a StateError or UsageError."""
    data = read_document(arguments.file)
    with keys_of(arguments) as keys, OfflineState(arguments.directory, writable=True) as state:
        done = roll_back(state, data, keys, str(arguments.file), allowed=arguments.allow_rollback)
    return _told(arguments.directory, done)


def _add_allow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-rollback",
        action="store_true",
        help="yes, the TPM goes back in time: counters, dictionary-attack tries and revoked keys with it",
    )


def _told(directory: Path, done: Rollback) -> int:
    print(
        f"{directory}: generation {done.taken} is the state again, as generation {done.written}; "
        f"generation {done.lost} is lost, but for the undo"
    )
    return 0
