"""An engine and a store that fail as a `FaultPlan` says, around the real ones. Without a plan neither is there."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from crbd.engine.port import BufferSize, Engine, EngineVersion, StatePort
from crbd.errors import StoreError
from crbd.service.faults import Answer, Delay, FailureMode, FaultPlan, Reset
from crbd.state.document import Document
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.store.port import Estate, Store
from crbd.tpm.codes import CommandCode, ResponseCode, StartupType
from crbd.tpm.head import HEAD_SIZE, command_code, error_response, startup_command
from crbd.tpm.names import COMMANDS, name_of_command

log = logging.getLogger(__name__)

_ANSWERED_IN_FAILURE_MODE = {CommandCode.GET_CAPABILITY, COMMANDS["GetTestResult"]}
"""Part 1, 10.4: all others get TPM_RC_FAILURE."""


class FaultyEngine:
    """An `Engine` whose commands fail as planned. `port` is the one that the engine was made with.

    Theory. A fault comes before its command: the command is answered in the TPM's stead, or run later, or by a TPM
    that was reset meanwhile. So what a client sees is one of the states that a real TPM can be in. The registers stay
    as they are at a reset: it is the TPM that is reset, under a client that goes on.
    """

    def __init__(self, engine: Engine, port: StatePort, plan: FaultPlan) -> None:
        self._engine = engine
        self._port = port
        self._plan = plan
        self._failed = False
        self._cancelled = threading.Event()

    # -- what can fail

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        """Run the command, as planned."""
        code = command_code(bytes(command[:HEAD_SIZE]))
        for fault in self._plan.of_command(code) if code is not None else ():
            log.warning("injected fault: %s (%s)", fault.text, name_of_command(code or 0))
            match fault.action:
                case Answer(answer):
                    return error_response(answer)
                case Delay(seconds):
                    self._cancelled.clear()
                    if self._cancelled.wait(seconds):
                        return error_response(ResponseCode.CANCELED)
                case FailureMode():
                    self._failed = True
                case Reset(started):
                    self._reset(started=started)
        if self._failed and code not in _ANSWERED_IN_FAILURE_MODE:
            return error_response(ResponseCode.FAILURE)
        return self._engine.execute(command)

    def _reset(self, *, started: bool) -> None:
        self.stop()
        # Volatile state that lies there belongs to a TPM that was to go on.
        if self._port.load(StateKind.VOLATILE) is not None:
            self._port.delete(StateKind.VOLATILE)
        self._power_on()
        if started:
            self._start_up()

    def _start_up(self) -> None:
        self._engine.execute(startup_command(StartupType.CLEAR))

    def cancel(self) -> None:
        """Also ends a delay."""
        self._cancelled.set()
        self._engine.cancel()

    def start(self) -> None:
        """Power on; failure mode is over."""
        self._power_on()

    def _power_on(self) -> None:
        self._failed = False
        self._engine.start()

    # -- all else is the engine's

    @property
    def locality(self) -> int:
        return self._engine.locality

    @locality.setter
    def locality(self, value: int) -> None:
        self._engine.locality = value

    @property
    def version(self) -> EngineVersion:
        return self._engine.version

    @property
    def running(self) -> bool:
        return self._engine.running

    @property
    def was_manufactured(self) -> bool:
        return self._engine.was_manufactured

    @property
    def supports_profiles(self) -> bool:
        return self._engine.supports_profiles

    def stop(self) -> None:
        self._engine.stop()

    def buffer_size(self, wanted: int = 0) -> BufferSize:
        return self._engine.buffer_size(wanted)

    def established(self) -> bool:
        return self._engine.established()

    def reset_established(self, locality: int) -> None:
        self._engine.reset_established(locality)

    def hash_start(self) -> None:
        self._engine.hash_start()

    def hash_data(self, data: bytes) -> None:
        self._engine.hash_data(data)

    def hash_end(self) -> None:
        self._engine.hash_end()

    def get_state(self, kind: StateKind) -> bytes | None:
        return self._engine.get_state(kind)

    def set_state(self, kind: StateKind, data: bytes | None) -> None:
        self._engine.set_state(kind, data)

    def set_profile(self, profile: str) -> None:
        self._engine.set_profile(profile)

    def info(self, flags: int) -> str:
        return self._engine.info(flags)

    def close(self) -> None:
        self._engine.close()


class FaultyStore:
    """A `Store` whose commits fail as planned."""

    def __init__(self, store: Store, plan: FaultPlan) -> None:
        self._store = store
        self._plan = plan

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        """Write, or raise the planned StoreError; nothing was written then."""
        error = self._plan.of_store()
        if error is not None:
            raise StoreError(f"{self.name}: {os.strerror(error.number)} (an injected fault)")
        self._store.commit(changes, side)

    @property
    def name(self) -> str:
        return self._store.name

    @property
    def locked(self) -> bool:
        return self._store.locked

    @property
    def keeps_checkpoints(self) -> bool:
        return self._store.keeps_checkpoints

    @property
    def written(self) -> int | None:
        return self._store.written

    def lock(self) -> None:
        self._store.lock()

    def release(self) -> None:
        self._store.release()

    def estate(self) -> Estate:
        return self._store.estate()

    def use_engine(self, stamp: EngineStamp) -> None:
        self._store.use_engine(stamp)

    def load(self, kind: StateKind) -> bytes | None:
        return self._store.load(kind)

    def load_side(self) -> SideState | None:
        return self._store.load_side()

    def snapshot(self, states: Mapping[StateKind, bytes], side: SideState) -> bytes:
        return self._store.snapshot(states, side)

    def read_snapshot(self, data: bytes, name: str) -> Document:
        return self._store.read_snapshot(data, name)

    def overtake(self, generation: int) -> int | None:
        return self._store.overtake(generation)

    def swap_backup(self) -> bool:
        return self._store.swap_backup()

    def close(self) -> None:
        self._store.close()


class StartedEngine(FaultyEngine):
    """Also the firmware of its machine: whenever it is powered on it is started, by TPM2_Startup(CLEAR).

    A TPM that was handed volatile state is started already, and says so.
    """

    def start(self) -> None:
        """Power on and start."""
        super().start()
        self._start_up()
