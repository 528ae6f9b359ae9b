"""The certificates: the TCG's extensions in them, as cryptography and openssl read them, and the chain above them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from crbd.provision.certificates import (
    NO_EXPIRY,
    Issuer,
    SigningKey,
    Terms,
    devid_certificate,
    ek_certificate,
    intermediate_certificate,
    platform_certificate,
    random_serial,
    root_certificate,
    shortened,
    signature_hash,
)
from crbd.provision.extensions import TcgOid, tpm_specification
from crbd.provision.signing import (
    DevIdKind,
    DevIdRequest,
    EkRequest,
    PlatformAttributes,
    Specification,
    TpmAttributes,
)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
VENDOR = TpmAttributes("id:00001014", "swtpm", "id:20191023")
MACHINE = PlatformAttributes("Fedora", "QEMU", "2.1")
NAME = "guest:6e3c0f0e-2b0d-4b1d-9a5e-0d3c5e5d7a11"


@cache
def rsa_key() -> rsa.RSAPublicKey:
    return rsa.generate_private_key(65537, 2048).public_key()


@cache
def ecc_key() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP384R1()).public_key()


@cache
def root() -> Issuer:
    key = ec.generate_private_key(ec.SECP384R1())
    return Issuer(root_certificate(key, "root"), key)


@cache
def issuer() -> Issuer:
    key = ec.generate_private_key(ec.SECP384R1())
    return Issuer(intermediate_certificate(key.public_key(), "issuer", root()), key)


def request(key: PublicKey, *, signs: bool = False, decrypts: bool = True, name: str = NAME) -> EkRequest:
    return EkRequest(key, name, Specification(), VENDOR, MACHINE, allow_signing=signs, decryption=decrypts)


def parsed(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def usage(certificate: x509.Certificate) -> set[str]:
    found = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert found.critical
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    return {name for name in (*names, "key_cert_sign", "crl_sign") if getattr(found.value, name)}


def alternative(certificate: x509.Certificate) -> dict[str, str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert found.critical
    (name,) = found.value.get_values_for_type(x509.DirectoryName)
    assert all(len(rdn) == 1 for rdn in name.rdns)
    return {attribute.oid.dotted_string: str(attribute.value) for attribute in name}


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.mark.parametrize(
    ("key", "signs", "decrypts", "expected"),
    [
        pytest.param(rsa_key, False, True, {"key_encipherment"}, id="RSA"),
        pytest.param(ecc_key, False, True, {"key_agreement"}, id="ECC"),
        pytest.param(rsa_key, True, False, {"digital_signature"}, id="signs"),
        pytest.param(rsa_key, True, True, {"digital_signature", "key_encipherment"}, id="RSA signs and decrypts"),
        pytest.param(ecc_key, True, True, {"digital_signature", "key_agreement"}, id="ECC signs and decrypts"),
        pytest.param(rsa_key, False, False, {"key_encipherment"}, id="neither was said"),
    ],
)
def test_key_usage_follows_what_the_key_may_do(
    key: Callable[[], PublicKey], signs: bool, decrypts: bool, expected: set[str]
) -> None:
    asked = request(key(), signs=signs, decrypts=decrypts)
    assert usage(parsed(ek_certificate(asked, issuer(), Terms(1)))) == expected
    assert usage(parsed(platform_certificate(asked, issuer(), Terms(1)))) == expected


def test_an_ek_certificate_has_the_fields_of_the_profile() -> None:
    made = parsed(ek_certificate(request(rsa_key()), issuer(), Terms(77)))
    assert (made.version, made.serial_number, made.not_valid_after_utc) == (x509.Version.v3, 77, NO_EXPIRY)
    assert made.subject.rfc4514_string() == f"CN={NAME}"
    assert alternative(made) == {"2.23.133.2.1": "id:00001014", "2.23.133.2.2": "swtpm", "2.23.133.2.3": "id:20191023"}
    purposes = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert ([oid.dotted_string for oid in purposes.value], purposes.critical) == (["2.23.133.8.1"], False)
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.value.ca, constraints.critical) == (False, True)
    assert made.public_key() == rsa_key()


def test_a_platform_certificate_names_the_platform() -> None:
    made = parsed(platform_certificate(request(ecc_key()), issuer(), Terms(1)))
    assert alternative(made) == {"2.23.133.5.1.1": "Fedora", "2.23.133.5.1.4": "QEMU", "2.23.133.5.1.5": "2.1"}
    purposes = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [oid.dotted_string for oid in purposes] == ["2.23.133.8.2"]
    with pytest.raises(x509.ExtensionNotFound):
        made.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_DIRECTORY_ATTRIBUTES)


def test_the_specification_is_encoded_as_swtpm_encodes_it() -> None:
    """The bytes are those of a certificate that Debian's swtpm 0.7.1 made for a TPM of revision 164."""
    expected = bytes.fromhex("3019301706056781050210310E300C0C03322E30020100020200A4")
    assert tpm_specification(Specification("2.0", 0, 164)).value == expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.text("0123456789.é", max_size=200))
def test_the_specification_is_der_for_any_number(level: int, revision: int, family: str) -> None:
    der = tpm_specification(Specification(family, level, revision)).value
    fields = _primitives(der)
    assert fields[0] == (6, bytes.fromhex("6781050210"))
    assert fields[1:] == [
        (12, family.encode()),
        (2, level.to_bytes(level.bit_length() // 8 + 1, "big")),
        (2, revision.to_bytes(revision.bit_length() // 8 + 1, "big")),
    ]


def test_the_keys_of_both_ends_are_identified() -> None:
    made = parsed(ek_certificate(request(rsa_key()), issuer(), Terms(1)))
    above = issuer().certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert made.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == above.digest
    own = made.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert own == x509.SubjectKeyIdentifier.from_public_key(rsa_key())


def test_where_the_issuer_is_published_is_said_if_it_is_known() -> None:
    url = "http://ca.example/issuer.der"
    published = Issuer(issuer().certificate, issuer().key, url)
    made = parsed(ek_certificate(request(rsa_key()), published, Terms(1)))
    (access,) = made.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    assert access.access_location.value == url
    with pytest.raises(x509.ExtensionNotFound):
        parsed(ek_certificate(request(rsa_key()), issuer(), Terms(1))).extensions.get_extension_for_class(
            x509.AuthorityInformationAccess
        )


@pytest.mark.parametrize("make", [ek_certificate, platform_certificate])
def test_openssl_verifies_the_chain(tmp_path: Path, make: Callable[[EkRequest, Issuer, Terms], bytes]) -> None:
    made = parsed(make(request(rsa_key()), issuer(), Terms(random_serial())))
    for name, certificate in (("root", root().certificate), ("issuer", issuer().certificate), ("leaf", made)):
        (tmp_path / name).write_bytes(certificate.public_bytes(Encoding.PEM))
    trust = ("-x509_strict", "-CAfile", tmp_path / "root", "-untrusted", tmp_path / "issuer")
    assert openssl("verify", *trust, tmp_path / "leaf").endswith("OK\n")


def test_openssl_shows_the_tcg_extensions(tmp_path: Path) -> None:
    (tmp_path / "ek").write_bytes(ek_certificate(request(ecc_key()), issuer(), Terms(1)))
    text = openssl("x509", "-inform", "der", "-in", tmp_path / "ek", "-noout", "-text")
    assert "DirName:/2.23.133.2.1=id:00001014/2.23.133.2.2=swtpm/2.23.133.2.3=id:20191023" in text
    assert "2.23.133.8.1" in text
    assert "X509v3 Subject Directory Attributes" in text


def test_a_tampered_certificate_is_not_verified() -> None:
    der = bytearray(ek_certificate(request(rsa_key(), name="one machine"), issuer(), Terms(1)))
    der[der.index(b"one machine")] ^= 1
    with pytest.raises(InvalidSignature):
        parsed(bytes(der)).verify_directly_issued_by(issuer().certificate)


@pytest.mark.parametrize("kind", DevIdKind)
def test_a_device_identity_names_the_tpm_by_its_ek_certificate(kind: DevIdKind) -> None:
    ek = ek_certificate(request(rsa_key()), issuer(), Terms(0x1234))
    asked = DevIdRequest(kind, ecc_key(), "guest", Specification(), VENDOR, MACHINE, ek)
    made = parsed(devid_certificate(asked, issuer(), Terms(2)))
    assert made.subject == x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, "guest")])
    assert usage(made) == {"digital_signature"}
    (name,) = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert isinstance(name, x509.OtherName)
    assert name.type_id.dotted_string == "1.3.6.1.5.5.7.8.4"
    above = issuer().certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
    assert _primitives(name.value) == [(6, bytes.fromhex("67810501" + "02")), (4, f"IBM:{above}:1234".encode())]


def test_a_device_identity_needs_an_ek_certificate() -> None:
    asked = DevIdRequest(DevIdKind.IAK, ecc_key(), "guest", Specification(), VENDOR, MACHINE, b"none")
    with pytest.raises(ValueError, match="asn1"):
        devid_certificate(asked, issuer(), Terms(2))


@pytest.mark.parametrize("length", [1, 64, 65, 300])
def test_a_name_of_any_length_gives_a_certificate(length: int) -> None:
    name = ("x" * 300 + ":6e3c0f0e-2b0d-4b1d-9a5e-0d3c5e5d7a11")[-length:]
    made = parsed(ek_certificate(request(rsa_key(), name=name), issuer(), Terms(1)))
    (common,) = made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert common.value == shortened(name)
    assert len(common.value) == min(length, 64)
    assert str(common.value).endswith(name[-37:])


def test_no_name_is_an_empty_subject() -> None:
    assert not parsed(ek_certificate(request(rsa_key(), name=""), issuer(), Terms(1))).subject.rdns


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda: rsa.generate_private_key(65537, 2048), "sha256", id="RSA 2048"),
        pytest.param(lambda: rsa.generate_private_key(65537, 3072), "sha384", id="RSA 3072"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP256R1()), "sha256", id="P-256"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP384R1()), "sha384", id="P-384"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP521R1()), "sha512", id="P-521"),
        pytest.param(ed25519.Ed25519PrivateKey.generate, None, id="Ed25519"),
    ],
)
def test_the_hash_suits_the_signing_key(make: Callable[[], SigningKey], expected: str | None) -> None:
    key = make()
    found = signature_hash(key)
    assert (found and found.name) == expected
    authority = Issuer(root_certificate(key, "authority"), key)
    made = parsed(ek_certificate(request(rsa_key()), authority, Terms(1)))
    made.verify_directly_issued_by(authority.certificate)


def test_random_serial_numbers_are_positive_and_fit() -> None:
    drawn = {random_serial() for _ in range(1000)}
    assert len(drawn) == 1000
    assert all(1 << 158 <= serial < 1 << 159 for serial in drawn)


def test_every_object_identifier_is_the_tcgs() -> None:
    assert all(oid.value.dotted_string.startswith("2.23.133.") for oid in TcgOid)


def _primitives(der: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of every primitive element, in order; the tests' own reader of DER."""
    found: list[tuple[int, bytes]] = []
    while der:
        tag, size, start = der[0], der[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(der[2:start], "big")
            assert size >= 0x80, "a length in more bytes than it needs"
        content, der = der[start : start + size], der[start + size :]
        assert len(content) == size
        found += _primitives(content) if tag & 0x20 else [(tag, content)]
    return found
