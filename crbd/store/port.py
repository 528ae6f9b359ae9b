"""The port behind which frozen state lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp


class Store(Protocol):
    """Where a TPM's state is kept between runs. Used from one thread at a time."""

    @property
    def name(self) -> str:
        """What messages to the operator call this store: its path, or what else it is."""

    def lock(self) -> None:
        """Become the only user. Raises StateLockedError, StateAccessError; locking twice is no error."""

    def use_engine(self, stamp: EngineStamp) -> None:
        """Whose state is loaded and committed from now on.

        What is committed is marked with it where the layout has room for that; `load` refuses what a newer engine
        wrote.
        """

    def load(self, kind: StateKind) -> bytes | None:
        """The engine's state as last committed; None where it is truly absent.

        Raises a StateError that names the file where it exists and cannot be read.
        """

    def commit(self, changes: Mapping[StateKind, bytes | None]) -> None:
        """Make the changes durable (None deletes); when this returns they survive a power cut.

        Permanent state is written before all else. Raises StoreError; each kind is then stored either as before or as
        wanted, never in between.
        """

    def close(self) -> None:
        """Release the lock and everything else. Closing twice is no error."""
