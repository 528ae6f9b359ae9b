"""A TPM's document at rest, carried from one place or form to another: rolled back, upgraded, rekeyed, cloned.

Theory. What becomes the state of a directory that has one is always a new document, with a generation above all that
the directory has seen, so that nothing older is ever taken for the newest, and a writer that was overtaken is noticed.
Its instance stays; `replaced` alone makes another one.

Sealed state stays sealed, by the seal that the directory has: a plain document is not taken in its place (`decode`
refuses it), nor a sealed one in the place of a plain one.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from crbd.errors import StateAbsentError, StateDamagedError, StateError, UsageError
from crbd.state.ciphers import wipe
from crbd.state.document import (
    Document,
    check_complete,
    check_generation,
    check_identity,
    decode,
    encode,
    open_seal,
    peek_header,
    rewrap,
    verify,
)
from crbd.state.header import FORMAT_VERSION, MAX_GENERATION, WRITER_ID_SIZE
from crbd.state.keys import KeySlot, UserKey, unwrap
from crbd.state.sealing import Seal
from crbd.store.offline import OfflineState
from crbd.store.snapshot import WRITER


@contextmanager
def opened(data: bytes, keys: tuple[UserKey, ...], name: str) -> Iterator[tuple[Document, Seal | None]]:
    """The document in `data`, and its seal where it is sealed; the seal is wiped at the end. Raises a StateError."""
    if not (keys and peek_header(data, name).sealed):
        # Without a key for what is sealed, or with one for what is not, this raises.
        yield decode(data, keys or None, name), None
        return
    seal = open_seal(data, keys, name)
    try:
        yield decode(data, seal, name), seal
    finally:
        seal.wipe()


def rewritten(document: Document, generation: int, writer_id: bytes) -> Document:
    """The same instance and contents as a document of this process, now. Raises StateDamagedError past the last one."""
    if generation > MAX_GENERATION:
        raise StateDamagedError(f"generation {generation - 1} is the last there can be", "clone it: crbd state clone")
    identity = replace(document.identity, generation=generation, writer=WRITER)
    return replace(document, identity=identity, writer_id=writer_id, written=int(time.time()))


def exported(data: bytes, keys: tuple[UserKey, ...], format_version: int | None, name: str) -> bytes:
    """The document as it is, once it is known to be whole; or, with `format_version`, in that format.

    Raises a StateError: StateDowngradeError where that format has no room for something, StateSealedError where the
    document has to be written anew and there is no key.
    """
    header = verify(data, name)
    if not header.sealed or keys:
        with opened(data, keys, name) as (document, _):
            check_complete(document, name)
    if format_version is None or format_version == header.format_version:
        return data
    with opened(data, keys, name) as (document, seal):
        ours = rewritten(document, document.identity.generation, os.urandom(WRITER_ID_SIZE))
        return encode(ours, seal, format_version=format_version)


def replaced(document: Document, name: str | None) -> Document:
    """The first document of a new instance with the TPM of another; `name` replaces its name."""
    now = int(time.time())
    identity = replace(
        document.identity,
        uuid=uuid.uuid4(),
        name=document.identity.name if name is None else name,
        generation=1,
        writer=WRITER,
        created=now,
    )
    return replace(document, identity=identity, writer_id=os.urandom(WRITER_ID_SIZE), written=now)


def encoded(document: Document, keys: tuple[UserKey, ...]) -> bytes:
    """The document's bytes; with `keys` sealed, under a new data key."""
    if not keys:
        return encode(document)
    seal = Seal.create(document.identity.uuid, keys)
    try:
        return encode(document, seal)
    finally:
        seal.wipe()


# -- going back
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rollback:
    """Which generation took the place of which, and the new one's number."""

    lost: int
    taken: int
    written: int


def roll_back(state: OfflineState, data: bytes, keys: tuple[UserKey, ...], name: str, *, allowed: bool) -> Rollback:
    """Commit the document `data`, called `name`, as a new generation of `state`; what it replaces becomes the undo.

    Raises UsageError, naming what would be lost, unless that is `allowed`; StateIdentityError for another instance's
    document; else a StateError. Nothing was changed then.
    """
    with opened(state.current().payload, keys, state.name) as (current, seal):
        header = verify(data, name)
        check_identity(header, current.identity.uuid, name)
        check_generation(header, name)
        taken = _taken(data, keys, seal, name)
        lost, back = current.identity.generation, taken.identity.generation
        if not allowed:
            raise UsageError(
                f"generation {back} would take the place of generation {lost}, and what changed in between be lost",
                "if that is wanted, give --allow-rollback",
            )
        document = rewritten(taken, max(lost, back) + 1, state.writer_id)
        state.commit(encode(document, seal))
        return Rollback(lost, back, document.identity.generation)


def _taken(data: bytes, keys: tuple[UserKey, ...], seal: Seal | None, name: str) -> Document:
    """The document to go back to, which may have been sealed under an earlier data key of the instance."""
    if seal is None and verify(data, name).sealed:
        raise StateError(
            f"{name} is encrypted, and the state that it would replace is not",
            "convert the state first: crbd state convert --new-key",
        )
    with opened(data, keys, name) as (document, _):
        check_complete(document, name)
        return document


def undo_of(state: OfflineState) -> bytes:
    """The document before the newest. Raises StateAbsentError where there is none."""
    previous = state.previous()
    if previous is None:
        raise StateAbsentError(f"{state.name} holds one generation, and none before it", "restore an exported document")
    return previous.payload


# -- in place
# ---------------------------------------------------------------------------------------------------------------------


def upgrade(state: OfflineState, keys: tuple[UserKey, ...]) -> int | None:
    """Rewrite a document of an older format in the newest one; the old bytes are kept beside it.

    Returns the format version that it had, None where it was the newest. Raises a StateError; nothing was changed then.
    """
    data = state.current().payload
    old = verify(data, state.name).format_version
    if old == FORMAT_VERSION:
        return None
    with opened(data, keys, state.name) as (document, seal):
        check_complete(document, state.name)
        following = rewritten(document, document.identity.generation + 1, state.writer_id)
        state.commit(encode(following, seal))
    return old


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """The key slots that were removed and those that are there now."""

    removed: tuple[KeySlot, ...]
    now: tuple[KeySlot, ...]


def rekey(state: OfflineState, keys: tuple[UserKey, ...], new_keys: tuple[UserKey, ...], *, keep_old: bool) -> Rekeyed:
    """Exchange the key slots that `keys` open for ones that `new_keys` open; other slots stay.

    The TPM's state is not encrypted anew, and its generation stays. It is committed twice, so that neither slot of the
    file is left with the old keys; the undo is gone then. With `keep_old` slots are only added, and the labels of
    new slots are numbered where they are taken. Raises a StateError or UsageError; nothing was changed then, unless
    the second commit failed.
    """
    data = state.current().payload
    seal = open_seal(data, keys, state.name)
    try:
        decode(data, seal, state.name)
        removed = () if keep_old else _opened_by(seal, keys, state.name)
        taken = {slot.label for slot in seal.slots}
        for key in new_keys:
            key.label = _free_label(key.label, taken)
            taken.add(key.label)
        seal.exchange([slot.label for slot in removed], new_keys)
        rewrapped = rewrap(data, seal, state.name)
        state.commit(rewrapped)
        state.commit(rewrapped)
        return Rekeyed(removed, seal.slots)
    finally:
        seal.wipe()


def _opened_by(seal: Seal, keys: tuple[UserKey, ...], name: str) -> tuple[KeySlot, ...]:
    opens = []
    for slot in seal.slots:
        found = [data_key for key in keys if (data_key := unwrap(slot, key, seal.uuid, name)) is not None]
        for data_key in found:
            wipe(data_key)
        if found:
            opens.append(slot)
    return tuple(opens)


def _free_label(label: str, taken: set[str]) -> str:
    number, free = 2, label
    while free in taken:
        number, free = number + 1, f"{label} {number}"
    return free
