"""What provisioning did."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Outcome(Enum):
    """What became of the store."""

    MADE = "made"
    """A new TPM."""
    COMPLETED = "completed"
    """A TPM that was there got what it lacked."""
    REPLACED = "replaced"
    """A new TPM in the place of the one that was there."""
    RECONFIGURED = "reconfigured"
    """A TPM that was there got other PCR banks."""
    KEPT = "kept"
    """A TPM was there and nothing was to be done."""


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A key at a persistent handle."""

    role: str
    """`EK`, `SRK`, `IAK` or `IDevID`."""
    algorithm: str
    """A value of `KeyAlgorithm`."""
    handle: int
    fingerprint: str
    """SHA-256 of the public area (TPMT_PUBLIC), hexadecimal."""
    new: bool
    """Made now; else it was there."""


@dataclass(frozen=True, slots=True)
class WrittenIndex:
    """An NV index with a certificate or a template."""

    index: int
    what: str
    size: int
    """Bytes."""
    locked: bool
    new: bool
    """Written now; else it was there."""


@dataclass(frozen=True, slots=True)
class ProvisionReport:
    """What was made, in the order in which it was."""

    outcome: Outcome
    keys: tuple[MadeKey, ...] = ()
    indices: tuple[WrittenIndex, ...] = ()
    active_banks: tuple[str, ...] = ()
    available_banks: tuple[str, ...] = ()
    profile: str = ""
    """Of the TPM, as libtpms names it; empty before libtpms 0.10."""
    files: tuple[Path, ...] = ()
    """Copies of certificates that were written."""
    notes: tuple[str, ...] = ()
    """What the operator should be told: that an interrupted run was started over, a bank that the TPM does not have."""
