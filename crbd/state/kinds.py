"""The three kinds of state that a TPM 2.0 in libtpms has, under the names each side of crbd calls them by."""

from __future__ import annotations

from enum import IntEnum


class StateKind(IntEnum):
    """The value is the blob type of the control channel (PTM_BLOB_TYPE_*)."""

    PERMANENT = 1
    """Seeds, hierarchies, NV indices, persistent keys: what makes this TPM this TPM."""
    VOLATILE = 2
    """PCRs, sessions, loaded objects: what a running TPM holds beside its permanent state."""
    SAVESTATE = 3
    """TPM 1.2's saved state; libtpms never stores one for a TPM 2.0, yet clients ask for it."""

    @property
    def nvram_name(self) -> str:
        """The name in libtpms' callbacks and, behind `tpm2-00.`, in swtpm's directory (tpm_nvfilename.h)."""
        return _NVRAM_NAMES[self]

    @classmethod
    def of_nvram_name(cls, name: str) -> StateKind:
        """The kind that libtpms' callbacks call `name`. Raises ValueError for a name it does not use."""
        for kind, known in _NVRAM_NAMES.items():
            if known == name:
                return kind
        raise ValueError(f"libtpms asked for NVRAM data called {name!r}")


_NVRAM_NAMES = {
    StateKind.PERMANENT: "permall",
    StateKind.VOLATILE: "volatilestate",
    StateKind.SAVESTATE: "savestate",
}
