"""A store whose disk can be taken away."""

from __future__ import annotations

from collections.abc import Mapping

from crbd.errors import StateLockedError, StoreError
from crbd.state.kinds import StateKind
from crbd.state.side import SideState
from crbd.store.memory import MemoryStore


class FailingStore(MemoryStore):
    """In memory. While `full` is set commits fail; while `lock_refusals` is above 0 so does locking.

    `commits` counts the good ones.
    """

    def __init__(self, initial: Mapping[StateKind, bytes] | None = None) -> None:
        super().__init__(initial)
        self.full = False
        self.lock_refusals = 0
        self.commits = 0
        self.closed = False

    def lock(self) -> None:
        if self.lock_refusals:
            self.lock_refusals -= 1
            raise StateLockedError("the store is in use", "wait")
        super().lock()
        super().lock()

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        if self.full:
            raise StoreError("no space left on device")
        self.commits += 1
        super().commit(changes, side)

    def close(self) -> None:
        self.closed = True
