"""The port behind which a TPM lives: `libtpms` is the real one, `fake` the scripted one.

Both pass the same contract tests (tests/engine).

Theory. A TPM is off or on. Off, its buffer size may change and state blobs may be handed in (`set_state`), to be
picked up by the next `start`. `start` is power-on and _TPM_Init: the engine asks its `StatePort` for the permanent and
volatile state; where neither the port nor a handed-in blob has a permanent state, it manufactures a new TPM. **The
engine does not judge whether that is allowed: its caller must look first** (DESIGN: absent is not unreadable). On,
commands execute one at a time; what they change is handed to `StatePort.store` before `execute` returns, and becomes
durable by whoever implements the port. A TPM in failure mode is still on: it answers TPM_RC_FAILURE.

Threads. Everything but `cancel` comes from one thread at a time (the caller holds the engine lock). `cancel` may come
from any thread at any moment. `StatePort` is called from within `start`, `stop`, `execute` and the hash calls, on their
thread; what it raises comes out of that call unchanged, after the engine has returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from crbd.state.kinds import StateKind


@dataclass(frozen=True, slots=True)
class EngineVersion:
    """Version of the TPM library."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


@dataclass(frozen=True, slots=True)
class BufferSize:
    """Sizes in bytes of the command and response buffer: in force, smallest and largest that can be asked for."""

    current: int
    minimum: int
    maximum: int


class StatePort(Protocol):
    """Where an engine gets its state from and hands changed state to."""

    def load(self, kind: StateKind) -> bytes | None:
        """The stored state, or None where there truly is none. Raises when it exists and cannot be read."""

    def store(self, kind: StateKind, data: bytes) -> None:
        """The state changed to `data`."""

    def delete(self, kind: StateKind) -> None:
        """The state is no longer valid. Deleting what is absent is no error."""


class Engine(Protocol):
    """A TPM 2.0."""

    locality: int
    """0 to 4; read at the start of every command and hash sequence."""

    @property
    def version(self) -> EngineVersion:
        """Of the library behind this engine."""

    @property
    def running(self) -> bool:
        """Powered on: between a successful `start` and `stop`."""

    @property
    def was_manufactured(self) -> bool:
        """Whether the last `start` made a new TPM."""

    @property
    def supports_profiles(self) -> bool:
        """Whether `set_profile` and profile information are there (libtpms 0.10 and later)."""

    def start(self) -> None:
        """Power on. A running TPM is powered off first, as by `stop`. Raises EngineError; the TPM is off then."""

    def stop(self) -> None:
        """Power off, without TPM2_Shutdown (that is the caller's to send). Stopping a stopped TPM is no error."""

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        """Run one TPM command and return its whole response (TPM 2.0 Part 3; both big-endian, with their heads).

        The command is not checked: whatever is wrong with it, the response is the TPM's own response code. An empty
        command or one longer than the buffer is answered like any other malformed one. Raises EngineError if the TPM is
        off or the library itself fails.
        """

    def cancel(self) -> None:
        """Ask the command that executes now to give up; it then returns TPM_RC_CANCELED, if it can.

        From any thread. No-op when idle; lost if it comes in the microsecond in which the command begins.
        """

    def buffer_size(self, wanted: int = 0) -> BufferSize:
        """Ask for (0) or set the buffer size in bytes; what is out of range is brought into it.

        Setting needs a stopped TPM: EngineError.
        """

    def established(self) -> bool:
        """The tpmEstablished flag: whether a locality-4 hash sequence took place since it was last reset.

        No part of any state: it outlives `stop`, not the process. Needs a running TPM: EngineError.
        """

    def reset_established(self, locality: int) -> None:
        """Clear the flag on behalf of `locality`; localities 3 and 4 may, for others EngineError (TPM_BAD_LOCALITY)."""

    def hash_start(self) -> None:
        """Begin the locality-4 hash sequence (_TPM_Hash_Start). Needs a running TPM: EngineError."""

    def hash_data(self, data: bytes) -> None:
        """Add bytes to the hash sequence (_TPM_Hash_Data)."""

    def hash_end(self) -> None:
        """End the hash sequence and extend its PCR (_TPM_Hash_End)."""

    def get_state(self, kind: StateKind) -> bytes | None:
        """The engine's present state of `kind` in its own format; None where it has none (SAVESTATE, always).

        From a running TPM the state as of now; from a stopped one what `set_state` handed in, else what the port holds.
        Raises EngineError.
        """

    def set_state(self, kind: StateKind, data: bytes | None) -> None:
        """Hand in state for the next `start`; None takes it back (the permanent state along with its volatile state).

        The TPM must be off. Raises EngineError if the engine rejects it; all state handed in before is forgotten then,
        and so it is once a `start` has put it to use, even in vain. Volatile state can only be judged after the
        permanent state it belongs to.
        """

    def set_profile(self, profile: str) -> None:
        """Choose the profile (JSON) of a TPM manufactured by the next `start`.

        Raises EngineError where profiles are not supported.
        """

    def info(self, flags: int) -> str:
        """JSON text about the TPM (libtpms' TPMLIB_GetInfo; flags as there). Raises EngineError."""

    def close(self) -> None:
        """Power off and release the library. The engine is of no use afterwards; closing it twice is no error."""
