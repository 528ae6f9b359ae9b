"""libtpms as ctypes sees it: every function used, declared once, under the header's names.

The source is libtpms' public headers: tpm_library.h, tpm_tis.h, tpm_memory.h, tpm_types.h (TPM_RESULT and
TPM_MODIFIER_INDICATOR are 32 bits, TPM_BOOL is 8). The names match the symbols of libtpms.so.0, whose version script
only ever adds. The library is opened at run time, so that nothing is compiled and newer calls are used where they are
present.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_ubyte, c_uint, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

from crbd.engine.port import EngineVersion
from crbd.errors import EngineError, EngineMissingError
from crbd.tpm.results import TpmResult

LIBRARY = "libtpms.so.0"
OLDEST = EngineVersion(0, 9, 2)
"""The oldest version whose state and behaviour crbd was made for."""
_REMEDY = "install libtpms 0.9.2 or later, on Debian and Ubuntu: apt-get install libtpms0"

TPM_RESULT = c_uint32
TPM_BOOL = c_ubyte
TPM_MODIFIER_INDICATOR = c_uint32

TPMLIB_TPM_VERSION_2 = 1

# enum TPMLIB_StateType: bits, unlike the numbers of the control channel.
TPMLIB_STATE_PERMANENT = 1
TPMLIB_STATE_VOLATILE = 2
TPMLIB_STATE_SAVE_STATE = 4

# The types of struct libtpms_callbacks, in its order. `void **` and `const void *` stand for the byte pointers: the
# callbacks copy by address, and a null pointer must be told from an empty buffer.
NvramInit = ctypes.CFUNCTYPE(TPM_RESULT)
NvramLoadData = ctypes.CFUNCTYPE(TPM_RESULT, POINTER(c_void_p), POINTER(c_uint32), c_uint32, c_char_p)
NvramStoreData = ctypes.CFUNCTYPE(TPM_RESULT, c_void_p, c_uint32, c_uint32, c_char_p)
NvramDeleteName = ctypes.CFUNCTYPE(TPM_RESULT, c_uint32, c_char_p, TPM_BOOL)
IoInit = ctypes.CFUNCTYPE(TPM_RESULT)
IoGetLocality = ctypes.CFUNCTYPE(TPM_RESULT, POINTER(TPM_MODIFIER_INDICATOR), c_uint32)
IoGetPhysicalPresence = ctypes.CFUNCTYPE(TPM_RESULT, POINTER(TPM_BOOL), c_uint32)


class LibtpmsCallbacks(ctypes.Structure):
    """struct libtpms_callbacks. libtpms copies it when it is registered; the functions must outlive that."""

    _fields_ = (
        ("sizeOfStruct", c_int),
        ("tpm_nvram_init", NvramInit),
        ("tpm_nvram_loaddata", NvramLoadData),
        ("tpm_nvram_storedata", NvramStoreData),
        ("tpm_nvram_deletename", NvramDeleteName),
        ("tpm_io_init", IoInit),
        ("tpm_io_getlocality", IoGetLocality),
        ("tpm_io_getphysicalpresence", IoGetPhysicalPresence),
    )


@dataclass(frozen=True, slots=True)
class Declaration:
    """One function of the library. `optional`: it came with a later version than `OLDEST` and may be missing."""

    name: str
    result: type[Any] | None
    arguments: tuple[type[Any], ...] = ()
    optional: bool = False


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration("TPMLIB_GetVersion", c_uint32),
    Declaration("TPMLIB_ChooseTPMVersion", TPM_RESULT, (c_int,)),
    Declaration("TPMLIB_RegisterCallbacks", TPM_RESULT, (POINTER(LibtpmsCallbacks),)),
    Declaration("TPMLIB_MainInit", TPM_RESULT),
    Declaration("TPMLIB_Terminate", None),
    Declaration(
        "TPMLIB_Process", TPM_RESULT, (POINTER(c_void_p), POINTER(c_uint32), POINTER(c_uint32), c_void_p, c_uint32)
    ),
    Declaration("TPMLIB_CancelCommand", TPM_RESULT),
    Declaration("TPMLIB_GetTPMProperty", TPM_RESULT, (c_int, POINTER(c_int))),
    Declaration("TPMLIB_GetInfo", c_void_p, (c_uint,)),
    Declaration("TPMLIB_SetBufferSize", c_uint32, (c_uint32, POINTER(c_uint32), POINTER(c_uint32))),
    Declaration("TPMLIB_ValidateState", TPM_RESULT, (c_uint, c_uint)),
    Declaration("TPMLIB_SetState", TPM_RESULT, (c_uint, c_char_p, c_uint32)),
    Declaration("TPMLIB_GetState", TPM_RESULT, (c_uint, POINTER(c_void_p), POINTER(c_uint32))),
    Declaration("TPMLIB_VolatileAll_Store", TPM_RESULT, (POINTER(c_void_p), POINTER(c_uint32))),
    Declaration("TPMLIB_SetDebugFD", None, (c_int,)),
    Declaration("TPMLIB_SetDebugLevel", None, (c_uint,)),
    Declaration("TPMLIB_SetDebugPrefix", TPM_RESULT, (c_char_p,)),
    Declaration("TPM_IO_Hash_Start", TPM_RESULT),
    Declaration("TPM_IO_Hash_Data", TPM_RESULT, (c_char_p, c_uint32)),
    Declaration("TPM_IO_Hash_End", TPM_RESULT),
    Declaration("TPM_IO_TpmEstablished_Get", TPM_RESULT, (POINTER(TPM_BOOL),)),
    Declaration("TPM_IO_TpmEstablished_Reset", TPM_RESULT),
    Declaration("TPM_Malloc", TPM_RESULT, (POINTER(c_void_p), c_uint32)),
    Declaration("TPM_Free", None, (c_void_p,)),
    # Since 0.10.0:
    Declaration("TPMLIB_SetProfile", TPM_RESULT, (c_char_p,), optional=True),
    Declaration("TPMLIB_WasManufactured", TPM_BOOL, optional=True),
)


class Library:
    """An opened libtpms: its functions by name, with the types of the table."""

    def __init__(self, shared_object: ctypes.CDLL) -> None:
        """Look up and type every function. Raises AttributeError, naming it, where a needed one is missing."""
        self._shared_object = shared_object
        self._functions: dict[str, Callable[..., Any]] = {}
        for declaration in DECLARATIONS:
            if declaration.optional and not hasattr(shared_object, declaration.name):
                continue
            function = getattr(shared_object, declaration.name)
            function.restype = declaration.result
            function.argtypes = declaration.arguments
            self._functions[declaration.name] = function
        packed = self["TPMLIB_GetVersion"]()
        self.version = EngineVersion(packed >> 16, packed >> 8 & 0xFF, packed & 0xFF)

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._functions[name]

    def untyped(self, name: str) -> Callable[..., Any]:
        """The function without conversion of its arguments, which must be ctypes objects or plain ints that fit a C
        int.

        For the one call where conversions would be felt.
        """
        function = self._shared_object[name]
        function.restype = next(declaration.result for declaration in DECLARATIONS if declaration.name == name)
        return function

    def check(self, name: str, *arguments: object) -> None:
        """Call a function that returns a TPM_RESULT. Raises EngineError unless that is TPM_SUCCESS."""
        result = self[name](*arguments)
        if result != TpmResult.SUCCESS:
            raise EngineError(name, result)


def load(path: str | None = None) -> Library:
    """Open libtpms: the one at `path`, else the system's. Raises EngineMissingError if it is missing, too old or has no
    TPM 2.0.
    """
    name = path or LIBRARY
    try:
        library = Library(ctypes.CDLL(name))
    except OSError as error:
        raise EngineMissingError(f"libtpms cannot be loaded ({error})", _REMEDY) from error
    except AttributeError as error:
        raise EngineMissingError(f"{name} is not a libtpms that can be used ({error})", _REMEDY) from error
    found = library.version
    if (found.major, found.minor, found.micro) < (OLDEST.major, OLDEST.minor, OLDEST.micro):
        raise EngineMissingError(f"{name} is libtpms {found}, which is too old", _REMEDY)
    return library


def process_malloc() -> Callable[[int], int | None]:
    """The process's malloc: the address of `size` bytes, or None.

    libtpms frees what its load callback hands over with plain free(). Its own TPM_Malloc refuses more than 128 KiB,
    less than a full NV memory (128 KiB + 65 * 704 bytes), and says so on stdout. Looked up in the global scope, as
    libtpms' own free is: both belong together even where another allocator is preloaded.
    """
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = c_void_p
    malloc.argtypes = (ctypes.c_size_t,)

    def allocate(size: int) -> int | None:
        address: int | None = malloc(size)
        return address

    return allocate
