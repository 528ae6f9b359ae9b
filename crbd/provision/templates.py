"""The keys of a provisioned TPM as templates, with their standard handles and NV indices. Values only.

Sources: TCG EK Credential Profile for TPM Family 2.0, 2.5 (EKs: templates L-1, L-2, H-1 to H-4, H-6, H-7, and the NV
indices of certificates, nonces and templates), TCG Registry of Reserved TPM 2.0 Handles and Localities (handles), TCG
TPM v2.0 Provisioning Guidance (SRK), TCG TPM 2.0 Keys for Device Identity and Attestation, 7.3 (IAK, IDevID). Where
they leave a choice, what swtpm_setup does is done: the handle of an EK follows the number of its certificate index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntFlag
from typing import Final

from crbd.provision.options import KeyAlgorithm


class Attribute(IntFlag):
    """TPMA_OBJECT (TPM 2.0 Part 2, 8.3), as far as keys here have them."""

    FIXED_TPM = 1 << 1
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


class Scheme(Enum):
    """The signing scheme that a key is bound to."""

    NONE = "null"
    RSAPSS = "rsapss"
    ECDSA = "ecdsa"


class Hierarchy(Enum):
    """Whose seed a primary key comes from."""

    OWNER = "owner"
    ENDORSEMENT = "endorsement"


@dataclass(frozen=True, slots=True)
class Template:
    """The public area that TPM2_CreatePrimary is given (TPMT_PUBLIC, Part 2, 12.2.4)."""

    algorithm: KeyAlgorithm
    name_hash: str
    """`sha256`, `sha384` or `sha512`."""
    attributes: Attribute
    policy: bytes
    aes_bits: int
    """Of a storage key's AES in CFB mode; 0 for a key that is none."""
    scheme: Scheme
    unique: bytes
    """What stands in the place of the modulus, or of the point's x."""
    unique_y: bytes = b""
    """What stands in the place of the point's y."""


@dataclass(frozen=True, slots=True)
class PersistentKey:
    """A key that is made from a template and kept at a handle, and where its certificate goes."""

    role: str
    """`EK`, `SRK`, `IAK` or `IDevID`."""
    hierarchy: Hierarchy
    template: Template
    handle: int
    certificate_index: int | None = None
    template_index: int | None = None


PLATFORM_CERTIFICATE_INDEX: Final = 0x01C08000
SRK_HANDLE: Final = 0x81000001
IDEVID_HANDLE: Final = 0x81020000
IAK_HANDLE: Final = 0x81020001
IAK_CERTIFICATE_INDEX: Final = 0x01C90100
IDEVID_CERTIFICATE_INDEX: Final = 0x01C90200

POLICY_A: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""TPM2_PolicySecret(TPM_RH_ENDORSEMENT), for SHA-256."""
POLICY_B: Final = {
    "sha256": bytes.fromhex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0"),
    "sha384": bytes.fromhex(
        "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
    ),
    "sha512": bytes.fromhex(
        "b8221ca69e8550a4914de3faa6a18c072cc01208073a928d5d66d59ef79e49a4"
        "29c41a6b269571d57edb25fbdb1838425608b413cd616a5f6db5b6071af99bea"
    ),
}
"""Policy A or TPM2_PolicyAuthorizeNV with the index that the profile reserves for it (0x01c07f01 and up)."""
IAK_POLICY: Final = {
    "sha256": bytes.fromhex("5437182326e414fca797d5f174615a1641f61255797c3a2b22c21d120b2d1e07"),
    "sha384": bytes.fromhex(
        "129d94ebf84556652c6eef43bbb757512ac87e52be7b349ca6ce4d826f749fcf672f51716c5cbb605f313bf345aab312"
    ),
    "sha512": bytes.fromhex(
        "8060d1fb31716a29e48a6e5fece088bcfc1b278fc162255e81c3eca3544cd44a"
        "f94410c3715d561cccd9e39a6cb2646d43535bb54ea88710deb5f7836bd9b586"
    ),
}
"""The default policy of attestation keys."""
IDEVID_POLICY: Final = {
    "sha256": bytes.fromhex("ad6b3a2284fd698a0710bf5cc1b9bdf15e2532e3f601fa4b93a6a8fa8de579ea"),
    "sha384": bytes.fromhex(
        "4db1aa836d0b5615df6ee53a40ef70c61c217f4303d44695925972bc927006cfa5cbdf6dc18c4dbe329b2f1542c3dd33"
    ),
    "sha512": bytes.fromhex(
        "7dd7500fd6c1b94f97a6af910da147301ef28f662fee06f225a4ccadda3b4e6b"
        "38e66b2f3ad5dee1a0503cd2daedb1e68cfe4f84b03a8cd22bb6a976f071a72f"
    ),
}
"""The default policy of signing keys."""

_FIXED: Final = Attribute.FIXED_TPM | Attribute.FIXED_PARENT | Attribute.SENSITIVE_DATA_ORIGIN
_STORAGE: Final = Attribute.RESTRICTED | Attribute.DECRYPT
_HASHES: Final = {
    KeyAlgorithm.RSA_2048: "sha256",
    KeyAlgorithm.RSA_3072: "sha384",
    KeyAlgorithm.RSA_4096: "sha384",
    KeyAlgorithm.ECC_P256: "sha256",
    KeyAlgorithm.ECC_P384: "sha384",
    KeyAlgorithm.ECC_P521: "sha512",
}
_LOW_INDICES: Final = {KeyAlgorithm.RSA_2048: 0x01C00002, KeyAlgorithm.ECC_P256: 0x01C0000A}
_HIGH_INDICES: Final = {
    KeyAlgorithm.RSA_2048: 0x01C00012,
    KeyAlgorithm.ECC_P256: 0x01C00014,
    KeyAlgorithm.ECC_P384: 0x01C00016,
    KeyAlgorithm.ECC_P521: 0x01C00018,
    KeyAlgorithm.RSA_3072: 0x01C0001C,
    KeyAlgorithm.RSA_4096: 0x01C0001E,
}
"""NV indices of the EKs' certificates. A low-range one is followed by a nonce and a template, a high-range one by a
template."""
_LOW_HANDLES: Final = {KeyAlgorithm.RSA_2048: 0x81010001, KeyAlgorithm.ECC_P256: 0x8101000A}
_UNIQUE_SIZES: Final = {
    KeyAlgorithm.RSA_2048: 256,
    KeyAlgorithm.RSA_3072: 384,
    KeyAlgorithm.RSA_4096: 512,
    KeyAlgorithm.ECC_P256: 32,
    KeyAlgorithm.ECC_P384: 48,
    KeyAlgorithm.ECC_P521: 66,
}
"""Bytes of a modulus or of a coordinate."""


def endorsement_key(
    algorithm: KeyAlgorithm, *, high_range: bool = False, allow_signing: bool = False, decryption: bool = True
) -> PersistentKey:
    """The EK of an algorithm: after the low-range template where there is one, unless `high_range`.

    With `allow_signing` it is no standard EK: it is not restricted, and may sign, and decrypt too if `decryption`.
    """
    low = algorithm in _LOW_INDICES and not high_range
    template = _low_range(algorithm) if low else _high_range(algorithm)
    if allow_signing:
        uses = Attribute.SIGN | Attribute.DECRYPT if decryption else Attribute.SIGN
        template = replace(template, attributes=template.attributes & ~_STORAGE | uses, aes_bits=0)
    if low:
        index = _LOW_INDICES[algorithm]
        return PersistentKey("EK", Hierarchy.ENDORSEMENT, template, _LOW_HANDLES[algorithm], index, index + 2)
    index = _HIGH_INDICES[algorithm]
    return PersistentKey("EK", Hierarchy.ENDORSEMENT, template, 0x81010000 | index & 0xFF, index, index + 1)


def storage_key(algorithm: KeyAlgorithm) -> PersistentKey:
    """The SRK: may be used with an empty password, without dictionary attack protection."""
    attributes = _FIXED | _STORAGE | Attribute.USER_WITH_AUTH | Attribute.NO_DA
    zeros = bytes(_UNIQUE_SIZES[algorithm])
    template = Template(
        algorithm,
        _HASHES[algorithm],
        attributes,
        b"",
        _aes_bits(algorithm),
        Scheme.NONE,
        zeros,
        b"" if algorithm.is_rsa else zeros,
    )
    return PersistentKey("SRK", Hierarchy.OWNER, template, SRK_HANDLE)


def attestation_key(algorithm: KeyAlgorithm) -> PersistentKey:
    """The IAK: restricted, signs what the TPM itself says."""
    scheme = Scheme.RSAPSS if algorithm.is_rsa else Scheme.ECDSA
    template = _device_key(algorithm, Attribute.RESTRICTED | Attribute.SIGN, IAK_POLICY, scheme, b"IAK")
    return PersistentKey("IAK", Hierarchy.ENDORSEMENT, template, IAK_HANDLE, IAK_CERTIFICATE_INDEX)


def device_identity_key(algorithm: KeyAlgorithm) -> PersistentKey:
    """The IDevID key: signs anything."""
    scheme = Scheme.NONE if algorithm.is_rsa else Scheme.ECDSA
    template = _device_key(algorithm, Attribute.SIGN, IDEVID_POLICY, scheme, b"IDEVID")
    return PersistentKey("IDevID", Hierarchy.ENDORSEMENT, template, IDEVID_HANDLE, IDEVID_CERTIFICATE_INDEX)


def every_endorsement_key() -> tuple[PersistentKey, ...]:
    """The standard EKs, by handle."""
    low = [endorsement_key(algorithm) for algorithm in _LOW_INDICES]
    high = [endorsement_key(algorithm, high_range=True) for algorithm in _HIGH_INDICES]
    return (*low, *high)


def _low_range(algorithm: KeyAlgorithm) -> Template:
    attributes = _FIXED | _STORAGE | Attribute.ADMIN_WITH_POLICY
    zeros = bytes(_UNIQUE_SIZES[algorithm])
    return Template(
        algorithm, "sha256", attributes, POLICY_A, 128, Scheme.NONE, zeros, b"" if algorithm.is_rsa else zeros
    )


def _high_range(algorithm: KeyAlgorithm) -> Template:
    attributes = _FIXED | _STORAGE | Attribute.ADMIN_WITH_POLICY | Attribute.USER_WITH_AUTH
    name_hash = _HASHES[algorithm]
    return Template(algorithm, name_hash, attributes, POLICY_B[name_hash], _aes_bits(algorithm), Scheme.NONE, b"")


def _device_key(
    algorithm: KeyAlgorithm, uses: Attribute, policies: dict[str, bytes], scheme: Scheme, unique: bytes
) -> Template:
    attributes = _FIXED | Attribute.USER_WITH_AUTH | Attribute.ADMIN_WITH_POLICY | uses
    name_hash = _HASHES[algorithm]
    return Template(algorithm, name_hash, attributes, policies[name_hash], 0, scheme, unique)


def _aes_bits(algorithm: KeyAlgorithm) -> int:
    return 128 if _HASHES[algorithm] == "sha256" else 256
