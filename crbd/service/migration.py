"""What a migration needs of a TPM: its state as blobs, and the store's lock handed from one process to the other.

Theory. A TPM moves in three blobs, which the client (QEMU) fetches here and sets there:

    source                                          destination
    GET_STATEBLOB permanent, volatile, savestate
                                                    SET_STATEBLOB permanent, volatile; INIT

Where both have a store of their own, that is all. Where they share one (`release_lock_outgoing` here, `incoming`
there), the lock says who may run the TPM. The source gives it up when the savestate blob was asked for, which is the
last thing a client asks for; the destination takes it with the first blob, before anything is written. A source that
is told to go on (a command, LOCK_STORAGE) takes the lock back and compares what lies in the store with what it left
there. Equal: the destination has not worked on it, and the TPM in memory is the TPM. Different: the TPM
lives on over there, and this one never answers again before an INIT makes it anew from the store. A source that has
given the lock up and is not told to go on writes nothing more, not even a TPM2_Shutdown; a destination that has run no
command yet writes nothing but what it was handed, so that it can fail without harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256

from crbd.engine.port import Engine
from crbd.errors import CrbdError, EngineError, StateLockedError, StoreFencedError
from crbd.service.durable import DurableState
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.swtpm import MAX_BLOB, encode_migration, open_migration
from crbd.store.port import Store
from crbd.tpm.results import TpmResult

LOCK_RETRY_INTERVAL = 0.010
"""Seconds between two tries (swtpm's figure)."""
MAX_LOCK_RETRIES = 6000
"""Whatever LOCK_STORAGE says: a minute."""


def retried(lock: Callable[[], None], retries: int) -> None:
    """Call `lock`, and up to `retries` times again as long as another process holds the lock.

    Raises StateLockedError, and what else `lock` raises.
    """
    for _ in range(min(retries, MAX_LOCK_RETRIES)):
        try:
            return lock()
        except StateLockedError:
            time.sleep(LOCK_RETRY_INTERVAL)
    return lock()


class StateBlobs:
    """State blobs on their way out and in. Under the engine lock.

    Who fetches a blob in pieces gets pieces of one and the same blob: what offset 0 was answered with is kept until
    the next offset 0 of that kind, or power-on or -off.
    """

    def __init__(self, engine: Engine, state: DurableState, options: InstanceOptions) -> None:
        self._engine = engine
        self._state = state
        self._options = options
        self._going_out: dict[tuple[StateKind, bool], bytes] = {}
        self.handed_in: frozenset[StateKind] = frozenset()
        """The kinds that the next power-on takes from blobs."""
        self.session: Session | None = None
        """What came along with the volatile blob."""

    def hand_out(
        self, kind: StateKind, session: Callable[[], Session], *, decrypted: bool, offset: int
    ) -> bytes | None:
        """The blob from `offset` on; None where there is no such state.

        `session` goes along with volatile state. Stored volatile state is removed when volatile state is handed out,
        as swtpm does: who has the blob goes on from it, and it must not be used twice. Raises EngineError, StoreError,
        StateError.
        """
        which = kind, decrypted
        if offset == 0 or which not in self._going_out:
            blob = self._made(kind, session, decrypted)
            if blob is None:
                return None
            self._going_out[which] = blob
        return self._going_out[which][offset:]

    def _made(self, kind: StateKind, session: Callable[[], Session], decrypted: bool) -> bytes | None:
        data = self._engine.get_state(kind)
        if kind is StateKind.VOLATILE and self._state.load(StateKind.VOLATILE) is not None:
            self._state.delete(StateKind.VOLATILE)
            self._state.commit()
        if data is None:
            return None
        blob = encode_migration(
            data,
            self._options.migration_key,
            None if decrypted else self._options.file_key,
            session=session() if kind is StateKind.VOLATILE else None,
        )
        if len(blob) > MAX_BLOB:
            raise EngineError(f"a state blob of {len(blob)} bytes", TpmResult.SIZE)
        return blob

    def hand_in(self, kind: StateKind, blob: bytes, *, encrypted: bool) -> None:
        """Take a blob for the next power-on; an empty one takes it back. Raises EngineError, StateError.

        `encrypted`: the client says that the state is encrypted by the file key.
        """
        options, name = self._options, f"the {kind.nvram_name} state blob"
        opened = None
        if blob:
            opened = open_migration(blob, name, options.migration_key, options.file_key, encrypted=encrypted)
        # The engine forgets every blob when it rejects one, and all of them with the permanent one.
        kept = frozenset() if kind is StateKind.PERMANENT and opened is None else self.handed_in - {kind}
        session = None if kind is StateKind.VOLATILE else self.session
        self.forget()
        self._engine.set_state(kind, None if opened is None else opened.state)
        self.handed_in = kept if opened is None else kept | {kind}
        if StateKind.VOLATILE in self.handed_in:
            self.session = opened.session if opened is not None and kind is StateKind.VOLATILE else session

    def take_over(self, handed_in: frozenset[StateKind], session: Session | None) -> None:
        """The engine was given another instance's blobs, of these kinds and with this session."""
        self.handed_in, self.session = handed_in, session

    def forget(self) -> None:
        """The TPM was powered on or off: what was handed in is used up, what goes out is of another time."""
        self._going_out.clear()
        self.handed_in = frozenset()
        self.session = None


class Custody:
    """Whether this process may run the TPM that lies in the store. Under the engine lock.

    The store's lock is held from the start, or (incoming) from `take` on.
    """

    def __init__(self, store: Store, state: DurableState, options: InstanceOptions) -> None:
        self._store = store
        self._state = state
        self._patience = options.lock_retries
        self._incoming = options.incoming
        self._left: dict[StateKind, bytes] = {}
        """Digests of what lay in the store when the lock was given up; empty where it was not."""
        self._retries = 0

    @property
    def held(self) -> bool:
        """Whether the store's lock is."""
        return self._store.locked

    def take(self, retries: int | None = None) -> None:
        """Hold the lock for a TPM that is made anew: from what lies in the store, or from blobs.

        `retries`: None for as many as the options say. Raises StateLockedError, or what stands in the way of the
        store's use.
        """
        if not self.held:
            self._lock(self._patience if retries is None else retries)
        self._left = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """`take`, for what is done in the context; a destination in which that fails leaves the storage to others."""
        self.take()
        try:
            yield
        except CrbdError:
            if self._incoming:
                self._store.release()
            raise

    def give_up(self) -> None:
        """The TPM may go on elsewhere. Raises StoreError (the lock is kept then), StateError."""
        # What a destination stores when it starts is what it was handed: no other than what is committed here.
        self._state.commit()
        self._left = self._digests()
        self._store.release()
        self._retries = self._patience

    def go_on(self, retries: int | None = None) -> None:
        """Hold the lock for the TPM that is in memory; nothing to do where it is held.

        `retries`: None for as many as are due, many at first, none once that was in vain. Raises StateLockedError, or
        StoreFencedError where the TPM lives on elsewhere.
        """
        if self.held:
            return
        if retries is None:
            retries, self._retries = self._retries, 0
        self._lock(retries)
        if self._left and self._digests() != self._left:
            self._store.release()
            raise StoreFencedError(
                f"{self._store.name} was changed since its lock was given up: the TPM goes on elsewhere, not here"
            )
        self._left = {}

    def _digests(self) -> dict[StateKind, bytes]:
        found = {kind: self._store.load(kind) for kind in StateKind}
        return {kind: b"" if data is None else sha256(data).digest() for kind, data in found.items()}

    def _lock(self, retries: int) -> None:
        retried(self._store.lock, retries)
        # Whatever was known of the disk is old.
        self._state.forget()
