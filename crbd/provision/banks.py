"""Which PCR banks are active."""

from __future__ import annotations

from dataclasses import dataclass

from crbd.errors import ProvisionError, UsageError
from crbd.provision.options import BANK_NAMES
from crbd.provision.tpm import Tpm


@dataclass(frozen=True, slots=True)
class Banks:
    """What became of the banks."""

    active: tuple[str, ...]
    available: tuple[str, ...]
    missing: tuple[str, ...]
    """Asked for, and not in this TPM."""
    changed: bool


def set_banks(tpm: Tpm, wanted: tuple[str, ...] | None) -> Banks:
    """Make the banks in `wanted` active from the next start on, and the others inactive; None changes nothing.

    A bank that this TPM does not have is left out, as swtpm_setup does. Raises UsageError for a name that no bank has,
    ProvisionError where none of the banks is left or the TPM refuses.
    """
    for name in wanted or ():
        if name not in BANK_NAMES:
            raise UsageError(f"there is no PCR bank {name!r}", f"choose of {', '.join(BANK_NAMES)}")
    found = tpm.banks()
    available = tuple(found)
    before = tuple(name for name in found if found[name])
    if wanted is None:
        return Banks(before, available, (), changed=False)
    active = tuple(name for name in found if name in wanted)
    missing = tuple(name for name in dict.fromkeys(wanted) if name not in found)
    if not active:
        raise ProvisionError(
            f"none of the PCR banks {', '.join(wanted) or '(none)'} is in this TPM", f"it has {', '.join(available)}"
        )
    if active != before:
        tpm.allocate_banks(frozenset(active))
    return Banks(active, available, missing, changed=active != before)
