"""State that lives as long as the process: the ephemeral store."""

from __future__ import annotations

from collections.abc import Mapping

from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp


class MemoryStore:
    """A `Store` without a file. `initial` is what it holds at first."""

    def __init__(self, initial: Mapping[StateKind, bytes] | None = None) -> None:
        self._held: dict[StateKind, bytes] = dict(initial or {})

    @property
    def name(self) -> str:
        return "the ephemeral store"

    def lock(self) -> None:
        """Nobody else can see this store."""

    def use_engine(self, stamp: EngineStamp) -> None:
        """The engine does not change while the process lives."""

    def load(self, kind: StateKind) -> bytes | None:
        return self._held.get(kind)

    def commit(self, changes: Mapping[StateKind, bytes | None]) -> None:
        for kind, data in changes.items():
            if data is None:
                self._held.pop(kind, None)
            else:
                self._held[kind] = data

    def close(self) -> None:
        """Nothing to release."""
