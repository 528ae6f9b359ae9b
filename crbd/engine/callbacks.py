"""What libtpms calls back: state in and out, and the locality of the command.

Theory. An exception cannot cross C frames: ctypes would print and drop it. So a callback never throws: whatever is
raised within it is caught and kept, the callback answers TPM_FAIL, and the call into libtpms that brought it about
raises it again once libtpms has returned (`reraise`). After the first failure no further callback of the same call
reaches the port, so that a TPM which libtpms goes on building on a failed callback is never stored.

State is not loaded from within libtpms. It takes a failed load of the volatile state for none there (VolatileLoad in
StateMarshal.c), asks for the permanent state up to four times in one power-on, and finds out by TPM_RETRY alone that a
new TPM is to be made. So the caller loads first, while errors still mean what they say, and `offer`s the bytes; the
load callback hands out only what was offered. What is stored meanwhile is offered from then on: a TPM just manufactured
is read back by the same power-on, and would come up with all NV memory zero if it were not found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from crbd.engine.declarations import (
    IoGetLocality,
    IoInit,
    Library,
    LibtpmsCallbacks,
    NvramDeleteName,
    NvramInit,
    NvramLoadData,
    NvramStoreData,
    process_malloc,
)
from crbd.engine.port import StatePort
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult


class Catch:
    """A context that keeps in `caught` the first exception raised in it, and lets none out."""

    __slots__ = ("caught",)

    def __init__(self) -> None:
        self.caught: BaseException | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self.caught is None:
            self.caught = error
        return True


class Callbacks:
    """The callbacks of one engine, bound to its port."""

    def __init__(self, library: Library, port: StatePort) -> None:
        self._library = library
        self._port = port
        self._malloc: Callable[[int], int | None] = process_malloc()
        self.catch = Catch()
        self._offered: dict[StateKind, bytes | None] = {}
        self.locality = 0
        # ctypes frees a thunk with its last reference, and libtpms keeps bare pointers: these live as long as this
        # object.
        self._nvram_init = NvramInit(_ready)
        self._load = NvramLoadData(self._on_load)
        self._store = NvramStoreData(self._on_store)
        self._delete = NvramDeleteName(self._on_delete)
        self._io_init = IoInit(_ready)
        self._get_locality = IoGetLocality(self._on_get_locality)

    def register(self) -> None:
        """Make these libtpms' callbacks, for `locality` as it is now.

        Without a locality callback libtpms takes locality 0: by far the most frequent, and it spares each command a
        call into Python. Physical presence is left out as swtpm leaves it out: it is never asserted.
        """
        table = LibtpmsCallbacks(
            sizeOfStruct=ctypes.sizeof(LibtpmsCallbacks),
            tpm_nvram_init=self._nvram_init,
            tpm_nvram_loaddata=self._load,
            tpm_nvram_storedata=self._store,
            tpm_nvram_deletename=self._delete,
            tpm_io_init=self._io_init,
        )
        if self.locality:
            table.tpm_io_getlocality = self._get_locality
        self._library.check("TPMLIB_RegisterCallbacks", ctypes.byref(table))

    def unregister(self) -> None:
        """Leave libtpms without callbacks, so that it holds no pointer to this object."""
        nothing = LibtpmsCallbacks(sizeOfStruct=ctypes.sizeof(LibtpmsCallbacks))
        self._library.check("TPMLIB_RegisterCallbacks", ctypes.byref(nothing))

    def offer(self, states: Mapping[StateKind, bytes | None]) -> None:
        """Answer loads with these (None: absent) until the next `offer`; a kind not among them is an error."""
        self._offered = dict(states)

    def reraise(self) -> None:
        """Raise what a callback raised, and forget it. Nothing if none did."""
        error, self.catch.caught = self.catch.caught, None
        if error is not None:
            raise error

    def _on_load(self, data: Any, length: Any, _tpm_number: int, name: bytes) -> int:
        result = TpmResult.FAIL
        with self.catch:
            if self.catch.caught is None:
                found = self._offered[StateKind.of_nvram_name(name.decode("ascii"))]
                if found is None:
                    result = TpmResult.RETRY
                else:
                    address = self._malloc(len(found))
                    if address is None:
                        raise MemoryError(f"no {len(found)} bytes for TPM state")
                    ctypes.memmove(address, found, len(found))
                    data[0] = address
                    length[0] = len(found)
                    result = TpmResult.SUCCESS
        return result

    def _on_store(self, data: int, length: int, _tpm_number: int, name: bytes) -> int:
        result = TpmResult.FAIL
        with self.catch:
            if self.catch.caught is None:
                kind = StateKind.of_nvram_name(name.decode("ascii"))
                blob = ctypes.string_at(data, length)
                self._port.store(kind, blob)
                if self._offered:
                    self._offered[kind] = blob
                result = TpmResult.SUCCESS
        return result

    def _on_delete(self, _tpm_number: int, name: bytes, _must_exist: int) -> int:
        result = TpmResult.FAIL
        with self.catch:
            if self.catch.caught is None:
                kind = StateKind.of_nvram_name(name.decode("ascii"))
                self._port.delete(kind)
                if self._offered:
                    self._offered[kind] = None
                result = TpmResult.SUCCESS
        return result

    def _on_get_locality(self, locality: Any, _tpm_number: int) -> int:
        locality[0] = self.locality
        return TpmResult.SUCCESS


def _ready() -> int:
    """There is nothing to prepare: the port is ready when the engine is made."""
    return TpmResult.SUCCESS
