"""The replies of the swtpm control channel as values. How they look on the wire stands in `crbd.control.spec`.

Every reply opens with a 32-bit TPM_RESULT. Where a class has no `result`, it is 0, success.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from crbd.control.requests import StateFlag


class Capability(IntFlag):
    """The capability word (PTM_CAP_*). Unknown bits are kept."""

    INIT = 1 << 0
    SHUTDOWN = 1 << 1
    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    CANCEL_TPM_CMD = 1 << 5
    STORE_VOLATILE = 1 << 6
    RESET_TPMESTABLISHED = 1 << 7
    GET_STATEBLOB = 1 << 8
    SET_STATEBLOB = 1 << 9
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATAFD = 1 << 12
    SET_BUFFERSIZE = 1 << 13
    GET_INFO = 1 << 14
    SEND_COMMAND_HEADER = 1 << 15
    """The data channel understands commands behind a locality header; not a control command."""
    LOCK_STORAGE = 1 << 16


class ConfigFlag(IntFlag):
    """Reply of GET_CONFIG (PTM_CONFIG_FLAG_*). Unknown bits are kept."""

    FILE_KEY = 1
    """The stored state is encrypted."""
    MIGRATION_KEY = 2
    """State blobs on the control channel are encrypted."""


_NO_FLAGS = StateFlag(0)


@dataclass(frozen=True, slots=True)
class Done:
    """Success, and nothing more to say."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The commands that are there."""

    caps: Capability


@dataclass(frozen=True, slots=True)
class Established:
    """The tpmEstablished flag, 0 or 1."""

    bit: int


@dataclass(frozen=True, slots=True)
class StateBlob:
    """`data` is the blob from the requested offset to its end.

    `total_length` counts bytes; swtpm sends the length of `data` there, and QEMU insists that both are equal. With a
    `result` other than 0 this is GET_STATEBLOB's refusal: no data, but the whole head.
    """

    result: int
    flags: StateFlag = _NO_FLAGS
    total_length: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Config:
    """Which keys are in use."""

    flags: ConfigFlag


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """The TPM's buffer size in bytes: in force, smallest and largest that can be asked for."""

    current: int
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Info:
    """A piece of the JSON text, at most `MAX_INFO` bytes; the last piece ends with the text's NUL.

    `total_length` is the text's whole length in bytes, NUL included, whatever the offset.
    """

    total_length: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Registers:
    """The CRB registers: one 4 KiB page per locality, locality 0 first, little-endian as a guest reads them."""

    localities: int
    pages: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether it was done, and in UTF-8 what there is to say of it, or why it was not. crbd's own."""

    done: bool
    text: bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Whether there is one, and the document, or in UTF-8 why there is none. crbd's own."""

    done: bool
    document: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """An error: the result alone, whatever the success reply would have held. `result` is never 0."""

    result: int


Reply = (
    Done
    | Capabilities
    | Established
    | StateBlob
    | Config
    | BufferSizes
    | Info
    | Registers
    | Outcome
    | Snapshot
    | Failure
)
