"""crbd's own layout: one file, `tpm.crbd`, with the whole TPM as a document, in two slots written in turn.

Theory. The store holds the last document in memory and turns each commit into the next one: changed states replaced,
all else (the identity, sections of a later release that may be skipped) carried on. The document's generation is one
above that of the document it follows; a failed commit leaves the document in memory as it was, so that what is in
memory is always what the file is known to hold.

A document of an older format is upgraded when it is next written, not when it is read. The bytes as they were go into
a file beside it first, `tpm.crbd.format-N`, durably, and stay there until somebody removes them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from crbd import __version__
from crbd.errors import StoreError
from crbd.state.compatibility import check_engine
from crbd.state.document import Document, check_complete, decode, encode, open_seal, peek_header
from crbd.state.header import FORMAT_VERSION
from crbd.state.keys import UserKey
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Identity, TpmState
from crbd.state.sealing import Seal
from crbd.store.files import write_durably
from crbd.store.lockfile import LockFile
from crbd.store.slots import SlotFile

FILE_NAME = "tpm.crbd"
WRITER = f"crbd {__version__}"


@dataclass(frozen=True, slots=True)
class NewTpm:
    """What a TPM that is made in a new file is to be called, and which keys seal it (none: plain)."""

    name: str = ""
    keys: tuple[UserKey, ...] = ()


class DocumentStore:
    """A `Store` in a directory with a `tpm.crbd`. It is locked from the beginning."""

    def __init__(self, directory: Path, *, create: bool, new: NewTpm | None = None) -> None:
        """Open what is there with the keys in `new`, or, with `create`, prepare a new file, which appears with its
        first commit.

        Raises a StateError; nothing is changed then but the lock file.
        """
        self._path = directory / FILE_NAME
        self._new = new or NewTpm()
        self._engine: EngineStamp | None = None
        self._seal: Seal | None = None
        self._document: Document | None = None
        self._old, self._old_format = b"", FORMAT_VERSION
        """The document of an older format, as long as it has not been kept elsewhere; and its format."""
        self._lock: LockFile | None = LockFile.acquire(directory / ".lock")
        try:
            self._slots = SlotFile.open(self._path, create=create)
        except BaseException:
            self._lock.release()
            raise
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def document(self) -> Document | None:
        """What the file holds; None before the first commit to a new one."""
        return self._document

    def lock(self) -> None:
        if self._lock is None:
            self._lock = LockFile.acquire(self._path.parent / ".lock")

    def use_engine(self, stamp: EngineStamp) -> None:
        self._engine = stamp

    def load(self, kind: StateKind) -> bytes | None:
        """Read from the file again: what it holds counts, not what this process remembers."""
        self._read()
        state = None if self._document is None else self._document.state(kind)
        if state is None:
            return None
        if self._engine is not None:
            check_engine(state, self._engine, self.name)
        return state.data

    def commit(self, changes: Mapping[StateKind, bytes | None]) -> None:
        if self._engine is None:
            raise StoreError(f"{self._path}: no engine has said what it is")
        stamp = self._engine
        following = self._following()
        wanted = {kind: following.state(kind) for kind in StateKind}
        wanted |= {kind: None if data is None else TpmState(data, stamp) for kind, data in changes.items()}
        following = replace(
            following,
            permanent=wanted[StateKind.PERMANENT],
            volatile=wanted[StateKind.VOLATILE],
            savestate=wanted[StateKind.SAVESTATE],
        )
        self._keep_old_format()
        self._slots.commit(encode(following, self._seal))
        self._document = following

    def close(self) -> None:
        if self._seal is not None:
            self._seal.wipe()
        self._slots.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read(self) -> None:
        loaded = self._slots.load()
        if loaded is None:
            self._document = None
            return
        keys: Iterable[UserKey] | Seal | None = self._seal or self._new.keys or None
        if self._seal is None and self._new.keys and peek_header(loaded.payload, self.name).sealed:
            self._seal = open_seal(loaded.payload, self._new.keys, self.name)
            keys = self._seal
        document = decode(loaded.payload, keys, self.name)
        check_complete(document, self.name)
        self._document = document
        self._old_format = peek_header(loaded.payload, self.name).format_version
        self._old = loaded.payload if self._old_format != FORMAT_VERSION else b""

    def _following(self) -> Document:
        """The next document, with the states of the present one."""
        now = int(time.time())
        if self._document is None:
            identity = Identity(uuid.uuid4(), self._new.name, 1, WRITER, now)
            if self._new.keys:
                self._seal = Seal.create(identity.uuid, self._new.keys)
            return Document(identity, self._slots.writer_id, now)
        before = self._document
        identity = replace(before.identity, generation=before.identity.generation + 1, writer=WRITER)
        return replace(before, identity=identity, writer_id=self._slots.writer_id, written=now)

    def _keep_old_format(self) -> None:
        """Before the first write over a document of an older format: keep its bytes. Raises StoreError."""
        if not self._old:
            return
        kept = self._path.with_name(f"{FILE_NAME}.format-{self._old_format}")
        try:
            write_durably(kept, self._old)
        except OSError as error:
            raise StoreError(f"{kept} could not be written: {error.strerror}; the state stays as it was") from error
        self._old = b""
