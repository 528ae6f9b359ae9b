"""The requests of the control channel as values: swtpm's 19, and crbd's own.

Their codes, their bytes and what the TPM must be for them stand in `crbd.control.spec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag


class InitFlag(IntFlag):
    """Flags of INIT (PTM_INIT_FLAG_*). Unknown bits are kept."""

    DELETE_VOLATILE = 1
    """Delete the stored volatile state once it has been read: it must not be used for a second start."""


class StateFlag(IntFlag):
    """Flags of state blobs (PTM_STATE_FLAG_*). Unknown bits are kept."""

    DECRYPTED = 1
    """In GET_STATEBLOB: hand the blob out without the file key's encryption (the migration key's stays)."""
    ENCRYPTED = 2
    """In the reply of GET_STATEBLOB and in SET_STATEBLOB: the state in the blob is encrypted with the file key."""


@dataclass(frozen=True, slots=True)
class GetCapability:
    """Which commands are there?"""


@dataclass(frozen=True, slots=True)
class Init:
    """Power the TPM on, or off and on again."""

    flags: InitFlag


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Power the TPM off and end the process."""


@dataclass(frozen=True, slots=True)
class GetTpmEstablished:
    """Read the tpmEstablished flag."""


@dataclass(frozen=True, slots=True)
class SetLocality:
    """Commands from now on come from `locality` (0 to 4; the service refuses the others, which arrive here too)."""

    locality: int


@dataclass(frozen=True, slots=True)
class HashStart:
    """Begin the locality-4 hash sequence."""


@dataclass(frozen=True, slots=True)
class HashData:
    """Bytes for the hash sequence."""

    data: bytes


@dataclass(frozen=True, slots=True)
class HashEnd:
    """End the hash sequence."""


@dataclass(frozen=True, slots=True)
class CancelTpmCmd:
    """Ask the TPM command that executes now to give up."""


@dataclass(frozen=True, slots=True)
class StoreVolatile:
    """Write the volatile state to the store."""


@dataclass(frozen=True, slots=True)
class ResetTpmEstablished:
    """Clear the tpmEstablished flag on behalf of `locality` (0 to 4; others arrive here too)."""

    locality: int


@dataclass(frozen=True, slots=True)
class GetStateBlob:
    """Hand out a state blob from byte `offset` on. `blob_type` is a `StateKind` value if the client is right."""

    flags: StateFlag
    blob_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class SetStateBlob:
    """Take a state blob for the next INIT. `blob_type` is a `StateKind` value if the client is right."""

    flags: StateFlag
    blob_type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Stop:
    """Power the TPM off; the process stays."""


@dataclass(frozen=True, slots=True)
class GetConfig:
    """Which keys are in use?"""


@dataclass(frozen=True, slots=True)
class SetDataFd:
    """`fd` is the data channel from now on. The descriptor belongs to whoever holds this value: use it or close it."""

    fd: int


@dataclass(frozen=True, slots=True)
class SetBufferSize:
    """Set the TPM's buffer size to `wanted` bytes, or as near as it may be; 0 asks only."""

    wanted: int


@dataclass(frozen=True, slots=True)
class GetInfo:
    """JSON text about the TPM, from byte `offset` on. `flags` (64 bits) are those of libtpms' TPMLIB_GetInfo."""

    flags: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class LockStorage:
    """Lock the storage again after it was released, with `retries` further tries 10 ms apart."""

    retries: int


@dataclass(frozen=True, slots=True)
class GetRegisters:
    """Show the CRB registers as they are now, without touching them. crbd's own."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """Put the program that is installed now in the place of this process, with all its clients. crbd's own."""


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """The whole TPM as of now, as a document. crbd's own."""


class RestoreFlag(IntFlag):
    """Flags of RESTORE. Unknown bits are kept."""

    ALLOW_ROLLBACK = 1
    """The TPM goes back in time, and what it has done since is lost: yes."""


@dataclass(frozen=True, slots=True)
class Restore:
    """Put a document that TAKE_SNAPSHOT gave in the place of the TPM. crbd's own."""

    flags: RestoreFlag
    document: bytes


Request = (
    GetCapability
    | Init
    | Shutdown
    | GetTpmEstablished
    | SetLocality
    | HashStart
    | HashData
    | HashEnd
    | CancelTpmCmd
    | StoreVolatile
    | ResetTpmEstablished
    | GetStateBlob
    | SetStateBlob
    | Stop
    | GetConfig
    | SetDataFd
    | SetBufferSize
    | GetInfo
    | LockStorage
    | GetRegisters
    | Upgrade
    | TakeSnapshot
    | Restore
)
