"""`swtpm_cert`: its options, its certificates beside those of swtpm's own, its exit status."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtensionOID

from crbd.compat.cert import main
from crbd.provision.certificates import root_certificate

TPM = ("--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm", "--tpm-version", "id:20191023")
SPECIFICATION = ("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "164")
PLATFORM = ("--platform-manufacturer", "Fedora", "--platform-version", "2.1", "--platform-model", "QEMU")
EK = (*TPM, *SPECIFICATION, "--tpm2")


class Issuer:
    """An authority's files, and keys to certify."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        key = rsa.generate_private_key(65537, 2048)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / "key").write_bytes(pem)
        locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
        (directory / "locked").write_bytes(locked)
        self.certificate = root_certificate(key, "issuer")
        (directory / "cert").write_bytes(self.certificate.public_bytes(Encoding.PEM))
        self.rsa = rsa.generate_private_key(65537, 2048).public_key()
        self.ecc = ec.generate_private_key(ec.SECP384R1()).public_key()
        spki = self.ecc.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (directory / "pub").write_bytes(spki)

    @property
    def out(self) -> Path:
        return self.directory / "out"

    @property
    def modulus(self) -> tuple[str, str]:
        return ("--modulus", f"{self.rsa.public_numbers().n:0512x}")

    @property
    def point(self) -> tuple[str, ...]:
        numbers = self.ecc.public_numbers()
        return ("--ecc-x", f"{numbers.x:096x}", "--ecc-y", f"{numbers.y:096x}", "--ecc-curveid", "secp384r1")

    def signs(self, key: str = "key") -> tuple[str, ...]:
        return ("--signkey", str(self.directory / key), "--issuercert", str(self.directory / "cert"))

    def arguments(self, *more: str) -> list[str]:
        return [*self.signs(), "--out-cert", str(self.out), *more]

    def issue(self, *more: str) -> x509.Certificate:
        assert main(self.arguments(*more)) == 0
        made = x509.load_der_x509_certificate(self.out.read_bytes())
        made.verify_directly_issued_by(self.certificate)
        return made


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Issuer:
    return Issuer(tmp_path_factory.mktemp("issuer"))


def test_an_ek_certificate_of_an_rsa_key(issuer: Issuer) -> None:
    made = issuer.issue(*issuer.modulus, *EK, "--subject", "C=US,ST=NY, L=Albany ,CN=vm", "--serial", "77")
    assert made.public_key() == issuer.rsa
    assert made.serial_number == 77
    assert made.subject.rfc4514_string() == "CN=vm,L=Albany,ST=NY,C=US"
    assert dt.timedelta(days=364) < made.not_valid_after_utc - dt.datetime.now(dt.UTC) < dt.timedelta(days=366)


@pytest.mark.parametrize("form", ["point", "file"])
def test_an_ecc_key_comes_as_a_point_or_in_a_file(issuer: Issuer, form: str) -> None:
    key = issuer.point if form == "point" else ("--pubkey", str(issuer.directory / "pub"))
    made = issuer.issue(*key, *EK, "--days", "-1")
    assert made.public_key() == issuer.ecc
    assert made.not_valid_after_utc.year == 9999
    assert made.extensions.get_extension_for_class(x509.KeyUsage).value.key_agreement


def test_options_can_be_cut_short_and_have_one_dash(issuer: Issuer) -> None:
    made = issuer.issue(*issuer.modulus, *EK, "-subj", "CN=vm", "--ser=9")
    assert made.serial_number == 9


def test_signing_and_decryption(issuer: Issuer) -> None:
    usage = issuer.issue(*issuer.modulus, *EK, "--allow-signing").extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.value.digital_signature, usage.value.key_encipherment) == (True, False)
    both = issuer.issue(*issuer.modulus, *EK, "--allow-signing", "--decryption")
    usage = both.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.value.digital_signature, usage.value.key_encipherment) == (True, True)


@pytest.mark.parametrize("kind", ["iak", "idevid"])
def test_device_identities(issuer: Issuer, kind: str) -> None:
    made = issuer.issue(*issuer.point, "--type", kind, "--tpm-serial-num", "IBM:aa:01", *TPM, "--tpm2")
    (name,) = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert isinstance(name, x509.OtherName)
    assert name.value.endswith(b"IBM:aa:01")


def test_a_certificate_file_is_private_and_no_link_is_followed(issuer: Issuer, tmp_path: Path) -> None:
    issuer.out.unlink(missing_ok=True)
    issuer.issue(*issuer.modulus, *EK)
    assert issuer.out.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    arguments = [*issuer.signs(), *issuer.modulus, *EK, "--out-cert", str(tmp_path / "link")]
    assert main(arguments) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_pem_to_a_file_or_to_standard_output(issuer: Issuer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*issuer.signs(), *issuer.modulus, *EK, "--pem"]) == 0
    printed = x509.load_pem_x509_certificate(capsys.readouterr().out.encode())
    assert main(issuer.arguments(*issuer.modulus, *EK, "--pem")) == 0
    assert x509.load_pem_x509_certificate(issuer.out.read_bytes()).public_key() == printed.public_key()


@pytest.mark.parametrize("form", ["--signkey-password=secret", "secret", "pass:secret", "env:PASSWORD", "file:", "fd:"])
def test_the_signing_keys_password(issuer: Issuer, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "secret")
    (tmp_path / "password").write_text("secret")
    if form == "file:":
        form += str(tmp_path / "password")
    elif form == "fd:":
        form += str(os.open(tmp_path / "password", os.O_RDONLY))
    password = (form,) if form.startswith("--") else ("--signkey-pwd", form)
    arguments = [*issuer.signs("locked"), *issuer.modulus, *EK, "--out-cert", str(tmp_path / "out"), *password]
    assert main(arguments) == 0
    assert (tmp_path / "out").exists()


def test_capabilities_are_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-capabilities"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["type"] == "swtpm_cert"
    assert told["features"] == ["cmdarg-signkey-pwd", "cmdarg-tpm-serial-num", "supports-iak-idevid"]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_only_tells(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert capsys.readouterr().out.startswith("TPM certificate tool version ")


MODULUS = ("--modulus", "c0ffee01")
POINT = ("--ecc-x", "01", "--ecc-y", "02")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--bogus"], "swtpm_cert: unrecognized option '--bogus'", id="unknown"),
        pytest.param(["--tpm"], "option '--tpm' is ambiguous", id="ambiguous"),
        pytest.param(["--serial"], "option '--serial' requires an argument", id="no value"),
        pytest.param(["--type", "aik"], "Unknown certificate type 'aik'", id="type"),
        pytest.param([*EK], "No parameters for a public key were given", id="no key"),
        pytest.param([*EK, "--ecc-x", "00"], "ECC x and y parameters must both be given", id="half a point"),
        pytest.param([*EK, *POINT], "The public key is not usable", id="off the curve"),
        pytest.param([*EK, "--modulus", "123"], "odd number of hex digits", id="odd"),
        pytest.param([*EK, "--modulus", "12zz"], "Illegal hex digits", id="no hex"),
        pytest.param([*EK, "--modulus", "ab" * 6000], "Unreasonably long hex string", id="long hex"),
        pytest.param([*EK, *MODULUS, *POINT], "Only one public key", id="two keys"),
        pytest.param([*EK, *MODULUS, "--exponent", "0x"], "Could not parse --exponent", id="exponent"),
        pytest.param([*EK, *MODULUS, "--serial", "x"], "Serial number is invalid", id="serial"),
        pytest.param([*EK, *MODULUS, "--serial", str(2**160)], "Serial number is too large", id="large serial"),
        pytest.param([*EK, *MODULUS, "--days", "-2"], "Days value of '-2' is outside", id="days"),
        pytest.param([*EK, *MODULUS, "--days", "9999999"], "may be too far in the future", id="far days"),
        pytest.param([*EK, *MODULUS, "--subject", "XX=1"], "unknown attribute 'XX'", id="attribute"),
        pytest.param([*EK, *MODULUS, "--subject", "C=USA"], "The subject's C is not usable", id="country"),
        pytest.param(
            [*EK, "--ecc-curveid", "p1", "--ecc-x", "01", "--ecc-y", "02"], "Unsupported ECC curve", id="curve"
        ),
        pytest.param([*TPM, "--tpm2", *MODULUS], "--tpm-spec-family and", id="no specification"),
        pytest.param([*SPECIFICATION, "--tpm2", *MODULUS], "--tpm-manufacturer and", id="no manufacturer"),
        pytest.param([*TPM, "--tpm2", "--type", "platform", *MODULUS], "--platform-manufacturer and", id="no platform"),
        pytest.param([*TPM, "--tpm2", "--type", "iak", *MODULUS], "--tpm-serial-num must be provided", id="no number"),
        pytest.param([*TPM, *SPECIFICATION, *MODULUS], "TPM 1.2", id="TPM 1.2"),
        pytest.param(
            [*EK, "--public", "00", "--keyalgo", "ml-kem-512"], "Unsupported key type 'ml-kem-512'", id="ML-KEM"
        ),
        pytest.param([*EK, *MODULUS, "--signkey-pwd", "env:NO_SUCH"], "password from environment", id="no password"),
        pytest.param([*EK, *MODULUS, "--signkey-pwd", "file:/no/such"], "password from file:/no/such", id="no file"),
        pytest.param([*EK, *MODULUS, "--signkey", "/no/such"], "/no/such does not exist", id="no signing key"),
        pytest.param([*EK, *MODULUS, "--issuercert", "/no/such"], "/no/such does not exist", id="no issuer"),
        pytest.param([*EK, "--pubkey", "/no/such"], "Could not open public key file /no/such", id="no public key"),
    ],
)
def test_wrong_options_end_with_one_line_and_status_1(
    issuer: Issuer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    issuer.out.unlink(missing_ok=True)
    assert main(issuer.arguments(*arguments)) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not issuer.out.exists()


@pytest.mark.parametrize("missing", ["--signkey", "--issuercert"])
def test_somebody_must_sign(issuer: Issuer, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = list(issuer.signs())
    del arguments[arguments.index(missing) : arguments.index(missing) + 2]
    assert main([*arguments, *issuer.modulus, *EK]) == 1
    assert "Missing signature key" in (told := capsys.readouterr().err) or "issuer certificate name" in told


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("swtpm_cert", path="/usr/bin") is None, reason="needs Debian's swtpm-tools")
@pytest.mark.parametrize("kind", ["ek", "platform"])
@pytest.mark.parametrize("key", ["modulus", "point"])
@pytest.mark.parametrize("flags", [(), ("--allow-signing",), ("--allow-signing", "--decryption")], ids=" ".join)
def test_certificates_agree_with_swtpms_field_by_field(
    issuer: Issuer, kind: str, key: str, flags: tuple[str, ...]
) -> None:
    """All but the signature's hash, the order of extensions and the subject key identifier, which swtpm has not."""
    arguments = issuer.arguments(
        *getattr(issuer, key),
        *EK,
        *PLATFORM,
        "--type",
        kind,
        "--subject",
        "CN=vm",
        "--days",
        "-1",
        "--serial",
        "5",
        *flags,
    )
    assert main(arguments) == 0
    ours = x509.load_der_x509_certificate(issuer.out.read_bytes())
    subprocess.run(["/usr/bin/swtpm_cert", *arguments], check=True, capture_output=True, timeout=20)
    theirs = x509.load_der_x509_certificate(issuer.out.read_bytes())
    assert fields(ours) == fields(theirs)
    assert extensions(ours).keys() - extensions(theirs).keys() == {ExtensionOID.SUBJECT_KEY_IDENTIFIER.dotted_string}
    assert {oid: found for oid, found in extensions(ours).items() if oid in extensions(theirs)} == extensions(theirs)


def fields(certificate: x509.Certificate) -> dict[str, object]:
    return {
        "version": certificate.version,
        "serial": certificate.serial_number,
        "issuer": certificate.issuer,
        "subject": certificate.subject.rfc4514_string(),
        "until": certificate.not_valid_after_utc,
        "key": certificate.public_key(),
    }


def extensions(certificate: x509.Certificate) -> dict[str, tuple[bool, bytes]]:
    return {found.oid.dotted_string: (found.critical, found.value.public_bytes()) for found in certificate.extensions}
