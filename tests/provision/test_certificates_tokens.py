"""Signing keys in a PKCS#11 token: SoftHSM, through python-pkcs11."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from crbd.compat.cert import main as swtpm_cert
from crbd.compat.localca import main as swtpm_localca
from crbd.errors import AuthorityError, UsageError
from crbd.provision import tokens
from crbd.provision.certificates import root_certificate
from crbd.provision.signers import key_parameters, open_signer
from crbd.provision.signing import EkRequest, Specification, TpmAttributes
from crbd.provision.tokens import TokenUri, open_token_key

MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
PIN = "1234"
TPM = (
    *("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "164"),
    *("--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm", "--tpm-version", "id:20191023", "--tpm2"),
)
EK = ec.generate_private_key(ec.SECP384R1()).public_key()


def module() -> str:
    found = next((path for path in MODULES if Path(path).exists()), "")
    if not found or shutil.which("softhsm2-util") is None:
        pytest.skip("needs softhsm2")
    try:
        import_module("pkcs11")
    except ImportError:
        pytest.skip("needs python-pkcs11")
    return found


@dataclass(frozen=True)
class Token:
    """A token with an RSA and an ECC key, and the certificates of both."""

    directory: Path
    module: str
    certificates: dict[str, x509.Certificate]

    def uri(self, label: str, more: str = "") -> str:
        return f"pkcs11:token=crbd;object={label}?module-path={self.module}{more}"


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Token]:
    library = module()
    directory = tmp_path_factory.mktemp("token")
    (directory / "tokens").mkdir()
    (directory / "conf").write_text(f"directories.tokendir = {directory}/tokens\nobjectstore.backend = file\n")
    certificates = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(directory / "conf"))
        patch.setenv("SWTPM_PKCS11_PIN", PIN)
        run("--init-token", "--free", "--label", "crbd", "--so-pin", PIN, "--pin", PIN)
        keys: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey]
        keys = {"rsa": rsa.generate_private_key(65537, 2048), "ecc": ec.generate_private_key(ec.SECP384R1())}
        for number, (label, key) in enumerate(keys.items(), 1):
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            (directory / "key").write_bytes(pem)
            run(
                "--import",
                str(directory / "key"),
                "--token",
                "crbd",
                "--label",
                label,
                "--id",
                f"0{number}",
                "--pin",
                PIN,
            )
            certificates[label] = root_certificate(key, f"issuer {label}")
            (directory / label).mkdir()
            certificate = certificates[label].public_bytes(Encoding.PEM)
            (directory / label / "issuer-cert.pem").write_bytes(certificate)
        (directory / "key").unlink()
        yield Token(directory, library, certificates)


def run(*arguments: str) -> None:
    subprocess.run(["softhsm2-util", *arguments], check=True, capture_output=True, timeout=20)


@pytest.mark.e2e
@pytest.mark.parametrize("label", ["rsa", "ecc"])
class TestSigning:
    """The key never leaves the token."""

    def test_a_signer(self, token: Token, label: str) -> None:
        signer = open_signer(token.uri(label), token.directory / label)
        made = signer.ek_certificate(EkRequest(EK, "vm", Specification(), TpmAttributes()))
        x509.load_der_x509_certificate(made).verify_directly_issued_by(token.certificates[label])

    def test_swtpm_cert(self, token: Token, label: str, tmp_path: Path) -> None:
        numbers = EK.public_numbers()
        key = ("--ecc-x", f"{numbers.x:096x}", "--ecc-y", f"{numbers.y:096x}", "--ecc-curveid", "secp384r1")
        issuer = ("--signkey", token.uri(label), "--issuercert", str(token.directory / label / "issuer-cert.pem"))
        assert swtpm_cert([*key, *issuer, *TPM, "--out-cert", str(tmp_path / "out")]) == 0
        made = x509.load_der_x509_certificate((tmp_path / "out").read_bytes())
        made.verify_directly_issued_by(token.certificates[label])

    def test_swtpm_localca(self, token: Token, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SWTPM_PKCS11_PIN")
        (tmp_path / "options").touch()
        (tmp_path / "conf").write_text(
            f"statedir = {tmp_path}/state\nsigningkey = {token.uri(label).replace(';', chr(92) + ';')}\n"
            f"issuercert = {token.directory}/{label}/issuer-cert.pem\nSWTPM_PKCS11_PIN = {PIN}\n"
            f"env:SOFTHSM2_CONF = {token.directory}/conf\n"
        )
        (tmp_path / "state").mkdir()
        words = ["--type", "ek", "--ek", key_parameters(EK), "--dir", str(tmp_path), *TPM]
        assert swtpm_localca([*words, "--configfile", f"{tmp_path}/conf", "--optsfile", f"{tmp_path}/options"]) == 0
        made = x509.load_der_x509_certificate((tmp_path / "ek.cert").read_bytes())
        made.verify_directly_issued_by(token.certificates[label])
        assert int((tmp_path / "state" / "certserial").read_text()) == made.serial_number

    def test_a_certificate_of_another_key(self, token: Token, label: str) -> None:
        key = rsa.generate_private_key(65537, 2048) if label == "rsa" else ec.generate_private_key(ec.SECP384R1())
        with pytest.raises(AuthorityError, match="do not belong together"):
            open_token_key(TokenUri.parse(token.uri(label)), root_certificate(key, "another"))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("pkcs11:token=none;object=x", "NoSuchToken"),
            ("pkcs11:token=crbd;object=none", "NoSuchKey"),
            ("pkcs11:token=crbd;id=%99", "NoSuchKey"),
        ],
    )
    def test_what_is_not_there(self, token: Token, label: str, text: str, message: str) -> None:
        with pytest.raises(AuthorityError, match=message):
            open_token_key(TokenUri.parse(f"{text}?module-path={token.module}"), token.certificates[label])

    def test_the_pin(self, token: Token, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SWTPM_PKCS11_PIN")
        (tmp_path / "pin").write_text(f"{PIN}\n")
        for more in (f"&pin-value={PIN}", f"&pin-source=file:{tmp_path}/pin"):
            open_token_key(TokenUri.parse(token.uri(label, more)), token.certificates[label])


def test_a_uri_in_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWTPM_PKCS11_PIN", "from outside")
    text = (
        "pkcs11:model=SoftHSM%20v2;token=my%20token;serial=891b;id=%00%01;object=a%3Bb;type=private?module-path=/m.so"
    )
    assert TokenUri.parse(text) == TokenUri("my token", "891b", "a;b", b"\0\1", "/m.so", "from outside")
    assert TokenUri.parse(f"{text}&pin-value=a%20b").pin == "a b"
    monkeypatch.delenv("SWTPM_PKCS11_PIN")
    assert TokenUri.parse("pkcs11:object=x") == TokenUri(object_label="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:/key", "is no PKCS#11 URI"),
        ("pkcs11:token=x", "names no key"),
        ("pkcs11:object=x?pin-source=/no/such", "pin-source /no/such cannot be read"),
    ],
)
def test_a_uri_that_is_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenUri.parse(text)


def test_without_python_pkcs11_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokens.__dict__, "import_module", lambda _: import_module("no_such_module"))
    certificate = root_certificate(ec.generate_private_key(ec.SECP256R1()), "issuer")
    with pytest.raises(AuthorityError, match=r"pip install 'crbd\[pkcs11\]'"):
        open_token_key(TokenUri.parse("pkcs11:object=x"), certificate)


def test_a_module_that_is_not_there() -> None:
    pytest.importorskip("pkcs11")
    certificate = root_certificate(ec.generate_private_key(ec.SECP256R1()), "issuer")
    with pytest.raises(AuthorityError, match=r"module /no/such\.so cannot be loaded"):
        open_token_key(TokenUri.parse("pkcs11:object=x?module-path=/no/such.so"), certificate)
