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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from crbd.errors import (
    StateAbsentError,
    StateError,
    StateForeignError,
    StateUnfinishedError,
    StateWrongKeyError,
    StoreError,
)
from crbd.state.compatibility import check_engine
from crbd.state.document import (
    Document,
    check_complete,
    check_generation,
    check_identity,
    decode,
    encode,
    encode_hashed,
    open_seal,
    peek_header,
    reopen_seal,
    verify,
)
from crbd.state.header import FORMAT_VERSION, MAX_GENERATION
from crbd.state.keys import UserKey
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Identity, TpmState
from crbd.state.sealing import Seal
from crbd.state.side import SideState
from crbd.store.files import make_directory, write_durably
from crbd.store.lockfile import LockFile
from crbd.store.port import Estate
from crbd.store.slots import SlotFile
from crbd.store.snapshot import WRITER, pictured

FILE_NAME = "tpm.crbd"


@dataclass(frozen=True, slots=True)
class NewTpm:
    """What a TPM that is made in a new file is to be called, and which keys seal it (none: plain)."""

    name: str = ""
    keys: tuple[UserKey, ...] = ()
    data_key: bytes = b""
    """In the place of keys: what the process before this one had opened them to. For a TPM that is there."""


class DocumentStore:
    """A `Store` in a directory with a `tpm.crbd`. While it is not locked every `load` opens the file anew."""

    def __init__(
        self,
        directory: Path,
        *,
        create: bool,
        new: NewTpm | None = None,
        uuid: UUID | None = None,
        lock: bool = True,
    ) -> None:
        """Open what is there with the keys in `new`, or, with `create`, prepare a new file, which appears with its
        first commit. `uuid` is the instance that is expected, or that is made.

        Raises a StateError; nothing is changed then but the lock file.
        """
        self._path = directory / FILE_NAME
        self._create = create
        self._new = new or NewTpm()
        self._uuid = uuid
        self._engine: EngineStamp | None = None
        self._ek_fingerprint: bytes | None = None
        self._seal: Seal | None = None
        self._document: Document | None = None
        self._old, self._old_format = b"", FORMAT_VERSION
        """The document of an older format, as long as it has not been kept elsewhere; and its format."""
        self._slots: SlotFile | None = None
        self._lock: LockFile | None = None
        self._overtaken = 0
        if lock:
            self.lock()

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def locked(self) -> bool:
        return self._lock is not None

    @property
    def keeps_checkpoints(self) -> bool:
        return True

    @property
    def written(self) -> int | None:
        return None if self._document is None else self._document.written

    @property
    def document(self) -> Document | None:
        """What the file held when it was last read or written; None where it never was."""
        return self._document

    def lock(self) -> None:
        if self._lock is not None:
            return
        # A TPM that was here once is not made anew.
        create = self._create and self._document is None
        if create:
            make_directory(self._path.parent)
        with ExitStack() as undo:
            lock = LockFile.acquire(self._path.parent / ".lock")
            undo.callback(lock.release)
            if any(self._path.parent.glob("tpm2-00.*")):
                # Made by another process since this one chose the layout.
                raise StateForeignError(
                    f"{self._path.parent} holds state in the swtpm layout by now", "start again, for what is there"
                )
            slots = SlotFile.open(self._path, create=create)
            undo.callback(slots.close)
            undo.callback(self._forget_seal)
            self._read(slots)
            undo.pop_all()
        self._lock, self._slots = lock, slots

    def release(self) -> None:
        self._forget_seal()
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def estate(self) -> Estate:
        if self._document is None and self._new.keys:
            raise StoreError(f"{self._path}: the key cannot be passed on before the TPM is made")
        return Estate(
            lock=None if self._lock is None else self._lock.descriptor,
            data_key=b"" if self._seal is None else self._seal.data_key,
        )

    def use_engine(self, stamp: EngineStamp) -> None:
        self._engine = stamp

    def name_endorsement_key(self, fingerprint: bytes) -> None:
        """What the identity says of it from the next commit on: SHA-256 of its public area, empty for none."""
        self._ek_fingerprint = fingerprint

    def load(self, kind: StateKind) -> bytes | None:
        """Read from the file again: what it holds counts, not what this process remembers."""
        document = self._reread()
        state = None if document is None else document.state(kind)
        if state is None:
            return None
        if self._engine is not None:
            check_engine(state, self._engine, self.name)
        return state.data

    def load_side(self) -> SideState | None:
        document = self._reread()
        if document is None or document.volatile is None or (document.crb is None and document.session is None):
            return None
        return SideState(document.crb, document.session, document.checkpoint)

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        if self._slots is None:
            raise StoreError(f"{self._path} is not locked, and nothing is written without the lock")
        if self._engine is None:
            raise StoreError(f"{self._path}: no engine has said what it is")
        stamp = self._engine
        following = self._following(self._slots)
        wanted = {kind: following.state(kind) for kind in StateKind}
        wanted |= {kind: None if data is None else TpmState(data, stamp) for kind, data in changes.items()}
        if side is not None and wanted[StateKind.VOLATILE] is None:
            raise ValueError("registers are kept beside volatile state, and there is none")
        if side is not None or StateKind.VOLATILE in changes:
            kept = side or SideState()
            following = replace(following, crb=kept.crb, session=kept.session, checkpoint=kept.checkpoint)
        if self._ek_fingerprint is not None:
            following = replace(following, identity=replace(following.identity, ek_fingerprint=self._ek_fingerprint))
        following = replace(
            following,
            permanent=wanted[StateKind.PERMANENT],
            volatile=wanted[StateKind.VOLATILE],
            savestate=wanted[StateKind.SAVESTATE],
        )
        self._keep_old_format()
        try:
            data, digest = encode_hashed(following, self._seal)
        except StateError as error:
            raise StoreError(f"{self._path}: {error}") from error
        self._slots.commit(data, digest)
        self._document = following

    def snapshot(self, states: Mapping[StateKind, bytes], side: SideState) -> bytes:
        if self._document is None or self._engine is None:
            raise StoreError(f"{self._path} holds no TPM yet")
        return encode(pictured(self._document, states, side, self._engine), self._seal)

    def read_snapshot(self, data: bytes, name: str) -> Document:
        header = verify(data, name)
        check_generation(header, name)
        if self._document is None:
            raise StateAbsentError(f"{self._path} holds no TPM yet", "make it of the document: crbd state import")
        check_identity(header, self._document.identity.uuid, name)
        if self._seal is None and header.sealed:
            raise StateError(
                f"{name} is encrypted, and the state that it would replace is not",
                "convert the state first: crbd state convert --new-key",
            )
        try:
            document = decode(data, self._seal, name)
        except StateWrongKeyError:
            # Of before the state was sealed anew; the operator's key may still open it.
            if not self._new.keys:
                raise
            document = decode(data, self._new.keys, name)
        check_complete(document, name)
        return document

    def overtake(self, generation: int) -> int | None:
        self._overtaken = max(self._overtaken, generation)
        return None if self._document is None else self._document.identity.generation

    def swap_backup(self) -> bool:
        return False

    def close(self) -> None:
        self.release()

    def _forget_seal(self) -> None:
        if self._seal is not None:
            self._seal.wipe()
            self._seal = None

    def _reread(self) -> Document | None:
        if self._slots is not None:
            return self._read(self._slots)
        try:
            slots = SlotFile.open(self._path, create=False, writable=False)
        except (StateAbsentError, StateUnfinishedError):
            if self._create:
                return None
            raise
        try:
            return self._read(slots)
        finally:
            slots.close()
            self._forget_seal()

    def _read(self, slots: SlotFile) -> Document | None:
        loaded = slots.load()
        if loaded is None:
            self._document = None
            return None
        if self._uuid is not None:
            check_identity(verify(loaded.payload, self.name), self._uuid, self.name)
        keys: Iterable[UserKey] | Seal | None = self._seal or self._new.keys or None
        if self._seal is None and self._new.keys and peek_header(loaded.payload, self.name).sealed:
            self._seal = open_seal(loaded.payload, self._new.keys, self.name)
            keys = self._seal
        elif self._seal is None and self._new.data_key:
            keys = self._seal = reopen_seal(loaded.payload, self._new.data_key, self.name)
        document = decode(loaded.payload, keys, self.name)
        check_complete(document, self.name)
        self._document = document
        self._old_format = peek_header(loaded.payload, self.name).format_version
        self._old = loaded.payload if self._old_format != FORMAT_VERSION else b""
        return document

    def _following(self, slots: SlotFile) -> Document:
        """The next document, with the states of the present one."""
        now = int(time.time())
        if self._document is None:
            identity = Identity(self._uuid or uuid.uuid4(), self._new.name, 1, WRITER, now)
            if self._new.keys:
                self._seal = Seal.create(identity.uuid, self._new.keys)
            return Document(identity, slots.writer_id, now)
        before = self._document
        generation = max(before.identity.generation, self._overtaken) + 1
        if generation > MAX_GENERATION:
            raise StoreError(f"{self._path} is at generation {generation - 1}, the last there can be")
        identity = replace(before.identity, generation=generation, writer=WRITER)
        return replace(before, identity=identity, writer_id=slots.writer_id, written=now)

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
