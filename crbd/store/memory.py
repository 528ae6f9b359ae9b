"""State that lives as long as the process: the ephemeral store."""

from __future__ import annotations

from collections.abc import Mapping

from crbd.errors import StoreError
from crbd.state.document import Document
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.store.port import Estate
from crbd.store.snapshot import plain_snapshot, read_plain_snapshot


class MemoryStore:
    """A `Store` without a file. `initial` and `side` are what it holds at first. Nobody else can see it, but its lock
    counts.
    """

    def __init__(
        self, initial: Mapping[StateKind, bytes] | None = None, side: SideState | None = None, *, lock: bool = True
    ) -> None:
        self._held: dict[StateKind, bytes] = dict(initial or {})
        self._side = side
        self._engine = EngineStamp(0, 0, 0)
        self._locked = lock

    @property
    def name(self) -> str:
        return "the ephemeral store"

    @property
    def locked(self) -> bool:
        return self._locked

    @property
    def keeps_checkpoints(self) -> bool:
        return True

    @property
    def written(self) -> int | None:
        return None

    def lock(self) -> None:
        self._locked = True

    def release(self) -> None:
        self._locked = False

    def estate(self) -> Estate:
        return Estate(held=dict(self._held), held_side=self._side)

    def use_engine(self, stamp: EngineStamp) -> None:
        self._engine = stamp

    def load(self, kind: StateKind) -> bytes | None:
        return self._held.get(kind)

    def load_side(self) -> SideState | None:
        return self._side

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        if not self._locked:
            raise StoreError(f"{self.name} is not locked, and nothing is written without the lock")
        wanted = {**self._held, **changes}
        if side is not None and wanted.get(StateKind.VOLATILE) is None:
            raise ValueError("registers are kept beside volatile state, and there is none")
        if side is not None or StateKind.VOLATILE in changes:
            self._side = side
        self._held = {kind: data for kind, data in wanted.items() if data is not None}

    def snapshot(self, states: Mapping[StateKind, bytes], side: SideState) -> bytes:
        return plain_snapshot(states, side, self._engine)

    def read_snapshot(self, data: bytes, name: str) -> Document:
        return read_plain_snapshot(data, name)

    def overtake(self, generation: int) -> int | None:
        return None

    def swap_backup(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to release."""
