"""The real TPM: libtpms behind the engine port.

Theory. libtpms keeps its TPM in process globals, so one engine lives in a process at a time. Commands go through two
buffers made once: libtpms may scribble over the command (it decrypts parameters in place), so it gets a private copy;
it writes the response into a buffer it would otherwise reallocate.

Where it differs from what a caller would expect:

- A failed power-on leaves libtpms half on (power signalled, failure mode). In that state a guest's TPM2_GetCapability
  can make it manufacture a new TPM over the old (TpmFail.c), so it is always terminated before `start` raises.
- A rejected state blob makes libtpms forget all blobs handed in before, a null blob makes it remember "empty state",
  which it would start from. So taking back is done by a rejection: it takes no save state for a TPM 2.0, ever.
- The tpmEstablished flag and the buffer size outlive the TPM in the process: a new engine resets both.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import c_ubyte, c_uint32, c_void_p
from functools import cache
from typing import ClassVar, Final

from crbd.engine.callbacks import Callbacks
from crbd.engine.declarations import (
    TPM_BOOL,
    TPMLIB_STATE_PERMANENT,
    TPMLIB_STATE_SAVE_STATE,
    TPMLIB_STATE_VOLATILE,
    TPMLIB_TPM_VERSION_2,
    load,
)
from crbd.engine.port import BufferSize, EngineVersion, StatePort
from crbd.errors import EngineError, EngineMissingError
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

_STATE_TYPES: Final = {
    StateKind.PERMANENT: TPMLIB_STATE_PERMANENT,
    StateKind.VOLATILE: TPMLIB_STATE_VOLATILE,
    StateKind.SAVESTATE: TPMLIB_STATE_SAVE_STATE,
}
_LOCALITIES: Final = range(5)
_VOLATILE_CHECKSUM_SIZE: Final = 20
_HEAD_SIZE: Final = 10
_WRONG_SIZE: Final = b"\xff\xff\xff\xff"


class LibtpmsEngine:
    """A TPM 2.0 in libtpms. See `crbd.engine.port.Engine` for what each member does."""

    _claim: ClassVar[threading.Lock] = threading.Lock()
    """Held by the one engine of the process."""

    def __init__(
        self, port: StatePort, library: str | None = None, *, debug_fd: int | None = None, debug_level: int = 0
    ) -> None:
        """Open libtpms (the one at the path `library`, else the system's), and leave the TPM off.

        libtpms' messages go to the descriptor `debug_fd`, which stays the caller's, or nowhere. It reports errors there
        always, and traces commands with a `debug_level` from 1 (little) to 20. Raises EngineMissingError, and
        RuntimeError where the process has an engine.
        """
        self._library = load(library)
        self._port = port
        if not self._claim.acquire(blocking=False):
            raise RuntimeError("this process already has a libtpms engine")
        try:
            self._set_up(debug_fd, debug_level)
        except BaseException:
            self._claim.release()
            raise

    def _set_up(self, debug_fd: int | None, debug_level: int) -> None:
        library = self._library
        library["TPMLIB_SetDebugFD"](_nowhere() if debug_fd is None else debug_fd)
        library["TPMLIB_SetDebugLevel"](debug_level)
        if library["TPMLIB_ChooseTPMVersion"](TPMLIB_TPM_VERSION_2) != TpmResult.SUCCESS:
            raise EngineMissingError("this libtpms has no TPM 2.0", "install one that was built with it")
        self._closed = False
        self._running = False
        self._was_manufactured = False
        self._handed_in: dict[StateKind, bytes] = {}
        self._callbacks = Callbacks(library, self._port)
        self._catch = self._callbacks.catch
        self._callbacks.register()
        self._buffer_size = self._set_buffer_size(0xFFFFFFFF)
        self._reset_established_as(4)
        self._make_buffers(self._buffer_size.maximum)

    def _make_buffers(self, size: int) -> None:
        """Both of libtpms' largest size in bytes: a smaller response buffer it would reallocate under our view."""
        request = (c_ubyte * size)()
        self._request = memoryview(request).cast("B")
        self._request_pointer = ctypes.byref(request)
        self._response_address = c_void_p()
        self._library.check("TPM_Malloc", ctypes.byref(self._response_address), size)
        response = (c_ubyte * size).from_address(self._response_address.value or 0)
        self._response = memoryview(response).cast("B")
        self._response_size = c_uint32()
        self._response_capacity = c_uint32(size)
        self._process = self._library.untyped("TPMLIB_Process")
        self._response_pointer = ctypes.byref(self._response_address)
        self._response_size_pointer = ctypes.byref(self._response_size)
        self._response_capacity_pointer = ctypes.byref(self._response_capacity)

    def close(self) -> None:
        """Power off and give libtpms free for another engine. Closing a closed engine is no error."""
        if self._closed:
            return
        self.stop()
        self._forget_handed_in()
        self._callbacks.unregister()
        self._library["TPMLIB_SetDebugFD"](_nowhere())
        self._closed = True
        self._response.release()
        self._library["TPM_Free"](self._response_address)
        self._claim.release()

    @property
    def version(self) -> EngineVersion:
        """libtpms' version."""
        return self._library.version

    @property
    def running(self) -> bool:
        """Powered on."""
        return self._running

    @property
    def was_manufactured(self) -> bool:
        """Whether the last `start` made a new TPM."""
        return self._was_manufactured

    @property
    def supports_profiles(self) -> bool:
        """Whether this libtpms is 0.10 or later."""
        return "TPMLIB_SetProfile" in self._library

    @property
    def locality(self) -> int:
        """The locality of the next command, 0 to 4."""
        return self._callbacks.locality

    @locality.setter
    def locality(self, value: int) -> None:
        if value == self._callbacks.locality:
            return
        if value not in _LOCALITIES:
            raise ValueError(f"there is no locality {value}")
        self._callbacks.locality = value
        self._callbacks.register()

    # Power

    def start(self) -> None:
        """Power on. State is loaded before libtpms is asked for anything: an error there changes nothing."""
        self._require_open()
        self.stop()
        self._was_manufactured = False
        permanent = self._present(StateKind.PERMANENT)
        # A new TPM has no volatile state; what may lie there belonged to another.
        volatile = None if permanent is None else self._present(StateKind.VOLATILE)
        # libtpms would take an empty permanent state for none at all and look for a file NVChip in the working
        # directory, and leave a volatile state that cannot hold its own checksum aside in silence.
        if permanent == b"" or (volatile is not None and len(volatile) < _VOLATILE_CHECKSUM_SIZE):
            raise EngineError("TPMLIB_MainInit", TpmResult.SIZE)
        self._callbacks.offer({StateKind.PERMANENT: permanent, StateKind.VOLATILE: volatile})
        try:
            result = self._library["TPMLIB_MainInit"]()
        finally:
            self._callbacks.offer({})
        if result != TpmResult.SUCCESS or self._catch.caught is not None:
            self._library["TPMLIB_Terminate"]()
            self._forget_handed_in()
            self._callbacks.reraise()
            raise EngineError("TPMLIB_MainInit", result)
        self._handed_in.clear()
        self._was_manufactured = permanent is None
        self._running = True

    def stop(self) -> None:
        """Power off, as if the current were cut."""
        if not self._running:
            return
        self._running = False
        self._library["TPMLIB_Terminate"]()
        self._callbacks.reraise()

    # Commands

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        """Run one TPM command. The hot path: everything that can be prepared is."""
        size = len(command)
        if size > self._buffer_size.current or not self._running:
            self._require_running("TPMLIB_Process")
            command = _of_wrong_size(command)
            size = _HEAD_SIZE
        self._request[:size] = command
        result = self._process(
            self._response_pointer,
            self._response_size_pointer,
            self._response_capacity_pointer,
            self._request_pointer,
            size,
        )
        if result or self._catch.caught is not None:
            self._callbacks.reraise()
            raise EngineError("TPMLIB_Process", result)
        return self._response[: self._response_size.value].tobytes()

    def cancel(self) -> None:
        """Ask the command that executes now to give up.

        One that comes in the microsecond in which libtpms begins the command is lost: it clears the flag there.
        """
        self._library["TPMLIB_CancelCommand"]()

    def buffer_size(self, wanted: int = 0) -> BufferSize:
        """Ask for or set the buffer size in bytes."""
        if wanted:
            self._require_off("TPMLIB_SetBufferSize")
            self._buffer_size = self._set_buffer_size(min(wanted, 0xFFFFFFFF))
        return self._buffer_size

    def _set_buffer_size(self, wanted: int) -> BufferSize:
        minimum, maximum = c_uint32(), c_uint32()
        current = self._library["TPMLIB_SetBufferSize"](wanted, ctypes.byref(minimum), ctypes.byref(maximum))
        return BufferSize(current, minimum.value, maximum.value)

    # The locality-4 hash sequence and its flag

    def established(self) -> bool:
        """The tpmEstablished flag."""
        self._require_running("TPM_IO_TpmEstablished_Get")
        flag = TPM_BOOL()
        self._library.check("TPM_IO_TpmEstablished_Get", ctypes.byref(flag))
        return flag.value != 0

    def reset_established(self, locality: int) -> None:
        """Clear the flag on behalf of `locality`; the locality of commands stays as it is."""
        self._require_running("TPM_IO_TpmEstablished_Reset")
        if locality not in _LOCALITIES:
            raise EngineError("TPM_IO_TpmEstablished_Reset", TpmResult.BAD_LOCALITY)
        self._reset_established_as(locality)

    def _reset_established_as(self, locality: int) -> None:
        before = self.locality
        self.locality = locality
        try:
            self._library.check("TPM_IO_TpmEstablished_Reset")
        finally:
            self.locality = before

    def hash_start(self) -> None:
        """_TPM_Hash_Start."""
        self._hash("TPM_IO_Hash_Start")

    def hash_data(self, data: bytes) -> None:
        """_TPM_Hash_Data."""
        self._hash("TPM_IO_Hash_Data", data, len(data))

    def hash_end(self) -> None:
        """_TPM_Hash_End."""
        self._hash("TPM_IO_Hash_End")

    def _hash(self, call: str, *arguments: object) -> None:
        self._require_running(call)
        result = self._library[call](*arguments)
        self._callbacks.reraise()
        if result != TpmResult.SUCCESS:
            raise EngineError(call, result)

    # State

    def get_state(self, kind: StateKind) -> bytes | None:
        """The state of `kind`: of the running TPM, else what the next `start` would begin from."""
        if kind is StateKind.SAVESTATE:
            return None
        if not self._running:
            return self._present(kind)
        data, length = c_void_p(), c_uint32()
        self._library.check("TPMLIB_GetState", _STATE_TYPES[kind], ctypes.byref(data), ctypes.byref(length))
        try:
            return ctypes.string_at(data, length.value) if data else None
        finally:
            self._library["TPM_Free"](data)

    def set_state(self, kind: StateKind, data: bytes | None) -> None:
        """Hand in state for the next `start`, or take it back: the permanent state along with its volatile state."""
        self._require_open()
        self._require_off("TPMLIB_SetState")
        if data is not None:
            self._hand_in(kind, data)
            return
        kept = {} if kind is StateKind.PERMANENT else {k: v for k, v in self._handed_in.items() if k is not kind}
        self._forget_handed_in()
        for other, blob in kept.items():
            self._hand_in(other, blob)

    def _hand_in(self, kind: StateKind, data: bytes) -> None:
        # libtpms judges a volatile state by loading it over the permanent one, which it may ask for.
        offered = self._present(StateKind.PERMANENT) if kind is StateKind.VOLATILE else None
        self._callbacks.offer({StateKind.PERMANENT: offered})
        try:
            result = self._library["TPMLIB_SetState"](_STATE_TYPES[kind], data, len(data))
        finally:
            self._callbacks.offer({})
        if result != TpmResult.SUCCESS or self._catch.caught is not None:
            self._forget_handed_in()
            self._callbacks.reraise()
            raise EngineError("TPMLIB_SetState", result)
        self._handed_in[kind] = data

    def _forget_handed_in(self) -> None:
        """Make libtpms drop every blob, by one that it rejects always and for its type alone."""
        if self._handed_in:
            self._handed_in.clear()
            self._library["TPMLIB_SetState"](TPMLIB_STATE_SAVE_STATE, b"", 0)

    def _present(self, kind: StateKind) -> bytes | None:
        """What a TPM that is off has of `kind`."""
        handed_in = self._handed_in.get(kind)
        return self._port.load(kind) if handed_in is None else handed_in

    # Profiles and information

    def set_profile(self, profile: str) -> None:
        """Choose the profile of a TPM that the next `start` manufactures."""
        if not self.supports_profiles:
            raise EngineError("TPMLIB_SetProfile", TpmResult.BAD_ORDINAL)
        self._require_off("TPMLIB_SetProfile")
        self._library.check("TPMLIB_SetProfile", profile.encode())

    def info(self, flags: int) -> str:
        """JSON text about the TPM."""
        address = self._library["TPMLIB_GetInfo"](flags)
        if not address:
            raise EngineError("TPMLIB_GetInfo", TpmResult.FAIL)
        try:
            return ctypes.string_at(address).decode()
        finally:
            self._library["TPM_Free"](address)

    def _require_running(self, call: str) -> None:
        if not self._running:
            raise EngineError(call, TpmResult.INVALID_POSTINIT)

    def _require_off(self, call: str) -> None:
        if self._running:
            raise EngineError(call, TpmResult.INVALID_POSTINIT)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")


def _of_wrong_size(command: bytes | bytearray | memoryview) -> bytes:
    """The head of a command too long for the buffer, saying a size that it does not have.

    So libtpms itself gives the answer that it gives to wrong sizes in its present mode, and sees no byte too many.
    """
    head = bytes(command[:_HEAD_SIZE])
    return head[:2] + _WRONG_SIZE + head[6:]


@cache
def _nowhere() -> int:
    """A descriptor that swallows what is written to it, open until the process ends.

    Without any, libtpms writes its errors to stderr.
    """
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
