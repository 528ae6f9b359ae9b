"""`crbd state convert`: between crbd's layout and swtpm's two, and from plain to sealed and back."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from crbd.cli.state_options import (
    add_directory,
    add_keys,
    add_library,
    add_new_keys,
    add_swtpm_key,
    engine_maker,
    keys_of,
    new_keys_of,
    swtpm_key_of,
)
from crbd.errors import StateSealedError, UsageError
from crbd.service.examination import ek_fingerprint
from crbd.service.judgement import judge
from crbd.state.keys import UserKey
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.conversion import (
    Source,
    document_of,
    left_behind,
    resealed,
    source_of,
    write_crbd,
    write_linear,
    write_swtpm,
)
from crbd.store.layout import Layout
from crbd.store.transfer import encoded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert`."""
    add_directory(parser)
    parser.add_argument("--to", choices=[layout.value for layout in Layout], required=True, help="the layout to write")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--out", metavar="DIR2", type=Path, help="where to: a directory that is absent or empty; a new file for linear"
    )
    where.add_argument(
        "--in-place", action="store_true", help="in DIR itself; the old files are kept as *.before-convert"
    )
    parser.add_argument("--name", default="", help="what a TPM from swtpm's layout is called, for people")
    add_keys(parser)
    add_new_keys(parser)
    parser.add_argument("--plain", action="store_true", help="write sealed state unencrypted")
    add_swtpm_key(parser)
    add_library(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns 0. Raises a StateError or UsageError; nothing is changed then."""
    directory: Path = arguments.directory
    to = Layout(arguments.to)
    target: Path | None = arguments.out
    with ExitStack() as stack:
        keys = stack.enter_context(keys_of(arguments))
        new_keys = stack.enter_context(new_keys_of(arguments))
        swtpm_key = stack.enter_context(swtpm_key_of(arguments))
        if new_keys and arguments.plain:
            raise UsageError("--plain and a new key exclude each other", "give one of them")
        source = stack.enter_context(source_of(directory, keys, swtpm_key))
        if target is None and Layout.LINEAR in (source.layout, to):
            raise UsageError("a linear file is not converted in place", "give --out")
        if to is Layout.CRBD:
            _to_crbd(arguments, source, new_keys, swtpm_key)
        else:
            _to_swtpm(arguments, source, new_keys, swtpm_key)
    print(f"{target or directory}: in the {to.value} layout" + ("" if target else "; crbd state prune removes the old"))
    return 0


def _to_crbd(
    arguments: argparse.Namespace, source: Source, new_keys: tuple[UserKey, ...], swtpm_key: SwtpmKey | None
) -> None:
    target: Path | None = arguments.out
    if source.document is None:
        if arguments.key or arguments.passphrase:
            raise UsageError("--key opens crbd's layout, and this is swtpm's", "use --swtpm-key, or --new-key to seal")
        if swtpm_key is not None and not (new_keys or arguments.plain):
            raise StateSealedError(f"{source.path} is encrypted", "give --new-key, or --plain if it is to be plain")
        stamp = judge(source.states, engine_maker(arguments), str(source.path))
        fingerprint = ek_fingerprint(source.states, engine_maker(arguments), str(source.path))
        write_crbd(source, target, encoded(document_of(source, stamp, arguments.name, fingerprint), new_keys))
        return
    if swtpm_key is not None or arguments.name:
        raise UsageError("--swtpm-key and --name are for swtpm's layout, and this is crbd's", "leave them out")
    if not new_keys and not (arguments.plain and source.seal is not None):
        raise UsageError(
            f"{source.path} is in the crbd layout already, {'plain' if source.seal is None else 'sealed'}",
            "to seal it anew give --new-key, to unseal it --plain; to copy it: crbd state clone",
        )
    write_crbd(source, target, resealed(source.document, new_keys))


def _to_swtpm(
    arguments: argparse.Namespace, source: Source, new_keys: tuple[UserKey, ...], swtpm_key: SwtpmKey | None
) -> None:
    to = Layout(arguments.to)
    if source.layout is to:
        raise UsageError(f"{source.path} is in the {to.value} layout already", "there is nothing to convert")
    if new_keys or arguments.name:
        raise UsageError("--new-key and --name are for crbd's layout", "use --swtpm-key to encrypt swtpm's files")
    if swtpm_key is not None and arguments.plain:
        raise UsageError("--plain and --swtpm-key exclude each other", "give one of them")
    if source.document is None and (arguments.key or arguments.passphrase or arguments.plain):
        raise UsageError(
            f"--key and --plain are for crbd's layout, and {source.path} is in swtpm's", "use --swtpm-key, or none"
        )
    if source.seal is not None and swtpm_key is None and not arguments.plain:
        raise StateSealedError(
            f"{source.path} is encrypted", "give --swtpm-key, or --plain if swtpm's files are to be plain"
        )
    lost = [] if source.document is None else left_behind(source.document)
    if to is Layout.SWTPM:
        write_swtpm(source, arguments.out, swtpm_key)
    else:
        write_linear(source, arguments.out, swtpm_key)
    if lost:
        print(f"{source.path}: swtpm's layouts have no room for: {', '.join(lost)}")
