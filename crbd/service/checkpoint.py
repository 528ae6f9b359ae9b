"""What of a TPM's volatile state lies in the store, and what may be gone on from. docs/decisions/0005-checkpoints.md.

Theory. Volatile state gets into the store because a client asks (STORE_VOLATILE), or as a checkpoint, of the daemon's
own accord. Either way it is there only as long as it is *the TPM's*: as of the last answered command that changed the
TPM. So whoever finds it goes on without a gap, or does not find it. The next such command either removes it, durably
and before it is run, or (with a checkpoint for every command) is stored in its place before it is answered.

    asked for       used by the next power-on, whichever way that comes: what STORE_VOLATILE is for
    checkpoint      used by a daemon that powers the TPM on by itself at its start (not-need-init and its like); INIT
                    is the reset of a platform, and passes it over. Gone when the TPM is powered off in good order

A checkpoint when idle costs a commit when the TPM has come to rest, and one when it is used again. What a TPM does at
power-off by itself (TPM2_Shutdown) does not take from a client what it had stored: so swtpm's clients know it.
"""

from __future__ import annotations

from collections.abc import Callable

from crbd.engine.port import Engine
from crbd.errors import EngineError, StateError
from crbd.service.durable import DurableState
from crbd.service.options import CheckpointPolicy
from crbd.state.kinds import StateKind
from crbd.state.side import SideState
from crbd.tpm.codes import Tag

_ASKS = frozenset(
    code.to_bytes(4, "big")
    for code in (
        *(0x169, 0x173, 0x178),  # NV_ReadPublic, ReadPublic, ECC_Parameters
        *(0x17A, 0x17C, 0x17E),  # GetCapability, GetTestResult, PCR_Read
        *(0x181, 0x18A),  # ReadClock, TestParms
    )
)
"""Command codes (TPM 2.0 Part 2, 6.5.2) that leave PCRs, objects, sessions and the random number generator alone, if
no session is used with them: its nonce would change."""
_NO_SESSIONS = Tag.NO_SESSIONS.to_bytes(2, "big")


def changes_tpm(command: bytes) -> bool:
    """Whether a command may change volatile state that matters."""
    return command[6:10] not in _ASKS or command[:2] != _NO_SESSIONS


class Checkpoints:
    """The stored volatile state of one TPM. Under the engine lock.

    `side` makes what belongs to it, as of now or, with a response, as of when that has been given.
    """

    def __init__(
        self,
        engine: Engine,
        state: DurableState,
        policy: CheckpointPolicy,
        side: Callable[[bytes | None], SideState],
    ) -> None:
        self._engine = engine
        self._state = state
        self._policy = policy
        self._side = side
        self.kept: SideState | None = None
        """What lies in the store, without its registers; None where no volatile state does."""
        self._changes = 0
        self._stored = 0
        """The count of changes when volatile state was last stored or given away."""
        self._seen = 0
        """The same when it was last seen whether the TPM is idle."""

    @property
    def heeds_commands(self) -> bool:
        """Whether `before` is to be called before each command."""
        return self.kept is not None or self._policy != CheckpointPolicy()

    @property
    def after_every_command(self) -> bool:
        """Whether `after` is to be called."""
        return self._policy.every_command

    def survey(self) -> None:
        """The TPM was powered on, thawed or exchanged: see what lies in the store."""
        try:
            found = self._state.load(StateKind.VOLATILE) is not None
            self.kept = (self._state.load_side() or SideState()) if found else None
        except StateError:
            # Whatever it is, the TPM does not go on from it: the next change removes it.
            self.kept = SideState()
        self._stored = self._seen = self._changes

    def forget(self) -> None:
        """The TPM is off, or its volatile state goes elsewhere: no checkpoint before the next change."""
        self.kept = None
        self._stored = self._changes

    def before(self, command: bytes) -> None:
        """See to it that what is stored is not outdated by the command. Raises StoreError; it must not run then."""
        if changes_tpm(command):
            if self._policy.every_command:
                self._changes += 1
            else:
                self.outdate()

    def outdate(self) -> None:
        """The TPM is about to change otherwise. Raises StoreError; it must not then."""
        self._changes += 1
        self.drop()

    def after(self, command: bytes, response: bytes | None) -> None:
        """Put the checkpoint of a command that was run to what is committed before its answer leaves."""
        if changes_tpm(command):
            self._put(checkpoint=True, response=response)

    def when_idle(self) -> bool:
        """To be called every so often: whether a checkpoint was put to what is to be committed."""
        idle, self._seen = self._seen == self._changes, self._changes
        if not idle or self._stored == self._changes or self._policy.when_idle is None:
            return False
        self._put(checkpoint=True)
        return self.kept is not None

    def store(self) -> None:
        """A client asks for it. Raises EngineError, StoreError."""
        self._put(checkpoint=False)
        self._state.commit()

    def refresh(self) -> None:
        """Locality or flags changed, and no more: bring what is stored up to date. Raises EngineError, StoreError."""
        if self.kept is not None:
            self._put(checkpoint=self.kept.checkpoint)
            self._state.commit()

    def drop(self) -> None:
        """Remove what is stored, durably. Raises StoreError; nothing may change then."""
        if self.kept is not None:
            self._state.delete(StateKind.VOLATILE)
            self._state.commit()
            self.kept = None

    def drop_checkpoint(self) -> None:
        """The power goes: leave only what a client asked for. Raises StoreError."""
        if self.kept is not None and self.kept.checkpoint:
            self.drop()

    def _put(self, *, checkpoint: bool, response: bytes | None = None) -> None:
        try:
            data = self._engine.get_state(StateKind.VOLATILE)
        except EngineError:
            if not checkpoint:
                raise
            # A TPM in failure mode has none: nothing to go on from.
            data = None
        if data is None:
            self._state.delete(StateKind.VOLATILE)
            self.kept = None
        else:
            side = self._side(response)
            self._state.store_volatile(data, SideState(side.crb, side.session, checkpoint))
            self.kept = SideState(checkpoint=checkpoint)
        self._stored = self._changes
