"""Where an ephemeral TPM is reached, and what tells software so: variables of the environment.

A private directory holds its sockets, the TCG Feature API's configuration and key stores, and tpm2-pkcs11's store: keys
of one TPM are of no use with another.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

DATA: Final = "tpm"
"""The data channel's socket."""
CONTROL: Final = "tpm.ctrl"
"""The control channel's: where tpm2-tss' TCTI swtpm looks for it."""
LOG: Final = "log"
"""What the TPM's process says, unless it says so on stderr."""
FAPI_CONFIGURATIONS: Final = ("/etc/tpm2-tss/fapi-config.json", "/usr/local/etc/tpm2-tss/fapi-config.json")
"""Where tpm2-tss has its own."""


def private_directory() -> Path:
    """A new directory that only this user may enter, in TMPDIR."""
    return Path(tempfile.mkdtemp(prefix="crbd-"))


def tcti(place: Path) -> str:
    """The TCTI string that tpm2-tss (3.2 and later) and all on top of it take."""
    return f"swtpm:path={place / DATA}"


def environment(place: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables to set. `inherited` is the environment that they are for."""
    name = tcti(place)
    variables = {
        "TPM2TOOLS_TCTI": name,  # tpm2-tools, clevis, and first of all in tss-esapi for Rust
        "TCTI": name,  # keylime, tss-esapi
        "TPM2_PKCS11_TCTI": name,
        "TPM2OPENSSL_TCTI": name,
        "TPM2TSSENGINE_TCTI": name,
        "TPM2TOTP_TCTI": name,
        "SYSTEMD_TPM2_DEVICE": name,  # systemd-cryptenroll and its kin, where they are told no device
        "TPM2_PKCS11_STORE": str(_made(place / "pkcs11")),
        # For what takes a socket and has no variable of its own, such as go-tpm.
        "CRBD_DATA": str(place / DATA),
        "CRBD_CTRL": str(place / CONTROL),
    }
    configuration = _fapi(place, inherited)
    if configuration is not None:
        variables["TSS2_FAPICONF"] = str(configuration)
    return variables


def _fapi(place: Path, inherited: Mapping[str, str]) -> Path | None:
    """A configuration of the Feature API for this TPM, after the one that is in force; None where there is none."""
    given = inherited.get("TSS2_FAPICONF")
    for candidate in (given,) if given else FAPI_CONFIGURATIONS:
        try:
            settings = json.loads(Path(candidate).read_bytes())
        except (OSError, ValueError):
            continue
        if not isinstance(settings, dict):
            continue
        stores = {name: str(_made(place / "fapi" / name)) for name in ("user_dir", "system_dir", "log_dir")}
        # It was just made: nobody certified its endorsement key.
        settings |= {"tcti": tcti(place), "ek_cert_less": "yes", **stores}
        path = place / "fapi-config.json"
        path.write_text(json.dumps(settings))
        return path
    return None


def _made(directory: Path) -> Path:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return directory
