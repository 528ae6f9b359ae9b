"""The scripted TPM: an engine for tests, and for trying the daemon without libtpms.

By itself it behaves as libtpms does, as far as the contract tests look, with the small TPM of `fake_tpm`. A test steers
it:

- `script`: what the next commands are answered with, bytes to return or an exception to raise, before the TPM is asked.
- `gate`: while it is closed, a command stays in execution until it is opened or the command is cancelled.
- `log`: what was executed, in which locality; `cancels`: how often `cancel` was called.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import dataclass

from crbd.engine.fake_tpm import (
    CANCELED,
    FAILURE,
    FakeTpm,
    Permanent,
    decode_permanent,
    decode_volatile,
    encode_permanent,
    encode_volatile,
    response,
)
from crbd.engine.port import BufferSize, EngineVersion, StatePort
from crbd.errors import EngineError
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

_SMALLEST_BUFFER = 2808
_LARGEST_BUFFER = 4096
_PATIENCE = 60.0
"""Seconds after which a command held at the gate is a test that hangs."""


@dataclass(frozen=True, slots=True)
class Executed:
    """A command that reached the engine."""

    command: bytes
    locality: int


class Gate:
    """Holds commands in execution while it is closed. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._open = True
        self._held = False
        self._cancelled = False

    def close(self) -> None:
        """Hold the next command."""
        with self._condition:
            self._open = False

    def open(self) -> None:
        """Let the held command go on, and all later ones."""
        with self._condition:
            self._open = True
            self._condition.notify_all()

    def wait_held(self, seconds: float = 10.0) -> None:
        """Return when a command is held here. Raises TimeoutError if none comes in that time."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._held, seconds):
                raise TimeoutError(f"no command came in {seconds} s")

    def _pass(self) -> bool:
        """Wait until the gate is open. Returns False where the command is cancelled instead."""
        with self._condition:
            self._cancelled = False
            self._held = not self._open
            self._condition.notify_all()
            in_time = self._condition.wait_for(lambda: self._open or self._cancelled, _PATIENCE)
            self._held = False
            if not in_time:
                raise TimeoutError(f"a command was held at the gate for {_PATIENCE} s")
            return not self._cancelled

    def _cancel(self) -> None:
        with self._condition:
            self._cancelled = True
            self._condition.notify_all()


class FakeEngine:
    """See `crbd.engine.port.Engine` for what each member does. Any number of them live in a process."""

    def __init__(self, port: StatePort, *, profiles: bool = False) -> None:
        """A TPM that is off. `profiles`: whether it claims to support them."""
        self.locality = 0
        self.script: deque[bytes | BaseException] = deque()
        self.gate = Gate()
        self.log: list[Executed] = []
        self.cancels = 0
        self._port = port
        self._profiles = profiles
        self._profile = "default-v1"
        self._tpm: FakeTpm | None = None
        self._failed = False
        self._was_manufactured = False
        self._established = False
        self._buffer_size = _LARGEST_BUFFER
        self._handed_in: dict[StateKind, bytes] = {}

    def close(self) -> None:
        """Power off."""
        self.stop()

    @property
    def version(self) -> EngineVersion:
        """That of the libtpms which it resembles."""
        return EngineVersion(0, 10, 0) if self._profiles else EngineVersion(0, 9, 2)

    @property
    def running(self) -> bool:
        """Powered on."""
        return self._tpm is not None

    @property
    def was_manufactured(self) -> bool:
        """Whether the last `start` made a new TPM."""
        return self._was_manufactured

    @property
    def supports_profiles(self) -> bool:
        """As told when it was made."""
        return self._profiles

    def start(self) -> None:
        """Power on."""
        self.stop()
        self._was_manufactured = False
        blob = self._present(StateKind.PERMANENT)
        volatile_blob = None if blob is None else self._present(StateKind.VOLATILE)
        try:
            permanent = Permanent() if blob is None else decode_permanent(blob)
            volatile = None if volatile_blob is None else decode_volatile(volatile_blob, permanent)
        except ValueError as error:
            self._handed_in.clear()
            raise EngineError("TPMLIB_MainInit", FAILURE) from error
        self._failed = False
        must_store = blob is None or StateKind.PERMANENT in self._handed_in
        self._handed_in.clear()
        if must_store:
            self._port.store(StateKind.PERMANENT, encode_permanent(permanent))
        self._tpm = FakeTpm(permanent, volatile)
        self._was_manufactured = blob is None

    def stop(self) -> None:
        """Power off."""
        self._tpm = None

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        """Run one TPM command, past the gate and the script."""
        tpm = self._on("TPMLIB_Process")
        executed = Executed(bytes(command), self.locality)
        self.log.append(executed)
        if not self.gate._pass():
            return response(CANCELED)
        if self.script:
            scripted = self.script.popleft()
            if isinstance(scripted, BaseException):
                raise scripted
            return scripted
        if self._failed:
            return response(FAILURE)
        answer = tpm.run(executed.command, executed.locality, self._buffer_size)
        if tpm.changed:
            tpm.changed = False
            self._failed = True
            self._port.store(StateKind.PERMANENT, encode_permanent(tpm.permanent))
            self._failed = False
        return answer

    def cancel(self) -> None:
        """Cancel the command that is held at the gate."""
        self.cancels += 1
        self.gate._cancel()

    def buffer_size(self, wanted: int = 0) -> BufferSize:
        """Ask for or set the buffer size in bytes."""
        if wanted:
            self._require_off("TPMLIB_SetBufferSize")
            self._buffer_size = max(_SMALLEST_BUFFER, min(wanted, _LARGEST_BUFFER))
        return BufferSize(self._buffer_size, _SMALLEST_BUFFER, _LARGEST_BUFFER)

    def established(self) -> bool:
        """The tpmEstablished flag."""
        self._on("TPM_IO_TpmEstablished_Get")
        return self._established

    def reset_established(self, locality: int) -> None:
        """Clear the flag on behalf of `locality`."""
        self._on("TPM_IO_TpmEstablished_Reset")
        if locality not in (3, 4):
            raise EngineError("TPM_IO_TpmEstablished_Reset", TpmResult.BAD_LOCALITY)
        self._established = False

    def hash_start(self) -> None:
        """_TPM_Hash_Start."""
        self._on("TPM_IO_Hash_Start").hash_start()
        self._established = True

    def hash_data(self, data: bytes) -> None:
        """_TPM_Hash_Data."""
        self._on("TPM_IO_Hash_Data").hash_data(data)

    def hash_end(self) -> None:
        """_TPM_Hash_End."""
        self._on("TPM_IO_Hash_End").hash_end()

    def get_state(self, kind: StateKind) -> bytes | None:
        """The state of `kind`: of the running TPM, else what the next `start` would begin from."""
        if kind is StateKind.SAVESTATE:
            return None
        if self._tpm is None:
            return self._present(kind)
        if kind is StateKind.PERMANENT:
            return encode_permanent(self._tpm.permanent)
        return encode_volatile(self._tpm.volatile)

    def set_state(self, kind: StateKind, data: bytes | None) -> None:
        """Hand in state for the next `start`, or take it back."""
        self._require_off("TPMLIB_SetState")
        if data is None:
            self._handed_in.pop(kind, None)
            if kind is StateKind.PERMANENT:
                self._handed_in.clear()
            return
        try:
            self._judge(kind, data)
        except ValueError as error:
            self._handed_in.clear()
            raise EngineError("TPMLIB_SetState", TpmResult.FAIL) from error
        self._handed_in[kind] = data

    def _judge(self, kind: StateKind, data: bytes) -> None:
        if kind is StateKind.PERMANENT:
            decode_permanent(data)
        elif kind is StateKind.VOLATILE:
            permanent = self._present(StateKind.PERMANENT)
            if permanent is None:
                raise ValueError("there is no permanent state that it could belong to")
            decode_volatile(data, decode_permanent(permanent))
        else:
            raise ValueError("a TPM 2.0 has no such state")

    def _present(self, kind: StateKind) -> bytes | None:
        handed_in = self._handed_in.get(kind)
        return self._port.load(kind) if handed_in is None else handed_in

    def set_profile(self, profile: str) -> None:
        """Take any JSON object that has a Name."""
        if not self._profiles:
            raise EngineError("TPMLIB_SetProfile", TpmResult.BAD_ORDINAL)
        self._require_off("TPMLIB_SetProfile")
        try:
            self._profile = json.loads(profile)["Name"]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError("TPMLIB_SetProfile", TpmResult.FAIL) from error

    def info(self, flags: int) -> str:
        """JSON text: the specification (flag 1), and the profile (flag 32) where they are supported."""
        told: dict[str, object] = {}
        if flags & 1:
            told["TPMSpecification"] = {"family": "2.0", "level": 0, "revision": 164}
        if flags & 32 and self._profiles:
            told["ActiveProfile"] = {"Name": self._profile}
        return json.dumps(told)

    def _on(self, call: str) -> FakeTpm:
        if self._tpm is None:
            raise EngineError(call, TpmResult.INVALID_POSTINIT)
        return self._tpm

    def _require_off(self, call: str) -> None:
        if self._tpm is not None:
            raise EngineError(call, TpmResult.INVALID_POSTINIT)
