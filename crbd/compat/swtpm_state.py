"""`--tpmstate`, TPM_PATH and `--print-states` of the swtpm command: which store they mean (swtpm 0.11: common.c)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crbd.compat.swtpm_grammar import Values
from crbd.errors import StateAbsentError, StateAccessError, StateEmptyError, UsageError
from crbd.state.kinds import StateKind
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import FILE_NAME
from crbd.store.layout import Layout, found_in, open_backend, open_state
from crbd.store.linear import HEAD_SIZE, decode_head
from crbd.store.options import FileOptions
from crbd.store.port import Store

STATE_MODE = 0o640
"""Permission bits of state files, under umask, unless `mode=` says otherwise."""
LOCK_MODE = 0o660
"""Permission bits of `.lock`, under umask."""


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where the state is: swtpm's URI, and how its files are to be treated."""

    uri: str
    options: FileOptions

    @property
    def is_directory(self) -> bool:
        """Whether the URI names one."""
        return self.uri.startswith("dir://")

    @property
    def path(self) -> Path:
        """Behind the URI's scheme."""
        return Path(self.uri.partition("://")[2])


def place_of(values: Values | None, environment: Mapping[str, str]) -> StatePlace | None:
    """What the option or TPM_PATH says; None where neither is given. Raises UsageError."""
    if values is None:
        if not environment.get("TPM_PATH"):
            return None
        return StatePlace(f"dir://{environment['TPM_PATH']}", FileOptions(_default_mode(), lock_mode=LOCK_MODE))
    directory, uri = values.string("dir"), values.string("backend-uri")
    if directory is not None:
        uri = f"dir://{directory}"
    if uri is None:
        raise UsageError("The dir or backend-uri parameters is required for the tpmstate option.")
    if not uri.startswith(("dir://", "file://")):
        raise UsageError(f"Unsupported backend {uri}", "use dir://PATH or file://PATH")
    mode = values.number("mode")
    return StatePlace(
        uri,
        FileOptions(
            mode=_default_mode() if mode is None else mode,
            adopt_mode=mode is not None,
            lock_mode=LOCK_MODE,
            # Historically the one was always locked and the other never (swtpm 0.11).
            locking=values.flag("lock", default=uri.startswith("dir://")),
            backup=values.flag("backup"),
        ),
    )


def _default_mode() -> int:
    """STATE_MODE as the umask leaves it. What `mode=` says is taken as it is, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    return STATE_MODE & ~umask


def open_place(place: StatePlace, key: SwtpmKey | None, *, lock: bool) -> Store:
    """The store; absent state may be made there, but not its directory. Raises StateError, UsageError.

    A directory in crbd's layout is opened as it is.
    """
    if place.is_directory:
        if not place.path.is_dir():
            raise StateAccessError(f"the state directory {place.path} is not there", "make it, and let this user write")
        if key is None and found_in(place.path) is Layout.CRBD:
            return open_state(place.path, create=True, lock=lock)
    return open_backend(place.uri, create=True, swtpm_key=key, options=place.options, lock=lock)


def states_json(place: StatePlace) -> str:
    """The kinds of state that are stored, with their sizes in bytes, as swtpm prints them. Raises StateError."""
    found = _in_directory(place.path) if place.is_directory else _in_file(place.path)
    listed = ",".join(f' {{"name": "{name}", "size": {size}}}' for name, size in found)
    return f'{{ "type": "swtpm", "states": [{listed}{" " if found else ""}] }}'


def _in_directory(path: Path) -> list[tuple[str, int]]:
    if found_in(path) is Layout.CRBD:
        document = path / FILE_NAME
        return [(StateKind.PERMANENT.nvram_name, document.stat().st_size)] if document.exists() else []
    files = [(kind.nvram_name, path / f"tpm2-00.{kind.nvram_name}") for kind in StateKind]
    return [(name, file.stat().st_size) for name, file in files if file.exists()]


def _in_file(path: Path) -> list[tuple[str, int]]:
    try:
        with open(path, "rb") as file:
            sections = decode_head(file.read(HEAD_SIZE), str(path))
    except (FileNotFoundError, StateEmptyError, StateAbsentError):
        return []
    except OSError as error:
        raise StateAccessError(f"{path}: {error.strerror}", "name a file that this user may read") from error
    return [(kind.nvram_name, sections[kind].length) for kind in StateKind if kind in sections]
