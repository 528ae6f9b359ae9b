"""The port behind which frozen state lives.

Locked and unlocked. A store is normally opened locked. Where a TPM may still run elsewhere on the same storage (a
migration) it is opened without the lock: then what lies there can be read, nothing is written and nothing is made,
until `lock`. After `release` it is so again. What was read while the lock was not held says nothing once it is: `lock`
looks at the disk anew, and the caller loads again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from crbd.state.document import Document
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState


@dataclass(frozen=True, slots=True)
class Estate:
    """What a successor process needs to go on with a store without opening it as a stranger would."""

    lock: int | None = None
    """The descriptor that holds the lock; it stays the store's."""
    data_key: bytes = field(default=b"", repr=False)
    """Of sealed state; empty where it is plain."""
    held: Mapping[StateKind, bytes] = field(default_factory=dict, repr=False)
    """What nothing but this process's memory holds."""
    held_side: SideState | None = None
    """What belongs to the volatile state in it."""


class Store(Protocol):
    """Where a TPM's state is kept between runs. Used from one thread at a time."""

    @property
    def name(self) -> str:
        """What messages to the operator call this store: its path, or what else it is."""

    @property
    def locked(self) -> bool:
        """Whether this process is the only user and `commit` may be called."""

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether volatile state that no client asked to be stored may lie there.

        Not in swtpm's layouts: swtpm would go on from it at any INIT. And here all that one commit changes is changed
        in one moment.
        """

    @property
    def written(self) -> int | None:
        """When what is there was written, in seconds since 1970; None where nobody knows."""

    def lock(self) -> None:
        """Become the only user, and look at what is there as if it were opened now.

        Raises a StateError: StateLockedError, or what opening raises; the store is not locked then. Locking twice is
        no error.
        """

    def release(self) -> None:
        """Let another process become the user, until `lock`. Releasing twice is no error. Raises StateAccessError."""

    def estate(self) -> Estate:
        """What goes to a successor. The store stays as it is. Raises StoreError where there is no going on yet."""

    def use_engine(self, stamp: EngineStamp) -> None:
        """Whose state is loaded and committed from now on.

        What is committed is marked with it where the layout has room for that; `load` refuses what a newer engine
        wrote.
        """

    def load(self, kind: StateKind) -> bytes | None:
        """The engine's state as last committed; None where it is truly absent.

        Raises a StateError that names the file where it exists and cannot be read.
        """

    def load_side(self) -> SideState | None:
        """Registers and session that belong to the volatile state that is there now; None where there are none.

        Where they cannot be read or belong to other volatile state, that is logged and None: the TPM starts without
        them.
        """

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        """Make the changes durable (None deletes); when this returns they survive a power cut.

        `side` belongs to the volatile state that is there afterwards and is kept for as long as that is: a commit that
        changes volatile state without giving `side` removes what was kept. Permanent state is written before all else.
        Raises StoreError; each kind is then stored either as before or as wanted, never in between. Raises StoreError
        where the store is not locked, and ValueError for a `side` where no volatile state would be there: nothing was
        written then.
        """

    def snapshot(self, states: Mapping[StateKind, bytes], side: SideState) -> bytes:
        """The TPM with these states as a document: of the store's instance and generation, sealed as the store is.

        Where the layout knows neither, a plain one of an instance made for it. Nothing is written. Raises StoreError
        where there is none to be had.
        """

    def read_snapshot(self, data: bytes, name: str) -> Document:
        """A document as `snapshot` gives it, of this instance and sealed as the store is. Raises a StateError."""

    def overtake(self, generation: int) -> int | None:
        """From now on commits have generations above this one too; returns the present one, None if there are none."""

    def swap_backup(self) -> bool:
        """Exchange the permanent state and its backup; False where none is kept, or there is none.

        For state that the engine rejects: a second call takes it back. Raises StateAccessError.
        """

    def close(self) -> None:
        """Release the lock and everything else. Closing twice is no error."""
