"""One TPM: an engine, its state and its lifecycle (crbd.service.lifecycle), as the server and the channels use it.

State blobs and the store's lock during a migration: `crbd.service.migration`. Snapshots: `crbd.service.snapshot`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from crbd.crb.effects import Effect, HashData, HashEnd, HashStart
from crbd.engine.port import BufferSize
from crbd.errors import EngineError, EngineFailedError, StateError, StoreError
from crbd.service.frozen import FrozenInstance, freeze_tpm, thaw_tpm
from crbd.service.lifecycle import MAX_LOCALITY, Lifecycle
from crbd.service.migration import retried
from crbd.service.options import InstanceOptions, Startup
from crbd.service.recovery import look_at_stored
from crbd.service.snapshot import NAME, exchange, read_replacement, snapshot_document
from crbd.service.stamp import stamp_of
from crbd.state.crb import snapshot_of
from crbd.state.handover import InstanceFacts
from crbd.state.kinds import StateKind
from crbd.tpm.codes import ResponseCode
from crbd.tpm.head import error_response, response_code, startup_command
from crbd.tpm.results import TpmResult

log = logging.getLogger(__name__)

_FAILURE = error_response(ResponseCode.FAILURE)
_CANCELED = error_response(ResponseCode.CANCELED)


class Instance(Lifecycle):
    """One TPM."""

    # -- start and end

    def check(self) -> None:
        """See, before anything is served, that there is a TPM here or that one may be made.

        Says in the log if the TPM was not shut down. Nothing is changed, except that permanent state may give way to
        its backup (crbd.service.recovery). Raises a StateError that names the file and the remedy. Nothing is looked at
        where state is to come in.
        """
        if self._options.incoming:
            return
        with self._lock:
            if self._state.load(StateKind.PERMANENT) is None:
                self._refuse_unless_new_is_allowed()
            else:
                self._may_manufacture = False
                goes_on = self._options.startup is not Startup.NEED_INIT
                look_at_stored(self._engine, self._state, self._store, goes_on=goes_on)

    def begin(self) -> None:
        """What the options ask for at daemon start:

        power-on and TPM2_Startup. Raises StateError, StoreError, EngineError.
        """
        startup = self._options.startup
        with self._lock:
            if startup is Startup.NEED_INIT:
                return
            self._custody.take(retries=0)
            self._power_on(delete_volatile=False, goes_on=True)
            if startup.startup_type is not None:
                # A TPM that goes on refuses it: it takes nothing from what is stored.
                self._heeds = False
                code = response_code(self._submit(startup_command(startup.startup_type)))
                if code == ResponseCode.INITIALIZE:
                    log.info("the TPM goes on from its stored volatile state; it is started already")
                elif code == ResponseCode.SUCCESS:
                    if not self._checkpoints.after_every_command:
                        self._checkpoints.outdate()
                else:
                    # Where the disk did not take what TPM2_Startup changed, that is what is to be said.
                    self._state.commit()
                    raise EngineFailedError(
                        f"TPM2_Startup({startup.startup_type.name}) was answered with 0x{code or 0:x}",
                        "choose another startup with --flags",
                    )
            self._heed()

    def close(self) -> None:
        """Shut the TPM down and release the store.

        What the last commit could not write is tried once more; failing that is logged as an error.
        """
        with self._lock:
            self._power_off()
            try:
                self._state.commit()
            except StoreError as error:
                log.error("%s; the last change to the TPM is lost", error)
            self._engine.close()
            self._store.close()

    def lay_down(self) -> None:
        """Shut the TPM down, durably, and leave the registers as they are: a guest may look at them until somebody goes
        on with what `freeze` gave before. To be followed by `close`.

        Raises StoreError: the store is as after a crash then.
        """
        with self._lock:
            if self._powered:
                self._shut_down()
                self._powered = self._ready = False
                self._engine.stop()
            self._state.commit()

    def take_a_turn(self) -> None:
        """Have the TPM for a moment, as every user may who waits: returns if nobody keeps it for ever."""
        with self._lock:
            pass

    # -- freeze and thaw

    def freeze(self) -> FrozenInstance:
        """All that this TPM is, once the command under way is answered. The TPM itself is as before.

        Who goes on with the value elsewhere sees to it that this one runs no command any more. Raises EngineError, and
        StoreError in the middle of a migration, when the store is not ours.
        """
        with self._lock:
            self._require_custody()
            return self._freeze()

    def _freeze(self) -> FrozenInstance:
        facts = InstanceFacts(
            powered=self._powered,
            may_manufacture=self._may_manufacture,
            client_sized=self._client_sized,
            untouched=self._first_command is not None and self._last_command is self._first_command,
        )
        return freeze_tpm(
            self._engine,
            self._state,
            self._blobs,
            session=self._session(),
            registers=self._registers.freeze(),
            facts=facts,
        )

    def thaw(self, frozen: FrozenInstance, name: str, *, live_buffer: bool = False) -> None:
        """Go on where another instance stopped: on a new one, instead of `check` and `begin`. `name` goes into errors.

        `live_buffer`: this instance's buffer is the memory that the frozen one had.

        Raises StateError, EngineError; the TPM is OFF then, and nothing was written.
        """
        with self._lock:
            self._thaw(frozen, name, live_buffer=live_buffer)

    def _thaw(self, frozen: FrozenInstance, name: str, *, live_buffer: bool = False) -> None:
        thaw_tpm(self._engine, self._state, self._blobs, frozen, name)
        self._registers.thaw(snapshot_of(frozen.registers), live=live_buffer)
        self._device = self._registers.device
        if frozen.facts.powered:
            self._store.use_engine(stamp_of(self._engine))
        self._powered = self._ready = frozen.facts.powered
        self._adopt(frozen.session)
        self._first_command = self._last_command if frozen.facts.untouched else None
        self._client_sized = frozen.facts.client_sized
        self._may_manufacture = frozen.facts.may_manufacture
        self._checkpoints.survey()
        self._choose_way()

    def make_durable(self) -> None:
        """Commit what a thaw brought along; while that fails commands are answered with TPM_RC_FAILURE."""
        with self._lock:
            try:
                self._state.commit()
            except StoreError as error:
                self._state.complain(error)

    def snapshot(self) -> bytes:
        """All that this TPM is as a document (crbd.service.snapshot), once the command under way is answered.

        Raises EngineError, StateError, StoreError.
        """
        with self._lock:
            self._require_custody()
            if self.served is not None and self.served.executing:
                raise StoreError("the guest has started a command that waits for the TPM: try again")
            side = self._side(None) if self._powered else None
            if side is None and self._blobs.handed_in:
                raise StoreError("state was handed in for the next INIT, and no TPM runs: send INIT first")
            return snapshot_document(self._engine, self._state, self._store, side)

    def restore(self, data: bytes, *, allow_rollback: bool) -> str:
        """Put a document that `snapshot` gave in the place of this TPM, durably; what there is to say of it.

        Raises EngineError, StateError, StoreError; this TPM is as it was then.
        """
        with self._lock:
            self._require_custody()
            self._state.commit()
            old = self._freeze()
            new = read_replacement(self._engine, self._store, data, old, allow_rollback=allow_rollback)
            self._registers.check(snapshot_of(new.frozen.registers))
            try:
                exchange(self._engine, self._state, self._store, new=new, old=old, thaw=partial(self._thaw, name=NAME))
            finally:
                self._powered = self._ready = self._engine.running
                self._checkpoints.survey()
                self._choose_way()
            return new.says

    def checkpoint_when_idle(self) -> None:
        """Store volatile state where it has been left as it is since the last call; failing is logged."""
        with self._lock:
            if not (self._powered and self._custody.held):
                return
            if self._checkpoints.when_idle():
                try:
                    self._state.commit()
                except StoreError as error:
                    self._state.complain(error)

    # -- the registers

    def execute_started(self) -> None:
        """Run the command that the register client has started, if it is still to be run, and show what came of it.

        What it changed is durable then. It runs in locality 0, and the data channel's locality stays what it is.
        """
        if self.served is None:
            return
        if self._contested():
            self._lock.let_others_go_first()
        with self._engine_lock:
            taken = self.served.take()
            if taken is None:
                return
            (command, locality), cancelled = taken
            self.served.complete(_CANCELED if cancelled else self._run_for_registers(command, locality))

    def _run_for_registers(self, command: bytes, locality: int) -> bytes | None:
        """The response, or None where the TPM could not be asked; under the engine lock."""
        try:
            self._go_on()
            if not self._powered:
                return _FAILURE
            if self._heeds or self._uncommitted:
                self._make_way(command)
            self._engine.locality = locality
            response = self._run(command)
            self._last_command = command
            if self._uncommitted:
                self._state.commit()
        except StoreError as error:
            self._state.complain(error)
            return _FAILURE
        except (EngineError, StateError) as error:
            log.error("%s; the registers report a fatal error", error)
            return None
        finally:
            self._engine.locality = self._locality
        return response

    def reset(self) -> None:
        """A platform reset by the register client: of the TPM, which is ON then, and of all registers.

        No stored volatile state outlives it, whoever had it stored: a guest that boots must not find the PCRs of the
        boot before. Raises EngineError, StateError or StoreError; the TPM is OFF then.
        """
        if self.served is not None:
            self.served.cancel()
        self.cancel()
        with self._lock:
            self._power_off()
            with self._custody.taken():
                if self._state.load(StateKind.VOLATILE) is not None:
                    self._state.delete(StateKind.VOLATILE)
                self._power_on(delete_volatile=True, goes_on=False)

    @property
    def localities(self) -> int:
        """How many localities the registers have."""
        return self._registers.localities

    def register_pages(self) -> bytes:
        """The registers as a guest would read them now, a 4 KiB page per locality. Any thread; does not wait."""
        return self._registers.pages()

    # -- the control channel

    @property
    def running(self) -> bool:
        """Whether the TPM is ON."""
        return self._powered

    @property
    def options(self) -> InstanceOptions:
        """As it was made with."""
        return self._options

    def init(self, *, delete_volatile: bool) -> None:
        """Power on, or reset. Raises EngineError, StateError or StoreError; the TPM is OFF then."""
        self.cancel()
        with self._lock:
            self._power_off()
            with self._custody.taken():
                self._power_on(delete_volatile=delete_volatile, goes_on=False)

    def stop(self) -> None:
        """Power off. A command that still computes is cancelled: its answer no longer matters."""
        self.cancel()
        with self._lock:
            self._power_off()

    def established(self) -> bool:
        """The tpmEstablished flag. Raises EngineError."""
        with self._lock:
            return self._is_established()

    def reset_established(self, locality: int) -> None:
        """Clear the flag on behalf of `locality`.

        Raises EngineError (TPM_BAD_LOCALITY where that is not 3 or 4), StateError, StoreError.
        """
        with self._lock:
            if locality > MAX_LOCALITY or not self._registers.reset_establishment(locality):
                raise EngineError("RESET_TPMESTABLISHED", TpmResult.BAD_LOCALITY)
            self._go_on()
            self._engine.reset_established(locality)
            self._established_before = False
            self._registers.set_established(self._is_established())
            self._state.commit()
            self._checkpoints.refresh()

    def set_locality(self, locality: int) -> None:
        """The locality of all commands from now on. Raises EngineError with TPM_BAD_LOCALITY."""
        with self._lock:
            if not self._locality_is_allowed(locality):
                raise EngineError("SET_LOCALITY", TpmResult.BAD_LOCALITY)
            self._settle_in(locality)

    def hash_start(self) -> None:
        """Begin a locality-4 hash sequence. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._go_on()
            self._first_command = None
            self._checkpoints.outdate()
            self._hash(self._registers.hash_start())

    def hash_data(self, data: bytes) -> None:
        """Add to the hash sequence. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._checkpoints.outdate()
            self._hash(self._registers.hash_data(data))

    def hash_end(self) -> None:
        """End the hash sequence. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._go_on()
            self._hash(self._registers.hash_end())
            self._registers.set_established(self._is_established())
            if self._checkpoints.after_every_command:
                self._checkpoints.after(b"", None)
            self._state.commit()
            self._heed()

    def _hash(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case HashStart():
                    self._engine.hash_start()
                case HashData(data):
                    self._engine.hash_data(data)
                case HashEnd():
                    self._engine.hash_end()

    def store_volatile(self) -> None:
        """Write the volatile state to the store. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._go_on()
            self._checkpoints.store()
            self._heed()

    def state_blob(self, kind: StateKind, *, decrypted: bool = True, offset: int = 0) -> bytes | None:
        """The state in swtpm's migration form, from `offset` on; None where there is none.

        `decrypted`: without the file key's encryption, where there is a file key. With the last kind, the savestate,
        the store's lock goes where the options say so. Raises EngineError, StoreError, StateError.
        """
        with self._lock:
            self._go_on()
            blob = self._blobs.hand_out(kind, self._session, decrypted=decrypted, offset=offset)
            if kind is StateKind.VOLATILE:
                self._checkpoints.forget()
                self._heed()
            if kind is StateKind.SAVESTATE and self._options.release_lock_outgoing:
                self._custody.give_up()
                self._ready = False
        return blob

    def set_state_blob(self, kind: StateKind, blob: bytes, *, encrypted: bool = False) -> None:
        """Hand in state in swtpm's migration form for the next `init`;

        an empty blob takes it back. `encrypted`: its state is encrypted by the file key. Raises EngineError,
        StateError.
        """
        with self._lock:
            if self._powered:
                # A TPM that runs keeps its lock, whatever becomes of the blob.
                raise EngineError("SET_STATEBLOB of a TPM that is on", TpmResult.BAD_ORDINAL)
            self._take_blob(kind, blob, encrypted=encrypted)

    def _take_blob(self, kind: StateKind, blob: bytes, *, encrypted: bool) -> None:
        with self._custody.taken():
            self._blobs.hand_in(kind, blob, encrypted=encrypted)

    def buffer_size(self, wanted: int) -> BufferSize:
        """Ask for (0) or set the buffer size. Raises EngineError where it is to change while the TPM is ON."""
        with self._lock:
            size = self._engine.buffer_size(wanted)
            self._client_sized = self._client_sized or wanted > 0
            return size

    def info(self, flags: int) -> str:
        """JSON text about the TPM. Raises EngineError."""
        with self._lock:
            return self._engine.info(flags)

    def lock_storage(self, retries: int) -> None:
        """Hold the store's lock again, trying up to `retries` more times, 10 ms apart.

        Raises StateError when it is not obtained, StoreError when the TPM has gone on elsewhere.
        """
        retried(self._lock_storage_now, retries)

    def _lock_storage_now(self) -> None:
        with self._lock:
            if self._powered:
                self._go_on(retries=0)
            else:
                self._custody.take(retries=0)
