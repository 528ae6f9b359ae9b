"""`crbd state export`, `import` and `clone`: a TPM's document in another place."""

from __future__ import annotations

import argparse
from pathlib import Path

from crbd.cli.state_options import add_directory, add_keys, add_new_keys, keys_of, new_keys_of
from crbd.errors import UsageError
from crbd.state.document import check_complete, peek_header
from crbd.state.header import FORMAT_VERSION
from crbd.store.offline import OfflineState, create_state, read_document, write_file, write_new_file
from crbd.store.transfer import encoded, exported, opened, replaced


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `export`."""
    add_directory(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the document goes (mode 0600)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument(
        "--format-version",
        type=int,
        choices=range(1, FORMAT_VERSION + 1),
        help="write it in this format, for an older release (default: as it is)",
    )
    add_keys(parser)


def export(arguments: argparse.Namespace) -> int:
    """Write the document alone to a file; returns 0. Raises a StateError."""
    with keys_of(arguments) as keys, OfflineState(arguments.directory) as state:
        data = exported(state.current().payload, keys, arguments.format_version, state.name)
    (write_file if arguments.force else write_new_file)(arguments.out, data)
    header = peek_header(data, str(arguments.out))
    print(f"{arguments.out}: generation {header.generation} of {header.uuid}, format version {header.format_version}")
    return 0


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `import`."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a document from crbd state export")
    add_directory(parser)
    add_keys(parser)


def import_(arguments: argparse.Namespace) -> int:
    """Make a new state directory of a document; returns 0. Raises a StateError."""
    name = str(arguments.file)
    with keys_of(arguments) as keys:
        data = exported(read_document(arguments.file), keys, None, name)
    create_state(arguments.directory, data)
    header = peek_header(data, name)
    print(f"{arguments.directory}: generation {header.generation} of {header.uuid}")
    return 0


def add_clone_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clone`."""
    add_directory(parser)
    add_directory(parser, "target", "DIR2")
    parser.add_argument(
        "--policy",
        choices=["copy", "replace"],
        required=True,
        help="copy: the same instance, byte for byte, of which one at a time may run. replace: an instance with a UUID "
        "and a data key of its own; the TPM inside, its seeds and its endorsement key, is still the original's",
    )
    parser.add_argument("--name", help="what the new instance is called (with replace; default: as the original)")
    add_keys(parser)
    add_new_keys(parser)


def clone(arguments: argparse.Namespace) -> int:
    """Copy a state directory; returns 0. Raises a StateError."""
    if arguments.policy == "copy" and (arguments.name is not None or arguments.new_key or arguments.new_passphrase):
        raise UsageError("--policy copy changes nothing", "leave --name and the new keys out, or use --policy replace")
    with keys_of(arguments) as keys, new_keys_of(arguments) as new_keys, OfflineState(arguments.directory) as state:
        data = exported(state.current().payload, keys, None, state.name)
        if arguments.policy == "replace":
            with opened(data, keys, state.name) as (document, _):
                check_complete(document, state.name)
                data = encoded(replaced(document, _checked_name(arguments.name)), new_keys or keys)
        create_state(arguments.target, data)
    header = peek_header(data, str(arguments.target))
    what = "a copy of" if arguments.policy == "copy" else "a new instance,"
    print(f"{arguments.target}: {what} {header.uuid}, generation {header.generation}")
    return 0


def _checked_name(name: str | None) -> str | None:
    if name is not None and (not name.isprintable() or len(name.encode("utf-8", "replace")) > 255):
        raise UsageError("--name is not printable or longer than 255 bytes", "choose another")
    return name
