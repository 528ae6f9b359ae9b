"""What a register access asks of the world, as values: the device never calls anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Execute(NamedTuple):
    """Run `command` (a TPM command as the guest gave it, unchecked, perhaps cut short) on behalf of `locality`.

    The device waits: bring the response back by `complete`, or say `fail`.
    """

    command: bytes
    locality: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask the command that executes now to give up. It still ends by `complete` or `fail`."""


@dataclass(frozen=True, slots=True)
class ResetEstablished:
    """Clear the tpmEstablished flag on behalf of `locality` (3 or 4), then tell the device by `set_established`."""

    locality: int


@dataclass(frozen=True, slots=True)
class HashStart:
    """Begin the locality-4 hash sequence (_TPM_Hash_Start), once no command executes any more."""


@dataclass(frozen=True, slots=True)
class HashData:
    """Add `data` to the hash sequence (_TPM_Hash_Data)."""

    data: bytes


@dataclass(frozen=True, slots=True)
class HashEnd:
    """End the hash sequence (_TPM_Hash_End), then tell the device the flag by `set_established`."""


Effect = Execute | Cancel | ResetEstablished | HashStart | HashData | HashEnd


@dataclass(frozen=True, slots=True)
class Busy:
    """`CrbDevice.submit` did not take the command, and nothing has changed.

    `executing`: another command executes; otherwise another locality waits for its turn.
    """

    executing: bool
