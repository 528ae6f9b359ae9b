"""A copy of a store's TPM to work on, made the state by one commit; and the mark of a run that is under way."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from crbd.errors import StateAccessError, StateWriteError, StoreError
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.store.document import DocumentStore
from crbd.store.memory import MemoryStore
from crbd.store.port import Store

MARK: Final = ".provisioning"
"""Name of the file in a state directory that says that a run is under way, or was interrupted."""


class StagedStore(MemoryStore):
    """A store in memory over another one, which is read (if it `keeps` what is there) and not written.

    Reading it is as reading the other: it raises the same errors, and the engine that uses it is known to the other.
    """

    def __init__(self, behind: Store, *, keeps: bool) -> None:
        super().__init__()
        self._behind = behind
        self._unread = {StateKind.PERMANENT} if keeps else set()
        self.stamp: EngineStamp | None = None
        """The engine that used it last."""

    @property
    def name(self) -> str:
        return self._behind.name

    def use_engine(self, stamp: EngineStamp) -> None:
        self.stamp = stamp
        self._behind.use_engine(stamp)

    def load(self, kind: StateKind) -> bytes | None:
        if kind in self._unread:
            data = self._behind.load(kind)
            self._unread.discard(kind)
            super().commit({kind: data})
        return super().load(kind)

    def publish(self, ek_fingerprint: bytes | None = None) -> None:
        """Make the permanent state that is here the state of the store behind, in one commit.

        `ek_fingerprint` goes into the identity where the layout has one: SHA-256 of the endorsement key's public area,
        empty for none, None for the one that was there.

        What volatile state of another TPM was there goes with it. Raises StateWriteError; all is as before then.
        """
        nothing: dict[StateKind, bytes | None] = dict.fromkeys(StateKind)
        try:
            if ek_fingerprint is not None and isinstance(self._behind, DocumentStore):
                self._behind.name_endorsement_key(ek_fingerprint)
            self._behind.commit(nothing | {StateKind.PERMANENT: self.load(StateKind.PERMANENT)})
        except StoreError as error:
            raise StateWriteError.of(error) from error


class RunMark:
    """A file in the state directory for as long as a run lasts. A context manager.

    It is no part of the state, and nothing depends on it but what is said: one that is there at the beginning was left
    by a run that was killed, or by a power cut.
    """

    def __init__(self, directory: Path | None) -> None:
        """The store in `directory` is locked. Without a directory there is no mark."""
        self._path = None if directory is None else directory / MARK
        self.was_interrupted = False
        """Whether an earlier run did not come to its end."""

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self.was_interrupted = self._path.exists()
                self._path.write_text(f"{os.getpid()}\n")
            except OSError as error:
                raise StateAccessError(
                    f"{self._path} cannot be written: {error.strerror}", "make room, or let this user write there"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
