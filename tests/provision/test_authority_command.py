"""`crbd ca`: what it prints, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from crbd.cli.main import main
from crbd.compat.localca_signer import open_localca
from crbd.compat.setup_log import Log
from crbd.errors import AuthorityAbsentError, AuthorityError, UsageError
from crbd.provision.authority import AuthorityFiles, load_certificates, open_authority
from crbd.provision.certificates import Issuer, intermediate_certificate, root_certificate

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "ca"


def ca(directory: Path, operation: str, *arguments: str) -> int:
    return main(["ca", operation, *arguments, "--ca-dir", str(directory)])


def test_show_tells_whose_authority_it_is(directory: Path, capsys: Printed) -> None:
    chain = open_authority(AuthorityFiles.own(directory)).chain()
    assert ca(directory, "show") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{directory}: signing key issuer-key.pem"
    assert lines[1].startswith("  CN=crbd CA, issued by CN=crbd root CA, ECC secp384r1, until 9999-12-31")
    assert [line.split()[-1] for line in lines[2::2]] == [
        certificate.fingerprint(hashes.SHA256()).hex() for certificate in chain
    ]
    assert ca(directory, "show", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["root_key"] == str(directory / "root-key.pem")
    assert [certificate["subject"] for certificate in told["certificates"]] == ["CN=crbd CA", "CN=crbd root CA"]
    (directory / "root-key.pem").unlink()
    assert ca(directory, "show", "--json") == 0
    assert json.loads(capsys.readouterr().out)["root_key"] is None


@pytest.mark.parametrize("operation", ["show", "export"])
def test_looking_makes_nothing(directory: Path, operation: str, capsys: Printed) -> None:
    assert ca(directory, operation) == AuthorityAbsentError.exit_code
    assert "there is no certificate authority in" in capsys.readouterr().err
    assert not directory.exists()


@pytest.mark.parametrize(("part", "count"), [("chain", 2), ("root", 1), ("issuer", 1)])
def test_export_is_what_openssl_trusts(directory: Path, tmp_path: Path, part: str, count: int, capsys: Printed) -> None:
    chain = open_authority(AuthorityFiles.own(directory)).chain()
    assert ca(directory, "export", "--part", part) == 0
    printed = capsys.readouterr().out
    found = x509.load_pem_x509_certificates(printed.encode())
    assert found == {"chain": chain, "root": chain[1:], "issuer": chain[:1]}[part]
    assert len(found) == count
    assert ca(directory, "export", "--part", part, "--out", str(tmp_path / "out.pem")) == 0
    assert (tmp_path / "out.pem").read_text() == printed
    assert ca(directory, "export", "--out", str(tmp_path / "no" / "out")) == UsageError.exit_code


def test_export_verifies_what_was_issued(directory: Path, tmp_path: Path) -> None:
    assert ca(directory, "create") == 0
    for part in ("root", "issuer"):
        assert ca(directory, "export", "--part", part, "--out", str(tmp_path / part)) == 0
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "root"), str(tmp_path / "issuer")]
    subprocess.run(verify, check=True, capture_output=True, timeout=20)


def test_create_keeps_what_is_there(directory: Path, capsys: Printed) -> None:
    assert ca(directory, "create", "--key", "rsa3072") == 0
    key = load_certificates(directory / "issuer-cert.pem")[0].public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    before = (directory / "issuer-cert.pem").read_bytes()
    assert ca(directory, "create") == 0
    assert capsys.readouterr().out == f"{directory}: made\n{directory}: there already\n"
    assert (directory / "issuer-cert.pem").read_bytes() == before


def test_request_and_import(directory: Path, tmp_path: Path, capsys: Printed) -> None:
    assert ca(directory, "request") == 0
    csr = x509.load_pem_x509_csr(capsys.readouterr().out.encode())
    public = csr.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    key = ec.generate_private_key(ec.SECP384R1())
    root = Issuer(root_certificate(key, "the company's root"), key)
    certificate = intermediate_certificate(public, "crbd CA", root)
    (tmp_path / "issued").write_bytes(certificate.public_bytes(Encoding.PEM))
    assert ca(directory, "create") == AuthorityError.exit_code
    assert ca(directory, "import", str(tmp_path / "none")) == UsageError.exit_code
    assert ca(directory, "import", str(tmp_path / "issued")) == 0
    assert ca(directory, "export", "--part", "root") == AuthorityError.exit_code
    assert "the root's certificate is not in" in capsys.readouterr().err
    assert ca(directory, "request") == AuthorityError.exit_code


def test_swtpm_localcas_authority(tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "conf").write_text(
        "".join(f"{name} = {tmp_path}/{name}\n" for name in ("statedir", "signingkey", "issuercert"))
    )
    (tmp_path / "options").touch()
    open_localca(str(tmp_path / "conf"), str(tmp_path / "options"), Log(str(tmp_path / "log")))
    assert main(["ca", "show", "--localca-conf", str(tmp_path / "conf")]) == 0
    assert "CN=swtpm-localca, issued by CN=swtpm-localca-rootca, RSA 3072" in capsys.readouterr().out
    assert main(["ca", "export", "--localca-conf", "/no/such"]) == UsageError.exit_code
