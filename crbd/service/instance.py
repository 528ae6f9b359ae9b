"""One TPM: an engine, its state and its lifecycle.

Theory. An instance is OFF or ON.

    OFF --init--> ON           power-on; state comes from the store, or from blobs handed in by `set_state_blob`
    ON  --init--> ON           a reset: automatic TPM2_Shutdown if one is needed, power-off, power-on
    ON  --stop--> OFF          automatic TPM2_Shutdown, power-off
    any --close--> gone        as stop; the store is released

The automatic TPM2_Shutdown(STATE), with CLEAR as the fallback, is sent when the last command was not a TPM2_Shutdown
already. Without it every power-off looks like a power cut to the TPM, whose dictionary-attack counter then locks
guests out (swtpm does the same).

State blobs and the store's lock during a migration: `crbd.service.migration`.

A new TPM is made in one place, `_power_on`, and only if the options allow it, the store holds no permanent state, and
no blob was handed in. Permission is used up by the first success: state that vanishes under a running daemon is never
replaced by a new TPM.

Threads. The data pump calls `execute`; control commands come from other threads. All of it that touches the engine or
the store goes under one lock, the engine lock. `cancel` and the properties do not, so they answer while a command
computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from crbd.crb.config import CrbConfig
from crbd.crb.effects import Busy, Effect, HashData, HashEnd, HashStart
from crbd.engine.port import BufferSize, Engine, StatePort
from crbd.errors import EngineError, EngineFailedError, StateAbsentError, StateError, StoreError
from crbd.service.durable import DurableState
from crbd.service.frozen import FrozenInstance, freeze_tpm, thaw_tpm
from crbd.service.judgement import hand_in
from crbd.service.lock import EngineLock
from crbd.service.migration import Custody, StateBlobs, retried
from crbd.service.options import InstanceOptions, Startup
from crbd.service.registers import Registers
from crbd.service.served import BUFFER_SIZE, ServedRegisters
from crbd.service.stamp import stamp_of
from crbd.state.crb import snapshot_of
from crbd.state.handover import InstanceFacts
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.store.port import Store
from crbd.tpm.codes import CommandCode, ResponseCode, StartupType
from crbd.tpm.head import HEAD_SIZE, error_response, response_code, shutdown_command, startup_command, success_response
from crbd.tpm.results import TpmResult

log = logging.getLogger(__name__)

MAX_LOCALITY = 4

_FAILURE = error_response(ResponseCode.FAILURE)
_RETRY = error_response(ResponseCode.RETRY)
_CANCELED = error_response(ResponseCode.CANCELED)
_BAD_LOCALITY = error_response(ResponseCode.LOCALITY)
_SHUTDOWN = CommandCode.SHUTDOWN.to_bytes(4, "big")
_VENDOR_SET_LOCALITY = CommandCode.VENDOR_SET_LOCALITY.to_bytes(4, "big")


class Instance:
    """One TPM. `make_engine` is given the state port and returns a stopped engine.

    `buffer` is the data buffer of the registers that are served, if the options have any: memory shared with a guest.
    """

    def __init__(
        self,
        make_engine: Callable[[StatePort], Engine],
        store: Store,
        options: InstanceOptions,
        buffer: memoryview | None = None,
    ) -> None:
        self._store = store
        self._state = DurableState(store)
        self._engine = make_engine(self._state)
        self._options = options
        store.use_engine(stamp_of(self._engine))
        self._may_manufacture = options.may_manufacture
        limit = self._engine.buffer_size().maximum
        self.served: ServedRegisters | None = None
        """For the register client, if the options have one."""
        if options.serves_registers:
            self.served = ServedRegisters(buffer or memoryview(bytearray(BUFFER_SIZE)), limit, self._engine.cancel)
        self._registers = Registers(CrbConfig(max_command=limit), self.served)
        # What the way of a command touches, one look-up away.
        self._device, self._device_lock = self._registers.device, self._registers.lock
        self._run = self._engine.execute
        self._uncommitted = self._state.pending
        self._hears_vendor_command = options.allow_set_locality
        self._locality = 0
        self._powered = False
        self._lock = EngineLock()
        self._engine_lock, self._contested = self._lock.engine, self._lock.contested
        self._last_command = b""
        self._blobs = StateBlobs(self._engine, self._state, options)
        self._custody = Custody(store, self._state, options)
        self._ready = False
        """Whether the TPM is ON and the store's lock is held: then commands are executed."""
        self._established_before = False
        """The tpmEstablished flag as it came with a state blob; no engine can be told to set its own."""
        self._client_sized = False
        """Whether a client set the buffer size."""
        self._first_command: bytes | None = None
        """`_last_command` as it came with state blobs: as long as it is the same object, this TPM ran no command."""

    # -- start and end

    def check(self) -> None:
        """See, before anything is served, that there is a TPM here or that one may be made; nothing is changed.

        Raises a StateError that names the file and the remedy. Nothing is looked at where state is to come in.
        """
        if self._options.incoming:
            return
        with self._lock:
            permanent = self._state.load(StateKind.PERMANENT)
            if permanent is None:
                self._refuse_unless_new_is_allowed()
                return
            hand_in(self._engine, StateKind.PERMANENT, permanent, self._store.name)
            self._engine.set_state(StateKind.PERMANENT, None)

    def begin(self) -> None:
        """What the options ask for at daemon start:

        power-on and TPM2_Startup. Raises StateError, StoreError, EngineError.
        """
        startup = self._options.startup
        with self._lock:
            if startup is Startup.NEED_INIT:
                return
            self._custody.take(retries=0)
            self._power_on(delete_volatile=False)
            if startup.startup_type is not None:
                code = response_code(self._submit(startup_command(startup.startup_type)))
                if code == ResponseCode.INITIALIZE:
                    log.info("the TPM goes on from its stored volatile state; it is started already")
                elif code != ResponseCode.SUCCESS:
                    raise EngineFailedError(
                        f"TPM2_Startup({startup.startup_type.name}) was answered with 0x{code or 0:x}",
                        "choose another startup with --flags",
                    )

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

    # -- freeze and thaw

    def freeze(self) -> FrozenInstance:
        """All that this TPM is, once the command under way is answered. The TPM itself is as before.

        Who goes on with the value elsewhere sees to it that this one runs no command any more. Raises EngineError, and
        StoreError in the middle of a migration, when the store is not ours.
        """
        with self._lock:
            if not self._custody.held:
                raise StoreError(f"the lock of {self._store.name} is given up: a migration is under way")
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
            thaw_tpm(self._engine, self._state, self._blobs, frozen, name)
            self._registers.thaw(snapshot_of(frozen.registers), live=live_buffer)
            self._device = self._registers.device
            if frozen.facts.powered:
                self._store.use_engine(stamp_of(self._engine))
                self._powered = self._ready = True
            self._adopt(frozen.session)
            self._first_command = self._last_command if frozen.facts.untouched else None
            self._client_sized = frozen.facts.client_sized
            self._may_manufacture = frozen.facts.may_manufacture

    # -- the data channel

    def execute(self, body: bytes, locality: int | None = None) -> bytes:
        """Run one command from the data channel; return its response, which may leave: what it changed is durable.

        `locality`, if given, counts from now on (the send-command header).

        A TPM that is off, a locality that does not exist and a state that cannot be written are answered with TPM
        response codes.
        """
        if self._contested():
            self._lock.let_others_go_first()
        with self._engine_lock:
            if self._ready and locality is None and not self._hears_vendor_command:
                return self._submit(body)
            return self._execute_with_care(body, locality)

    def _execute_with_care(self, body: bytes, locality: int | None) -> bytes:
        """`execute` where there is more to look at than that the TPM is on."""
        if locality is not None:
            if not self._locality_is_allowed(locality):
                return _BAD_LOCALITY
            self._move_to(locality)
        if not self._powered:
            return _FAILURE
        try:
            self._go_on()
        except (StateError, StoreError) as error:
            log.error("%s; the command is answered with TPM_RC_FAILURE", error)
            return _FAILURE
        if self._hears_vendor_command and body[6:10] == _VENDOR_SET_LOCALITY:
            return self._vendor_set_locality(body)
        return self._submit(body)

    def cancel(self) -> None:
        """Ask the command that executes now to give up. Any thread; does not wait."""
        self._registers.cancel()
        self._engine.cancel()

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
            self._engine.locality = locality
            response = self._run(command)
            self._last_command = command
            if self._uncommitted:
                self._state.commit()
        except StoreError as error:
            log.error("%s; the command is answered with TPM_RC_FAILURE", error)
            return _FAILURE
        except (EngineError, StateError) as error:
            log.error("%s; the registers report a fatal error", error)
            return None
        finally:
            self._engine.locality = self._locality
        return response

    def reset(self) -> None:
        """A platform reset by the register client: of the TPM, which is ON then, and of all registers.

        Raises EngineError, StateError or StoreError; the TPM is OFF then.
        """
        if self.served is not None:
            self.served.cancel()
        self.init(delete_volatile=False)

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
                self._power_on(delete_volatile=delete_volatile)

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

    def set_locality(self, locality: int) -> None:
        """The locality of all commands from now on. Raises EngineError with TPM_BAD_LOCALITY."""
        with self._lock:
            if not self._locality_is_allowed(locality):
                raise EngineError("SET_LOCALITY", TpmResult.BAD_LOCALITY)
            self._move_to(locality)

    def hash_start(self) -> None:
        """Begin a locality-4 hash sequence. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._go_on()
            self._first_command = None
            self._hash(self._registers.hash_start())

    def hash_data(self, data: bytes) -> None:
        """Add to the hash sequence. Raises EngineError."""
        with self._lock:
            self._hash(self._registers.hash_data(data))

    def hash_end(self) -> None:
        """End the hash sequence. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._go_on()
            self._hash(self._registers.hash_end())
            self._registers.set_established(self._is_established())
            self._state.commit()

    def store_volatile(self) -> None:
        """Write the volatile state to the store. Raises EngineError, StateError, StoreError."""
        with self._lock:
            self._go_on()
            data = self._engine.get_state(StateKind.VOLATILE)
            if data is not None:
                self._state.store(StateKind.VOLATILE, data)
            self._state.commit()

    def state_blob(self, kind: StateKind, *, decrypted: bool = True, offset: int = 0) -> bytes | None:
        """The state in swtpm's migration form, from `offset` on; None where there is none.

        `decrypted`: without the file key's encryption, where there is a file key. With the last kind, the savestate,
        the store's lock goes where the options say so. Raises EngineError, StoreError, StateError.
        """
        with self._lock:
            self._go_on()
            blob = self._blobs.hand_out(kind, self._session, decrypted=decrypted, offset=offset)
            if kind is StateKind.SAVESTATE and self._options.release_lock_outgoing:
                self._custody.give_up()
                self._ready = False
        return blob

    def set_state_blob(self, kind: StateKind, blob: bytes, *, encrypted: bool = False) -> None:
        """Hand in state in swtpm's migration form for the next `init`;

        an empty blob takes it back. `encrypted`: its state is encrypted by the file key. Raises EngineError,
        StateError.
        """
        with self._lock, self._custody.taken():
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

    # -- under the engine lock

    def _submit(self, body: bytes) -> bytes:
        """Run one command through the registers: the way of every command, kept short.

        What it changed is durable when this returns. What goes wrong on our side is answered with TPM_RC_FAILURE.
        """
        with self._device_lock:
            if type(self._device.submit(self._locality, body)) is Busy:
                return _RETRY
        try:
            response = self._run(body)
            self._last_command = body
            if self._uncommitted:
                self._state.commit()
        except StoreError as error:
            log.error("%s; the command is answered with TPM_RC_FAILURE", error)
            response = _FAILURE
        except (EngineError, StateError) as error:
            log.error("%s; the command is answered with TPM_RC_FAILURE", error)
            self._registers.fail()
            return _FAILURE
        with self._device_lock:
            self._device.complete(response)
        return response

    def _power_on(self, *, delete_volatile: bool) -> None:
        if self._engine.get_state(StateKind.PERMANENT) is None:
            self._refuse_unless_new_is_allowed()
            log.info("making a new TPM in %s", self._store.name)
        handed_in, session = self._blobs.handed_in, self._blobs.session
        if StateKind.PERMANENT in handed_in and StateKind.VOLATILE not in handed_in:
            # What lies there belongs to the TPM that was here before.
            self._state.delete(StateKind.VOLATILE)
        try:
            if session is not None and not self._client_sized:
                self._engine.buffer_size(session.buffer_size)
            self._engine.start()
        except (EngineError, StateError):
            self._state.discard()
            raise
        finally:
            self._blobs.forget()
        try:
            if self._engine.was_manufactured:
                # Whatever went before: without permission a new TPM does not reach the store.
                self._refuse_unless_new_is_allowed()
            self._store.use_engine(stamp_of(self._engine))
            if delete_volatile:
                self._state.delete(StateKind.VOLATILE)
            self._state.commit()
        except (StoreError, StateError, EngineError):
            self._engine.stop()
            self._state.discard()
            raise
        self._may_manufacture = False
        self._last_command = b""
        if session is not None:
            self._adopt(session)
        self._first_command = self._last_command if StateKind.VOLATILE in handed_in else None
        self._registers.reset(established=self._is_established())
        self._powered = self._ready = True

    def _power_off(self) -> None:
        if not self._powered:
            return
        if self._options.auto_shutdown and self._may_send_shutdown():
            self._send_shutdown()
        self._powered = self._ready = False
        self._established_before = self._is_established()
        self._registers.reset(established=self._established_before)
        self._engine.stop()
        self._blobs.forget()

    def _may_send_shutdown(self) -> bool:
        """Whether the TPM needs a TPM2_Shutdown, and is ours to change."""
        untouched = self._options.incoming and self._last_command is self._first_command
        return self._custody.held and not untouched and self._last_command[6:10] != _SHUTDOWN

    def _send_shutdown(self) -> None:
        for how in (StartupType.STATE, StartupType.CLEAR):
            code = response_code(self._submit(shutdown_command(how)))
            if code in (ResponseCode.SUCCESS, ResponseCode.INITIALIZE):
                return
            log.warning("TPM2_Shutdown(%s) was answered with 0x%x", how.name, code or 0)

    def _go_on(self, retries: int | None = None) -> None:
        """Hold the store's lock, which may have been given up for a migration. Raises StateError, StoreError."""
        self._custody.go_on(retries)
        self._ready = self._powered

    def _session(self) -> Session:
        """What a client has set up."""
        last_command = int.from_bytes(self._last_command[6:10], "big")
        size = self._engine.buffer_size().current
        established = self._is_established() if self._powered else self._established_before
        return Session(self._locality, size, established, last_command)

    def _adopt(self, session: Session) -> None:
        """Be as the session says; the buffer size was set before."""
        if self._engine.running and self._engine.established():
            self._engine.reset_established(MAX_LOCALITY)
        self._established_before = session.established
        if self._locality_is_allowed(session.locality):
            self._move_to(session.locality)
        self._last_command = bytes(6) + session.last_command.to_bytes(4, "big")

    def _is_established(self) -> bool:
        return self._established_before or self._engine.established()

    def _hash(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case HashStart():
                    self._engine.hash_start()
                case HashData(data):
                    self._engine.hash_data(data)
                case HashEnd():
                    self._engine.hash_end()

    def _move_to(self, locality: int) -> None:
        self._locality = locality
        self._engine.locality = locality

    def _refuse_unless_new_is_allowed(self) -> None:
        if not self._may_manufacture:
            raise StateAbsentError(
                f"there is no TPM state in {self._store.name}", "check the path, or make a new TPM there with --create"
            )

    def _locality_is_allowed(self, locality: int) -> bool:
        return locality < MAX_LOCALITY or (locality == MAX_LOCALITY and not self._options.reject_locality_4)

    def _vendor_set_locality(self, body: bytes) -> bytes:
        """swtpm's vendor command: a head and one locality byte (anything after it is ignored)."""
        if len(body) <= HEAD_SIZE:
            return error_response(ResponseCode.INSUFFICIENT)
        locality = body[HEAD_SIZE]
        if not self._locality_is_allowed(locality):
            return _BAD_LOCALITY
        self._move_to(locality)
        return success_response()
