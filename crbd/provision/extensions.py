"""The certificate extensions and attributes that the TCG defines, as X.509 values.

Sources: TCG EK Credential Profile for TPM Family 2.0 (version 2.5, section 3.2), TCG Platform Attribute Credential
Profile 1.0 (section 3.2), TCG "TPM 2.0 Keys for Device Identity and Attestation" 1.0 (section 8), RFC 4108 section 5.
Compared field by field with the certificates of swtpm 0.7 and 0.11.

Strings are UTF8String, as both of them write; every relative distinguished name holds one attribute.
"""

from __future__ import annotations

from enum import Enum

from cryptography import x509
from cryptography.x509.oid import ExtensionOID, ObjectIdentifier

from crbd.provision.signing import PlatformAttributes, Specification, TpmAttributes

TCG = "2.23.133"
"""The arc joint-iso-itu-t(2) international-organizations(23) tcg(133)."""


class TcgOid(Enum):
    """The object identifiers used here."""

    TPM_MANUFACTURER = ObjectIdentifier(f"{TCG}.2.1")
    TPM_MODEL = ObjectIdentifier(f"{TCG}.2.2")
    TPM_VERSION = ObjectIdentifier(f"{TCG}.2.3")
    TPM_SPECIFICATION = ObjectIdentifier(f"{TCG}.2.16")
    PLATFORM_MANUFACTURER = ObjectIdentifier(f"{TCG}.5.1.1")
    PLATFORM_MODEL = ObjectIdentifier(f"{TCG}.5.1.4")
    PLATFORM_VERSION = ObjectIdentifier(f"{TCG}.5.1.5")
    EK_CERTIFICATE = ObjectIdentifier(f"{TCG}.8.1")
    """Extended key usage of an EK certificate."""
    PLATFORM_CERTIFICATE = ObjectIdentifier(f"{TCG}.8.2")
    """Extended key usage of a platform certificate."""
    HARDWARE_TYPE_TPM = ObjectIdentifier(f"{TCG}.1.2")
    """hwType of a device identity: a TPM 2.0."""


HARDWARE_MODULE_NAME = ObjectIdentifier("1.3.6.1.5.5.7.8.4")
"""id-on-hardwareModuleName (RFC 4108)."""

_INTEGER, _OCTET_STRING, _OBJECT_IDENTIFIER, _UTF8_STRING, _SEQUENCE, _SET = 0x02, 0x04, 0x06, 0x0C, 0x30, 0x31


def tpm_name(attributes: TpmAttributes) -> x509.SubjectAlternativeName:
    """Who made the TPM: a directory name of manufacturer, model and version."""
    return _alternative_name(
        (TcgOid.TPM_MANUFACTURER, attributes.manufacturer),
        (TcgOid.TPM_MODEL, attributes.model),
        (TcgOid.TPM_VERSION, attributes.version),
    )


def platform_name(attributes: PlatformAttributes) -> x509.SubjectAlternativeName:
    """Who made the machine: a directory name of manufacturer, model and version."""
    return _alternative_name(
        (TcgOid.PLATFORM_MANUFACTURER, attributes.manufacturer),
        (TcgOid.PLATFORM_MODEL, attributes.model),
        (TcgOid.PLATFORM_VERSION, attributes.version),
    )


def hardware_module_name(serial_number: str) -> x509.SubjectAlternativeName:
    """Which TPM a device identity belongs to: an otherName hardwareModuleName.

    swtpm 0.11 puts the same content into a directory name; RFC 4108 and IEEE 802.1AR say otherName.
    """
    content = _tlv(
        _SEQUENCE,
        _object_identifier(TcgOid.HARDWARE_TYPE_TPM.value),
        _tlv(_OCTET_STRING, serial_number.encode()),
    )
    return x509.SubjectAlternativeName([x509.OtherName(HARDWARE_MODULE_NAME, content)])


def tpm_specification(specification: Specification) -> x509.UnrecognizedExtension:
    """subjectDirectoryAttributes with the one attribute tPMSpecification: family, level and revision."""
    value = _tlv(
        _SEQUENCE,
        _tlv(_UTF8_STRING, specification.family.encode()),
        _integer(specification.level),
        _integer(specification.revision),
    )
    attribute = _tlv(_SEQUENCE, _object_identifier(TcgOid.TPM_SPECIFICATION.value), _tlv(_SET, value))
    return x509.UnrecognizedExtension(ExtensionOID.SUBJECT_DIRECTORY_ATTRIBUTES, _tlv(_SEQUENCE, attribute))


def _alternative_name(*parts: tuple[TcgOid, str]) -> x509.SubjectAlternativeName:
    name = x509.Name([x509.NameAttribute(oid.value, text) for oid, text in parts])
    return x509.SubjectAlternativeName([x509.DirectoryName(name)])


def _tlv(tag: int, *contents: bytes) -> bytes:
    """A DER element (X.690, 8.1): tag, length, contents."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def _integer(value: int) -> bytes:
    """A DER INTEGER that is not negative (X.690, 8.3): the fewest bytes whose top bit is clear."""
    return _tlv(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _object_identifier(oid: ObjectIdentifier) -> bytes:
    """A DER OBJECT IDENTIFIER (X.690, 8.19): base 128, the first two arcs in one number."""
    first, second, *rest = (int(arc) for arc in oid.dotted_string.split("."))
    return _tlv(_OBJECT_IDENTIFIER, *(_base_128(arc) for arc in (first * 40 + second, *rest)))


def _base_128(number: int) -> bytes:
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))
