"""What to make of a TPM, and what to do where one is already."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from crbd.provision.signing import PlatformAttributes

BANK_NAMES: Final = ("sha1", "sha256", "sha384", "sha512", "sm3-256", "sha3-256", "sha3-384", "sha3-512")
"""PCR banks by the names that swtpm_setup has for them. Which of them a TPM has is for libtpms to say."""


class KeyAlgorithm(Enum):
    """Algorithm and size of a key. The values are swtpm_setup's words for them."""

    RSA_2048 = "rsa2048"
    RSA_3072 = "rsa3072"
    RSA_4096 = "rsa4096"
    ECC_P256 = "ecc_nist_p256"
    ECC_P384 = "ecc_nist_p384"
    ECC_P521 = "ecc_nist_p521"

    @property
    def is_rsa(self) -> bool:
        """RSA, else ECC."""
        return self.value.startswith("rsa")

    @property
    def short(self) -> str:
        """In names of certificate files, as swtpm_setup has it: rsa2048, secp384r1."""
        return self.value if self.is_rsa else f"secp{self.value.removeprefix('ecc_nist_p')}r1"


class Existing(Enum):
    """What happens where the store holds a TPM already."""

    REFUSE = "refuse"
    """An error; nothing is changed."""
    KEEP = "keep"
    """Nothing: it stays as it is, and that is success (swtpm_setup's --not-overwrite)."""
    COMPLETE = "complete"
    """It gets what it lacks of what is asked for."""
    REPLACE = "replace"
    """It is thrown away and a new one made (swtpm_setup's --overwrite)."""
    RECONFIGURE = "reconfigure"
    """Its PCR banks are set and nothing else; no TPM is an error (swtpm_setup's --reconfigure)."""


@dataclass(frozen=True, slots=True)
class ProvisionOptions:
    """What to make. Without any change of these, what `swtpm_setup --tpm2 --createek` makes."""

    endorsement_keys: tuple[KeyAlgorithm, ...] = (KeyAlgorithm.RSA_2048, KeyAlgorithm.ECC_P384)
    """EKs to make at their standard handles. RSA-2048 and P-256 after the low-range templates, L-1 and L-2 of the TCG
    EK Credential Profile, the others after the high-range ones."""
    high_range: bool = False
    """Make RSA-2048 and P-256 EKs after the high-range templates instead, H-1 and H-2, at the handles of those."""
    allow_signing: bool = False
    """EKs that may sign: no standard EKs; their templates are stored in NV."""
    decryption: bool = True
    """EKs that may decrypt. Counts only with `allow_signing`: an EK that may do neither is none."""
    storage_key: KeyAlgorithm | None = None
    """The storage root key to make at 0x81000001."""
    attestation_key: KeyAlgorithm | None = None
    """The IAK to make at 0x81020001, certified if `ek_certificates`."""
    device_identity_key: KeyAlgorithm | None = None
    """The IDevID key to make at 0x81020000, certified if `ek_certificates`."""
    ek_certificates: bool = False
    """Ask the signer for certificates of the EKs and store them in NV."""
    platform_certificate: bool = False
    """Ask the signer for a platform certificate, with the first EK, and store it in NV."""
    lock_nvram: bool = False
    """Write-lock the certificates for good."""
    pcr_banks: tuple[str, ...] | None = ("sha256",)
    """PCR banks to be active, the others being inactive; None leaves them all as they are."""
    profile: str | None = None
    """The profile (libtpms' JSON) of a new TPM; needs libtpms 0.10."""
    subject: str = ""
    """Whose TPM it is, for the certificates' subjects (swtpm_setup's --vmid)."""
    platform: PlatformAttributes = field(default_factory=PlatformAttributes)
    """For the certificates that name the platform."""
    existing: Existing = Existing.REFUSE
    certificate_directory: Path | None = None
    """Where copies of the EK, IAK and IDevID certificates are put, in DER: ek-rsa2048.crt, ek-secp384r1.crt, ..."""
