"""One TPM's power and its commands, under the engine lock. `crbd.service.instance` is what others use.

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
no blob was handed in. Permission is used up by the first state that is seen, be it found, handed in or made: state that
vanishes under a daemon, or that the engine rejects, is never replaced by a new TPM.

Threads. The data pump calls `execute`; control commands come from other threads. All of it that touches the engine or
the store goes under one lock, the engine lock. `cancel` and the properties do not, so they answer while a command
computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from crbd.crb.config import CrbConfig
from crbd.crb.effects import Busy
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, StateAbsentError, StateDamagedError, StateError, StoreError
from crbd.service.checkpoint import Checkpoints
from crbd.service.durable import DurableState
from crbd.service.lock import EngineLock
from crbd.service.migration import Custody, StateBlobs
from crbd.service.options import InstanceOptions
from crbd.service.registers import Registers
from crbd.service.served import BUFFER_SIZE, ServedRegisters
from crbd.service.stamp import stamp_of
from crbd.state.crb import CrbStateV3, saved, snapshot_of
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.side import SideState
from crbd.store.port import Store
from crbd.tpm.codes import CommandCode, ResponseCode, StartupType
from crbd.tpm.head import HEAD_SIZE, error_response, response_code, shutdown_command, success_response

log = logging.getLogger(__name__)

MAX_LOCALITY = 4

_FAILURE = error_response(ResponseCode.FAILURE)
_RETRY = error_response(ResponseCode.RETRY)
_CANCELED = error_response(ResponseCode.CANCELED)
_BAD_LOCALITY = error_response(ResponseCode.LOCALITY)
_SHUTDOWN = CommandCode.SHUTDOWN.to_bytes(4, "big")
_VENDOR_SET_LOCALITY = CommandCode.VENDOR_SET_LOCALITY.to_bytes(4, "big")


class Lifecycle:
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
        self._run: Callable[[bytes], bytes] = self._engine.execute
        self._uncommitted = self._state.pending
        self._hears_vendor_command = options.allow_set_locality
        self._locality = 0
        self._powered = False
        self._lock = EngineLock()
        self._engine_lock, self._contested = self._lock.engine, self._lock.contested
        self._last_command = b""
        self._blobs = StateBlobs(self._engine, self._state, options)
        self._custody = Custody(store, self._state, options)
        self._checkpoints = Checkpoints(self._engine, self._state, options.checkpoint, self._side)
        self._heeds = False
        """Whether commands touch what lies in the store before they run."""
        self._ready = False
        """Whether the TPM is ON and the store's lock is held: then commands are executed."""
        self._established_before = False
        """The tpmEstablished flag as it came with a state blob; no engine can be told to set its own."""
        self._client_sized = False
        """Whether a client set the buffer size."""
        self._first_command: bytes | None = None
        """`_last_command` as it came with state blobs: as long as it is the same object, this TPM ran no command."""

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

    def _submit(self, body: bytes) -> bytes:
        """Run one command through the registers: the way of every command, kept short.

        What it changed is durable when this returns. What goes wrong on our side is answered with TPM_RC_FAILURE.
        """
        with self._device_lock:
            if type(self._device.submit(self._locality, body)) is Busy:
                return _RETRY
        try:
            if self._heeds or self._uncommitted:
                self._make_way(body)
            response = self._run(body)
            self._last_command = body
            if self._uncommitted:
                self._state.commit()
        except StoreError as error:
            self._state.complain(error)
            response = _FAILURE
        except (EngineError, StateError) as error:
            log.error("%s; the command is answered with TPM_RC_FAILURE", error)
            self._registers.fail()
            return _FAILURE
        with self._device_lock:
            self._device.complete(response)
        return response

    def _make_way(self, command: bytes) -> None:
        """Before a command: what waits to be stored is stored first, and what it outdates is removed.

        Raises StoreError; it must not run then: memory would go on from what the disk does not have.
        """
        self._state.commit()
        if self._heeds:
            self._checkpoints.before(command)
            self._heed()

    def _heed(self) -> None:
        self._heeds = self._checkpoints.heeds_commands

    def _choose_way(self) -> None:
        """How commands are run from now on."""
        self._run = self._run_and_keep if self._checkpoints.after_every_command else self._engine.execute
        self._heed()

    def _run_and_keep(self, command: bytes) -> bytes:
        """Run a command; its checkpoint is among what is committed before it is answered."""
        response = self._engine.execute(command)
        self._last_command = command
        self._checkpoints.after(command, response)
        return response

    def _side(self, response: bytes | None) -> SideState:
        """What belongs to volatile state: as of now, or as of when the command under way is answered."""
        registers = self._registers.after(response)
        return SideState(None if registers is None else saved(registers), self._session(), checkpoint=True)

    def _power_on(self, *, delete_volatile: bool, goes_on: bool) -> None:
        """`goes_on`: of a daemon's own accord, from a checkpoint too; else it is a reset (crbd.service.checkpoint)."""
        self._see_to_permanent_state()
        handed_in, session = self._blobs.handed_in, self._blobs.session
        side = None
        if handed_in & {StateKind.PERMANENT, StateKind.VOLATILE}:
            # What lies there belongs to the TPM that was here before.
            self._state.load(StateKind.VOLATILE)
            self._state.delete(StateKind.VOLATILE)
        elif self._state.load(StateKind.VOLATILE) is not None:
            side = self._state.load_side()
            if side is not None and side.checkpoint and not goes_on:
                log.info("INIT is a reset: the checkpoint in %s is left aside", self._store.name)
                self._state.delete(StateKind.VOLATILE)
                side = None
        session = session or (None if side is None else side.session)
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
        if goes_on and side is not None and side.crb is not None:
            self._take_up_registers(side.crb)
        self._powered = self._ready = True
        self._checkpoints.survey()
        self._choose_way()

    def _see_to_permanent_state(self) -> None:
        """Raises a StateError: StateAbsentError where there is none, and none may be made."""
        if self._engine.get_state(StateKind.PERMANENT) is not None:
            self._may_manufacture = False
            return
        self._refuse_unless_new_is_allowed()
        log.info("making a new TPM in %s", self._store.name)

    def _take_up_registers(self, state: CrbStateV3) -> None:
        """Of a TPM that goes on; those of another configuration are left aside."""
        try:
            self._registers.thaw(snapshot_of(state))
        except StateDamagedError as error:
            log.warning("%s; the TPM starts with registers as after a reset", error.what)
            return
        self._device = self._registers.device
        self._registers.set_established(self._is_established())

    def _power_off(self) -> None:
        if not self._powered:
            return
        self._shut_down()
        self._powered = self._ready = False
        self._established_before = self._is_established()
        self._registers.reset(established=self._established_before)
        self._engine.stop()
        self._blobs.forget()
        self._checkpoints.forget()

    def _shut_down(self) -> None:
        # What follows is no client's doing.
        self._heeds, self._run = False, self._engine.execute
        if self._custody.held:
            try:
                self._checkpoints.drop_checkpoint()
            except StoreError as error:
                self._state.complain(error)
        if self._options.auto_shutdown and self._may_send_shutdown():
            self._send_shutdown()

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

    def _require_custody(self) -> None:
        if not self._custody.held:
            raise StoreError(f"the lock of {self._store.name} is given up: a migration is under way")

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

    def _move_to(self, locality: int) -> None:
        self._locality = locality
        self._engine.locality = locality

    def _settle_in(self, locality: int) -> None:
        """Move there, and have what is stored say so. Raises EngineError, StoreError; nobody has moved then."""
        before = self._locality
        self._move_to(locality)
        try:
            self._checkpoints.refresh()
        except (EngineError, StoreError):
            self._move_to(before)
            raise

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
        try:
            self._settle_in(locality)
        except (EngineError, StoreError) as error:
            log.error("%s; the locality stays as it is", error)
            return _FAILURE
        return success_response()
