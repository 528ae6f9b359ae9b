"""The certificates of a TPM: endorsement key, platform, device identity; and those of their authority.

Pure: a request, an issuer and a serial number in, a signed certificate out. The profile is the TCG EK Credential
Profile for TPM Family 2.0 with the choices that swtpm's certificates have made the ones that verifiers are tested with:

    version 3, the subject's CN is the machine's name and may be missing, valid until 99991231235959Z
    subjectAltName, critical       the TPM's (EK) or the platform's maker, model and version
    basicConstraints, critical     no authority
    subjectDirectoryAttributes     EK only: tPMSpecification
    keyUsage, critical             keyEncipherment (RSA) or keyAgreement (ECC), digitalSignature
    extendedKeyUsage               tcg-kp-EKCertificate or tcg-kp-PlatformCertificate
    authorityKeyIdentifier, subjectKeyIdentifier
    authorityInfoAccess            where the issuer's certificate can be fetched, if that was configured

The subject key identifier is one more than swtpm writes.
"""

from __future__ import annotations

import datetime as dt
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

from crbd.provision.extensions import (
    TcgOid,
    hardware_module_name,
    platform_name,
    tpm_name,
    tpm_specification,
)
from crbd.provision.signing import DevIdRequest, EkRequest, TpmAttributes

SigningKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
"""What can sign certificates here."""

NO_EXPIRY = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
"""RFC 5280, 4.1.2.5: no well-defined expiration date."""
SERIAL_BYTES = 20
"""Bytes of a serial number at most (RFC 5280, 4.1.2.2)."""
MAX_COMMON_NAME = 64
"""Characters of a common name at most (RFC 5280, ub-common-name)."""
_KEPT_TAIL = 37
"""Of a longer name the last characters are kept: libvirt's ends with a colon and a UUID."""
_IBM = 0x1014
"""The vendor id that libtpms reports for IBM: its PCI vendor number instead of the TCG's four letters."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signs: the certificate and the private key that belongs to it."""

    certificate: x509.Certificate
    key: SigningKey
    certificate_url: str = ""
    """authorityInfoAccess: where the issuer's own certificate can be fetched; left out where empty."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the authority decides about one certificate."""

    serial: int
    subject: x509.Name | None = None
    """In place of the request's subject."""
    not_after: dt.datetime = NO_EXPIRY


def random_serial() -> int:
    """A serial number that nobody has used: 159 random bits, above zero."""
    return secrets.randbits(SERIAL_BYTES * 8 - 1) | 1 << (SERIAL_BYTES * 8 - 2)


def ek_certificate(request: EkRequest, issuer: Issuer, terms: Terms) -> bytes:
    """DER of an endorsement key's certificate."""
    builder = _builder(request, issuer, terms)
    builder = (
        builder.add_extension(_extended_key_usage(TcgOid.EK_CERTIFICATE), critical=False)
        .add_extension(tpm_name(request.attributes), critical=True)
        .add_extension(_NO_AUTHORITY, critical=True)
        .add_extension(tpm_specification(request.specification), critical=False)
    )
    return _finish(builder, _ek_usage(request), issuer)


def platform_certificate(request: EkRequest, issuer: Issuer, terms: Terms) -> bytes:
    """DER of a platform certificate. As swtpm's it is a public key certificate, of the endorsement key."""
    builder = _builder(request, issuer, terms)
    builder = (
        builder.add_extension(_extended_key_usage(TcgOid.PLATFORM_CERTIFICATE), critical=False)
        .add_extension(platform_name(request.platform), critical=True)
        .add_extension(_NO_AUTHORITY, critical=True)
    )
    return _finish(builder, _ek_usage(request), issuer)


def devid_certificate(
    request: DevIdRequest, issuer: Issuer, terms: Terms, tpm_serial_number: str | None = None
) -> bytes:
    """DER of an IAK's or IDevID's certificate; `tpm_serial_number` is else derived from the EK certificate.

    Raises ValueError where the EK certificate in the request is none, or names no issuer key.
    """
    if tpm_serial_number is None:
        tpm_serial_number = serial_number_of_tpm(request.attributes, request.ek_certificate)
    builder = _builder(request, issuer, terms)
    builder = builder.add_extension(hardware_module_name(tpm_serial_number), critical=False).add_extension(
        _NO_AUTHORITY, critical=True
    )
    return _finish(builder, _key_usage(digital_signature=True), issuer)


def serial_number_of_tpm(attributes: TpmAttributes, ek_certificate_der: bytes) -> str:
    """`VENDOR:KEYID:SERIAL` ("TPM 2.0 Keys for Device Identity and Attestation", 8.1; swtpm 0.11 spells it so): the
    vendor's letters, key identifier of the EK certificate's issuer and its serial number, lower-case hexadecimal.

    Raises ValueError where the certificate is none, or names no issuer key.
    """
    certificate = x509.load_der_x509_certificate(ek_certificate_der)
    try:
        found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound as error:
        raise ValueError("the EK certificate does not name its issuer's key") from error
    serial = certificate.serial_number
    serial_bytes = serial.to_bytes((serial.bit_length() + 7) // 8 or 1, "big")
    key_id = found.value.key_identifier or b""
    return f"{_vendor_letters(attributes.manufacturer)}:{key_id.hex()}:{serial_bytes.hex()}"


def root_certificate(key: SigningKey, name: str) -> x509.Certificate:
    """The self-signed certificate of a root authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _authority_builder(key.public_key(), subject, x509.BasicConstraints(ca=True, path_length=None))
    return builder.issuer_name(subject).sign(key, signature_hash(key))


def intermediate_certificate(
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, name: str, root: Issuer
) -> x509.Certificate:
    """The certificate of the authority that signs for TPMs, signed by the root."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _authority_builder(public_key, subject, x509.BasicConstraints(ca=True, path_length=0))
    builder = builder.issuer_name(root.certificate.subject).add_extension(
        _authority_key_identifier(root.certificate), critical=False
    )
    return builder.sign(root.key, signature_hash(root.key))


def subject_name(text: str, attribute: x509.ObjectIdentifier = NameOID.COMMON_NAME) -> x509.Name:
    """A name of one attribute, CN=text; an empty name for empty text."""
    text = shortened(text)
    return x509.Name([x509.NameAttribute(attribute, text)] if text else [])


def shortened(text: str) -> str:
    """What a common name has room for: of longer text the beginning and the last 37 characters."""
    return text if len(text) <= MAX_COMMON_NAME else text[: MAX_COMMON_NAME - _KEPT_TAIL] + text[-_KEPT_TAIL:]


def signature_hash(key: SigningKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None:
    """The hash that suits the key's strength; None for keys that sign without one. swtpm 0.11 chooses the same."""
    match key:
        case rsa.RSAPrivateKey():
            return hashes.SHA256() if key.key_size <= 2048 else hashes.SHA384()
        case ec.EllipticCurvePrivateKey():
            if key.key_size >= 512:
                return hashes.SHA512()
            return hashes.SHA384() if key.key_size >= 384 else hashes.SHA256()
    return None


_NO_AUTHORITY = x509.BasicConstraints(ca=False, path_length=None)


def _builder(request: EkRequest | DevIdRequest, issuer: Issuer, terms: Terms) -> x509.CertificateBuilder:
    """What all certificates of a TPM begin with."""
    subject = terms.subject
    if subject is None:
        attribute = NameOID.COMMON_NAME if isinstance(request, EkRequest) else NameOID.SERIAL_NUMBER
        subject = subject_name(request.subject, attribute)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject)
        .public_key(request.public_key)
        .serial_number(terms.serial)
        .not_valid_before(_now())
        .not_valid_after(terms.not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public_key), critical=False)
    )


def _authority_builder(
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey,
    subject: x509.Name,
    constraints: x509.BasicConstraints,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(random_serial())
        .not_valid_before(_now())
        .not_valid_after(NO_EXPIRY)
        .add_extension(constraints, critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _finish(builder: x509.CertificateBuilder, usage: x509.KeyUsage, issuer: Issuer) -> bytes:
    """Add what all certificates of a TPM end with, and sign."""
    builder = builder.add_extension(_authority_key_identifier(issuer.certificate), critical=False)
    builder = builder.add_extension(usage, critical=True)
    if issuer.certificate_url:
        access = x509.AccessDescription(
            AuthorityInformationAccessOID.CA_ISSUERS, x509.UniformResourceIdentifier(issuer.certificate_url)
        )
        builder = builder.add_extension(x509.AuthorityInformationAccess([access]), critical=False)
    certificate = builder.sign(issuer.key, signature_hash(issuer.key))
    return certificate.public_bytes(Encoding.DER)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """As the issuer's certificate says; of its public key where it says nothing."""
    try:
        found = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        key_identifier = x509.SubjectKeyIdentifier.from_public_key(issuer.public_key()).digest
    else:
        key_identifier = found.value.digest
    return x509.AuthorityKeyIdentifier(key_identifier, None, None)


def _extended_key_usage(purpose: TcgOid) -> x509.ExtendedKeyUsage:
    return x509.ExtendedKeyUsage([purpose.value])


def _ek_usage(request: EkRequest) -> x509.KeyUsage:
    decrypts = request.decryption or not request.allow_signing
    is_rsa = isinstance(request.public_key, rsa.RSAPublicKey)
    return _key_usage(
        digital_signature=request.allow_signing,
        key_encipherment=decrypts and is_rsa,
        key_agreement=decrypts and not is_rsa,
    )


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_agreement: bool = False,
    key_cert_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=key_agreement,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _vendor_letters(manufacturer: str) -> str:
    """The TCG vendor id behind `id:XXXXXXXX` as its letters; what cannot be read so is given as it is."""
    try:
        number = int(manufacturer.removeprefix("id:"), 16)
        if number == _IBM:
            return "IBM"
        letters = number.to_bytes(4, "big").rstrip(b"\0 ").decode("ascii")
    except (ValueError, OverflowError):
        return manufacturer
    return letters if letters.isprintable() and letters else manufacturer
