"""Between the engine, which changes state in the middle of a command, and the store, which makes changes durable
after it.

What the engine hands over during one call is collected and committed at once when the call is over and before its
answer leaves. Nothing is written for state that did not change. What could not be committed stays wanted and goes
along with the next commit.

Volatile state is stored along with the registers and the session that belong to it (crbd.state.side).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from crbd.errors import StoreError
from crbd.state.kinds import StateKind
from crbd.state.side import SideState
from crbd.store.port import Store

log = logging.getLogger(__name__)


class DurableState:
    """The engine's `StatePort` on top of a `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.pending: dict[StateKind, bytes | None] = {}
        """What waits to be committed, to be looked at only; always the same object."""
        self._committed: dict[StateKind, bytes | None] = {}
        self._side: SideState | None = None
        """What belongs to the volatile state in `pending`."""
        self._outage = ""
        """Why the last commit failed; empty where it did not."""
        self.commits = 0
        """How many commits reached the store."""

    def load(self, kind: StateKind) -> bytes | None:
        """What the engine would find now. Raises a StateError that names the file."""
        if kind in self.pending:
            return self.pending[kind]
        data = self._store.load(kind)
        self._committed[kind] = data
        return data

    def load_side(self) -> SideState | None:
        """What belongs to the volatile state that `load` finds; None where nothing does."""
        return self._side if StateKind.VOLATILE in self.pending else self._store.load_side()

    def store_volatile(self, data: bytes, side: SideState) -> None:
        """Take volatile state with what belongs to it."""
        self.pending[StateKind.VOLATILE] = data
        self._side = side

    def store(self, kind: StateKind, data: bytes) -> None:
        """Take changed state from the engine."""
        self._want(kind, data)

    def delete(self, kind: StateKind) -> None:
        """Take from the engine that a kind of state is no longer valid."""
        self._want(kind, None)

    def commit(self) -> None:
        """Make durable what is pending. Raises StoreError; then it is still pending."""
        if not self.pending:
            return
        # Until the store says yes, nobody knows which of the two is on disk.
        for kind in self.pending:
            self._committed.pop(kind, None)
        self._store.commit(self.pending, self.pending_side)
        self._committed.update(self.pending)
        self.pending.clear()
        self.commits += 1
        if self._outage:
            log.warning("%s takes writes again, and all that the TPM changed is stored", self._store.name)
            self._outage = ""

    def complain(self, error: StoreError) -> None:
        """Log why a commit failed: once until one succeeds, or fails for another reason."""
        if str(error) != self._outage:
            self._outage = str(error)
            log.error("%s; TPM commands are answered with TPM_RC_FAILURE until that works again", error)

    def discard(self) -> None:
        """Forget what is pending: the call that brought it failed as a whole, before anything could depend on it."""
        self.pending.clear()

    def forget(self) -> None:
        """Know nothing any more of what is on disk: others could write there. What was pending is of that time too."""
        self.pending.clear()
        self._committed.clear()

    @property
    def pending_side(self) -> SideState | None:
        """What belongs to the volatile state in `pending`."""
        return self._side if self.pending.get(StateKind.VOLATILE) is not None else None

    def take_over(self, changes: Mapping[StateKind, bytes | None], side: SideState | None) -> None:
        """Take from another instance what it could not commit (None deletes), and what belongs to it."""
        for kind, data in changes.items():
            self._want(kind, data)
        volatile = changes.get(StateKind.VOLATILE)
        if volatile is not None:
            # Even where the store holds the same: what belongs to it may be other.
            self.pending[StateKind.VOLATILE], self._side = volatile, side

    def replace(self, states: Mapping[StateKind, bytes | None], side: SideState | None) -> None:
        """Make durable, whatever is there, that the store holds these states. Raises StoreError."""
        self._committed.clear()
        self._store.commit(states, side)
        self._committed.update(states)
        self.pending.clear()
        self.commits += 1

    def put_back(self, states: Mapping[StateKind, bytes | None], side: SideState | None) -> None:
        """Want that the store holds this and nothing else, whatever a commit that failed left there."""
        self.forget()
        self.pending.update(states)
        self._side = side

    def _want(self, kind: StateKind, data: bytes | None) -> None:
        if kind is StateKind.VOLATILE:
            self._side = None
        if kind in self._committed and self._committed[kind] == data:
            self.pending.pop(kind, None)
        else:
            self.pending[kind] = data
