"""One TPM from layout to layout, or from plain to sealed and back: into a new directory, or in place.

Theory. The source is locked and read whole before anything is written, what was written is read back and compared,
and only then is it the state. In place, the files as they were stay under other names, hard links made before
anything else. While one layout takes the other's place there is a moment in which both are there: a power cut then
leaves a directory that is refused by everybody (`found_in`), in which the kept files are whole.

    tpm.crbd                  tpm.crbd.before-convert
    tpm2-00.permall           swtpm.permall.before-convert (under its old first name it would count as state)
    crbd.registers            crbd.registers.before-convert

swtpm's linear file is a source, or a new file; it is not converted in place.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crbd.errors import (
    StateAbsentError,
    StateDamagedError,
    StateDowngradeError,
    StateError,
    StateWriteError,
    StoreError,
)
from crbd.state.document import Document, check_complete
from crbd.state.header import WRITER_ID_SIZE
from crbd.state.keys import UserKey
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Identity, TpmState
from crbd.state.sealing import Seal
from crbd.state.side import SideState
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.directory import BACKUP, DirectoryStore, open_directory
from crbd.store.document import FILE_NAME
from crbd.store.files import sync_directory
from crbd.store.layout import BEFORE_CONVERT, CONVERTING, Layout
from crbd.store.linear import SIDE_SUFFIX, open_linear
from crbd.store.offline import (
    OfflineState,
    create_slots,
    create_state,
    layout_of,
    unwritable,
    vacant,
)
from crbd.store.options import FileOptions
from crbd.store.port import Store
from crbd.store.side import NAME as REGISTERS
from crbd.store.snapshot import WRITER
from crbd.store.transfer import encoded, opened, rewritten

States = Mapping[StateKind, bytes]


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be converted; it is locked for as long as this is in use."""

    path: Path
    layout: Layout
    states: States
    side: SideState | None
    """Registers and session that belong to the volatile state."""
    files: tuple[Path, ...]
    """Of its layout."""
    document: Document | None
    """None in swtpm's layouts."""
    seal: Seal | None


@contextmanager
def source_of(path: Path, keys: tuple[UserKey, ...], swtpm_key: SwtpmKey | None) -> Iterator[Source]:
    """Lock and read a state directory or linear file. Each layout has its own kind of key. Raises a StateError."""
    layout = layout_of(path)
    if layout is not Layout.CRBD:
        open_store = open_directory if layout is Layout.SWTPM else open_linear
        store = open_store(path, create=False, key=swtpm_key)
        try:
            files = tuple(file for file in _swtpm_files(path) if file.exists())
            states = loaded(store)
            if StateKind.PERMANENT not in states:
                raise StateAbsentError(f"{path} holds no TPM yet", "start one on it first, or name another")
            yield Source(path, layout, states, store.load_side(), files, None, None)
        finally:
            store.close()
        return
    with OfflineState(path) as state, opened(state.current().payload, keys, state.name) as (document, seal):
        check_complete(document, state.name)
        states = {kind: found.data for kind in StateKind if (found := document.state(kind)) is not None}
        side = None
        if document.checkpoint:
            # Neither swtpm nor a client of its would know that: they would go on from it at any INIT.
            states.pop(StateKind.VOLATILE, None)
        elif document.volatile is not None and (document.crb is not None or document.session is not None):
            side = SideState(document.crb, document.session)
        yield Source(path, layout, states, side, (path / FILE_NAME,), document, seal)


def _swtpm_files(directory: Path) -> list[Path]:
    """What of swtpm's layout and ours beside it may lie in a directory. A backup is a state of an earlier time."""
    states = [swtpm_file(directory, kind) for kind in StateKind]
    return [*states, directory / f"{states[0].name}{BACKUP}", directory / REGISTERS]


def loaded(store: Store) -> States:
    """The engine's states in a store. Raises a StateError."""
    found = {kind: store.load(kind) for kind in StateKind}
    return {kind: data for kind, data in found.items() if data is not None}


def swtpm_file(directory: Path, kind: StateKind) -> Path:
    """Where swtpm keeps a kind of state."""
    return directory / f"tpm2-00.{kind.nvram_name}"


# -- the forms


def document_of(source: Source, engine: EngineStamp, name: str, ek_fingerprint: bytes = b"") -> Document:
    """The first document of a TPM that came from swtpm, with a UUID of its own.

    swtpm's files do not say which engine wrote them: `engine` is one that has accepted them. `ek_fingerprint` is what
    it says of the endorsement key.
    """
    now = int(time.time())
    stamped = {kind: TpmState(data, engine) for kind, data in source.states.items()}
    side = source.side or SideState()
    return Document(
        identity=Identity(uuid.uuid4(), name, 1, WRITER, now, ek_fingerprint),
        writer_id=os.urandom(WRITER_ID_SIZE),
        written=now,
        permanent=stamped[StateKind.PERMANENT],
        volatile=stamped.get(StateKind.VOLATILE),
        savestate=stamped.get(StateKind.SAVESTATE),
        crb=side.crb,
        session=side.session,
    )


def resealed(document: Document, new_keys: tuple[UserKey, ...]) -> bytes:
    """The next generation of `document`: with `new_keys` sealed under a new data key, else plain."""
    return encoded(rewritten(document, document.identity.generation + 1, os.urandom(WRITER_ID_SIZE)), new_keys)


def left_behind(document: Document) -> list[str]:
    """What of a document has no place in swtpm's layouts, nor in our file beside them.

    Raises StateDowngradeError for a command under way: swtpm would lose it.
    """
    transfer = None if document.crb is None or document.checkpoint else document.crb.transfer
    if transfer is not None and (transfer.command or transfer.offset < len(transfer.response)):
        raise StateDowngradeError(
            "a command or a response is under way in the registers, which swtpm does not read",
            "let the guest finish it and go idle",
        )
    parts = {
        "a checkpoint": document.checkpoint,
        "registers": document.crb is not None and document.volatile is None,
        "session": document.session is not None and document.volatile is None,
        "fingerprint of the endorsement key": bool(document.identity.ek_fingerprint),
    }
    parts |= {f"section {section.name}": True for section in document.unknown}
    return [f"UUID {document.identity.uuid}", *(part for part, there in parts.items() if there)]


# -- writing


def write_crbd(source: Source, target: Path | None, payload: bytes) -> None:
    """Put a document with the source's states into the directory `target`, or in place. Raises a StateError."""
    if target is not None:
        create_state(target, payload)
    elif source.layout is Layout.SWTPM:
        file = source.path / FILE_NAME
        _take_the_place(source, [file], lambda: create_slots(file, payload))
    else:
        _replace_document(source, payload)


def write_swtpm(source: Source, target: Path | None, key: SwtpmKey | None) -> None:
    """Put the source's states into swtpm's files in the directory `target`, or in place. Raises a StateError."""
    if target is not None:
        with vacant(target):
            _write_files(target, source, key)
        return
    _take_the_place(source, _swtpm_files(source.path), lambda: _write_files(source.path, source, key))


def write_linear(source: Source, target: Path, key: SwtpmKey | None) -> None:
    """Put the source's states into swtpm's linear file `target`, which is not there yet. Raises a StateError."""
    if os.path.lexists(target):
        raise StateError(f"{target} exists", "name a file that does not")
    try:
        store = open_linear(target, create=True, key=key)
        try:
            store.commit(source.states, source.side)
            _see_that_it_reads_back(store, source)
        finally:
            store.close()
    except BaseException as error:
        _remove([target, target.with_name(target.name + SIDE_SUFFIX)])
        if isinstance(error, StoreError):
            raise StateWriteError.of(error) from error
        raise


def _write_files(directory: Path, source: Source, key: SwtpmKey | None) -> None:
    """The caller holds the lock. Permanent state goes last: without it what else is there is refused by everybody."""
    store = DirectoryStore(directory, create=False, key=key, options=FileOptions(locking=False))
    store.lock()
    others = dict(source.states)
    permanent = {StateKind.PERMANENT: others.pop(StateKind.PERMANENT)}
    try:
        store.commit(others, source.side)
        store.commit(permanent)
        _see_that_it_reads_back(store, source)
    except StoreError as error:
        raise StateWriteError.of(error) from error
    finally:
        store.close()


def _see_that_it_reads_back(store: Store, source: Source) -> None:
    try:
        same = loaded(store) == source.states and store.load_side() == source.side
    except StateError:
        same = False
    if not same:
        raise StateDamagedError(f"{store.name} does not read back as it was written", "see to the disk it is on")


def _take_the_place(source: Source, new: Iterable[Path], write: Callable[[], None]) -> None:
    """Write the files `new` and remove those of the source, which are kept under other names.

    Raises a StateError; everything is as it was then.
    """
    kept = _kept_names(source)
    with _all_or_nothing(source.path, kept, new):
        write()
        for path in kept:
            path.unlink()


def _replace_document(source: Source, payload: bytes) -> None:
    """A new two-slot file in the place of the old one, which is kept: nothing of it is in the new one's undo.

    Raises as `_take_the_place`.
    """
    file = source.path / FILE_NAME
    making = file.with_name(CONVERTING)
    _remove([making])
    with _all_or_nothing(source.path, _kept_names(source), [making]):
        create_slots(making, payload)
        making.replace(file)


@contextmanager
def _all_or_nothing(directory: Path, kept: Mapping[Path, Path], new: Iterable[Path]) -> Iterator[None]:
    """Link what is to be `kept` before the body and sync after it. Where that fails, take everything back."""
    try:
        for path, link in kept.items():
            os.link(path, link)
        sync_directory(directory)
        yield
        sync_directory(directory)
    except BaseException as error:
        _remove(new)
        for path, link in kept.items():
            # Where both are the same file still, a rename leaves both.
            with contextlib.suppress(OSError):
                link.replace(path)
        _remove(kept.values())
        with contextlib.suppress(OSError):
            sync_directory(directory)
        if isinstance(error, OSError):
            raise unwritable(directory, error) from error
        raise


def _kept_names(source: Source) -> dict[Path, Path]:
    """Under which name each file of the source is kept. Raises StateError where one is taken."""
    names = {path: path.with_name(path.name.replace("tpm2-00.", "swtpm.", 1) + BEFORE_CONVERT) for path in source.files}
    for kept in names.values():
        if os.path.lexists(kept):
            raise StateError(f"{kept} is there from an earlier conversion", "remove it: crbd state prune")
    return names


def _remove(paths: Iterable[Path]) -> None:
    """And what a write that failed half-way left of them."""
    for path in paths:
        for each in (path, path.with_name(f".{path.name}.new")):
            with contextlib.suppress(OSError):
                each.unlink()
