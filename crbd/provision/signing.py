"""What a certificate authority is asked for, and the port behind which it stands.

Provisioning makes the keys and stores the certificates; who signs, and with what, is the signer's own business: a local
authority, an external program, a PKCS#11 module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from crbd.errors import EngineFailedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    KeyPublic = RSAPublicKey | EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Specification:
    """Which TPM specification the TPM follows (TCG EK Credential Profile, "tPMSpecification")."""

    family: str = "2.0"
    level: int = 0
    revision: int = 164


@dataclass(frozen=True, slots=True)
class TpmAttributes:
    """Who made the TPM (TCG EK Credential Profile, subject alternative name)."""

    manufacturer: str = "id:00001014"
    """`id:` and the vendor id as eight hexadecimal digits."""
    model: str = "swtpm"
    version: str = "id:20191023"
    """`id:` and the firmware version in hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class PlatformAttributes:
    """Which machine the TPM is built into (TCG Platform Attribute Credential Profile)."""

    manufacturer: str = "crbd"
    model: str = "virtual machine"
    version: str = "1"


@dataclass(frozen=True, slots=True)
class TpmDescription:
    """What libtpms says of its TPM (TPMLIB_GetInfo with flags 1 and 2), for certificates."""

    specification: Specification = Specification()
    attributes: TpmAttributes = TpmAttributes()

    INFO_FLAGS = 1 | 2
    """TPMLIB_INFO_TPMSPECIFICATION and TPMLIB_INFO_TPMATTRIBUTES."""

    @classmethod
    def parse(cls, text: str) -> TpmDescription:
        """Of libtpms' (or GET_INFO's) JSON. Raises EngineFailedError where that is something else."""
        try:
            found = json.loads(text)
            specification, attributes = found["TPMSpecification"], found["TPMAttributes"]
            return cls(
                Specification(
                    str(specification["family"]), int(specification["level"]), int(specification["revision"])
                ),
                TpmAttributes(str(attributes["manufacturer"]), str(attributes["model"]), str(attributes["version"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise EngineFailedError(
                f"the TPM's description of itself is not understood: {text[:200]!r}", "use another libtpms"
            ) from error


@dataclass(frozen=True, slots=True)
class EkRequest:
    """Asks for a certificate of an endorsement key, or of the platform that holds it."""

    public_key: KeyPublic
    subject: str
    """Whose TPM: the virtual machine's name and UUID, or what else the operator said; may be empty."""
    specification: Specification
    attributes: TpmAttributes
    platform: PlatformAttributes = PlatformAttributes()
    allow_signing: bool = False
    """The key may sign: key usage digitalSignature."""
    decryption: bool = True
    """The key may decrypt: key usage keyEncipherment (RSA) or keyAgreement (ECC)."""


class DevIdKind(Enum):
    """The two device identity keys (TCG "TPM 2.0 Keys for Device Identity and Attestation")."""

    IAK = "iak"
    """Initial attestation key: signs what the TPM itself says."""
    IDEVID = "idevid"
    """Initial device identity: signs anything."""


@dataclass(frozen=True, slots=True)
class DevIdRequest:
    """Asks for a certificate of a device identity key."""

    kind: DevIdKind
    public_key: KeyPublic
    subject: str
    specification: Specification
    attributes: TpmAttributes
    platform: PlatformAttributes
    ek_certificate: bytes
    """DER of the certificate of the same TPM's first EK: the TPM serial number is derived from it (issuer's key id and
    serial number, "TPM 2.0 Keys for Device Identity and Attestation", 8.1)."""


class CertificateSigner(Protocol):
    """Issues certificates. Raises OperatorError where it cannot."""

    def ek_certificate(self, request: EkRequest) -> bytes:
        """DER of the endorsement key's certificate."""

    def platform_certificate(self, request: EkRequest) -> bytes:
        """DER of the platform certificate."""


@runtime_checkable
class DevIdSigner(Protocol):
    """A `CertificateSigner` that can also certify device identity keys has this method too."""

    def devid_certificate(self, request: DevIdRequest) -> bytes:
        """DER of the IAK's or IDevID's certificate."""
