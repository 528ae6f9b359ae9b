"""`crbd check`: would `crbd serve` find a TPM that it can run?"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

from crbd.cli.state_options import add_keys, add_library, add_swtpm_key, engine_maker, keys_of, swtpm_key_of
from crbd.service.judgement import judge
from crbd.state.kinds import StateKind
from crbd.store.document import DocumentStore, NewTpm
from crbd.store.layout import open_state

DESCRIPTION = """See whether `crbd serve --state DIR` would find a TPM that it can run: lock, layout, every byte of the
state, key, and what libtpms says of it. Nothing is started and nothing changed. One line and status 0 if all is well;
else one line that names what is wrong, and its status (docs/exit-codes.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `crbd check`."""
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="directory that holds the TPM's state, or swtpm's linear file"
    )
    add_keys(parser)
    add_swtpm_key(parser)
    parser.add_argument("--uuid", type=UUID, help="the instance that DIR must hold")
    add_library(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check, print one line, return 0. Raises OperatorError."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="crbd: %(levelname)s: %(message)s")
    directory: Path = arguments.directory
    with ExitStack() as stack:
        keys = stack.enter_context(keys_of(arguments))
        swtpm_key = stack.enter_context(swtpm_key_of(arguments))
        store = open_state(directory, create=False, new=NewTpm("", keys), swtpm_key=swtpm_key, uuid=arguments.uuid)
        try:
            loaded = {kind: store.load(kind) for kind in StateKind}
            document = store.document if isinstance(store, DocumentStore) else None
        finally:
            store.close()
    stamped = {} if document is None else {kind: document.state(kind) for kind in StateKind}
    states = {kind: stamped.get(kind) or data for kind, data in loaded.items() if data is not None}
    engine = judge(states, engine_maker(arguments), str(directory))
    which = "in swtpm's layout" if document is None else f"generation {document.identity.generation}"
    print(f"{directory}: a TPM, {which}; libtpms {engine.version} accepts it")
    return 0
