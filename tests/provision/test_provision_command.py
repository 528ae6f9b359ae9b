"""`crbd provision` and `crbd ek show`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from crbd.errors import StateWrongKeyError, TssMissingError
from crbd.store.layout import open_state
from tests.cli.states import contents, crbd, key_file, refuse

LITTLE = ("--ek", "ecc_nist_p256")


def provision(place: Path, *arguments: str | Path) -> dict[str, Any]:
    """What `crbd provision --json` says of the TPM in `place/state`, with an authority in `place/ca`."""
    done = crbd("provision", "--state", place / "state", *LITTLE, "--ca-dir", place / "ca", "--json", *arguments)
    assert (done.status, done.err) == (0, "")
    said: dict[str, Any] = json.loads(done.out)
    return said


def show(state: Path, *arguments: str | Path) -> dict[str, Any]:
    done = crbd("ek", "show", "--json", state, *arguments)
    assert (done.status, done.err) == (0, "")
    said: dict[str, Any] = json.loads(done.out)
    return said


@pytest.mark.parametrize("layout", ["crbd", "swtpm", "linear"])
def test_what_is_made_is_what_is_shown(layout: str, tmp_path: Path) -> None:
    said = provision(tmp_path, "--layout", layout, "--iak", "ecc_nist_p384", "--subject", "machine:1", "--lock-nvram")
    assert said["outcome"] == "made"
    assert said["pcr_banks"]["active"] == ["sha256"]
    shown = show(tmp_path / "state")
    assert [(key["role"], key["handle"], key["algorithm"]) for key in shown["keys"]] == [
        ("EK", "0x8101000a", "secp256r1"),
        ("IAK", "0x81020001", "secp384r1"),
    ]
    assert [key["fingerprint"] for key in said["keys"]] == [key["fingerprint"] for key in shown["keys"]]
    assert [index["index"] for index in said["nv_indices"]] == [
        "0x01c0000a",
        "0x01c08000",
        "0x01c90100",
    ]
    assert [(found["index"], found["key"]) for found in shown["certificates"]] == [
        ("0x01c0000a", "0x8101000a"),
        ("0x01c08000", "0x8101000a"),
        ("0x01c90100", "0x81020001"),
    ]
    assert {found["subject"] for found in shown["certificates"][:2]} == {"CN=machine:1"}
    ek = x509.load_pem_x509_certificate(shown["certificates"][0]["pem"].encode())
    assert ek.public_key() == load_pem_public_key(shown["keys"][0]["pem"].encode())


def test_the_words_for_people(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = crbd("provision", "--state", state, *LITTLE, "--ca-dir", tmp_path / "ca", "--pcr-banks", "sha256,sha3-512")
    lines = done.out.splitlines()
    assert lines[:3] == [
        f"{state}: this TPM has no PCR bank sha3-512; it was left out",
        f"{state}: made",
        "  EK ecc_nist_p256 at 0x8101000a",
    ]
    assert lines[-1].startswith("  PCR banks sha256 of sha1, ")
    done = crbd("provision", "--state", state, *LITTLE, "--ca-dir", tmp_path / "ca", "--existing", "complete")
    assert "  EK ecc_nist_p256 at 0x8101000a (was there)" in done.out.splitlines()
    lines = crbd("ek", "show", state).out.splitlines()
    assert lines[0].startswith("EK 0x8101000a, secp256r1, fingerprint ")
    assert lines[1].startswith("  certificate 0x01c0000a, ")


def test_showing_changes_nothing_and_needs_no_lock(tmp_path: Path) -> None:
    provision(tmp_path)
    before = contents(tmp_path)
    store = open_state(tmp_path / "state", create=False)
    try:
        pem = crbd("ek", "show", "--pem", tmp_path / "state").out
    finally:
        store.close()
    assert len(x509.load_pem_x509_certificates(pem.encode())) == 2
    assert "PUBLIC KEY" not in pem
    assert contents(tmp_path) == before


def test_a_key_without_certificate_is_shown_as_pem(tmp_path: Path) -> None:
    provision(tmp_path, "--certificates", "none")
    assert not (tmp_path / "ca").exists()
    pem = crbd("ek", "show", "--pem", tmp_path / "state").out
    load_pem_public_key(pem.encode())


def test_nothing_to_show(tmp_path: Path) -> None:
    provision(tmp_path, "--certificates", "none", "--ek", "none")
    done = crbd("ek", "show", tmp_path / "state")
    assert (done.status, done.out) == (0, "no endorsement key is persistent, and there is no certificate\n")


def test_sealed_state(tmp_path: Path) -> None:
    key = key_file(tmp_path)
    provision(tmp_path, "--key", key)
    assert show(tmp_path / "state", "--key", key)["keys"]
    refuse(14, "encrypted", "ek", "show", tmp_path / "state")
    wrong = key_file(tmp_path, bytes(32), "wrong")
    refuse(StateWrongKeyError.exit_code, "key", "ek", "show", tmp_path / "state", "--key", wrong)


def test_state_sealed_as_swtpm_does(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret")
    key = f"pwdfile={tmp_path / 'password'},mode=aes-256-cbc"
    provision(tmp_path, "--layout", "swtpm", "--swtpm-key", key)
    assert show(tmp_path / "state", "--swtpm-key", key)["keys"]
    refuse(14, "encrypted", "ek", "show", tmp_path / "state")


def test_copies_of_the_certificates(tmp_path: Path) -> None:
    said = provision(tmp_path, "--write-ek-cert-files", tmp_path)
    assert said["files"] == [str(tmp_path / "ek-secp256r1.crt")]
    shown = show(tmp_path / "state")["certificates"][0]
    copy = x509.load_der_x509_certificate((tmp_path / "ek-secp256r1.crt").read_bytes())
    assert copy == x509.load_pem_x509_certificate(shown["pem"].encode())


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("--ek: there is no 'rsa1024'", ["--ek", "rsa1024"]),
        ("--certificates: there is no 'ak'", ["--certificates", "ek,ak"]),
        ("--decryption", ["--decryption"]),
        ("there is no PCR bank 'md5'", ["--pcr-banks", "md5", "--certificates", "none"]),
        ("--signer 'nobody'", ["--signer", "nobody"]),
        ("no endorsement key", ["--ek", "none"]),
    ],
)
def test_wrong_options(text: str, arguments: list[str], tmp_path: Path) -> None:
    refuse(2, text, "provision", "--state", tmp_path / "state", *LITTLE, *arguments, untouched=tmp_path)


def test_a_tpm_that_is_there_is_not_touched(tmp_path: Path) -> None:
    provision(tmp_path)
    wanted = ("provision", "--state", tmp_path / "state", *LITTLE, "--ca-dir", tmp_path / "ca")
    refuse(10, "there is a TPM", *wanted, untouched=tmp_path)
    refuse(11, "no TPM state", *wanted[:2], tmp_path / "other", *LITTLE, "--existing", "reconfigure")
    assert not (tmp_path / "other").exists()


def test_reconfigured(tmp_path: Path) -> None:
    before = provision(tmp_path)
    said = provision(tmp_path, "--existing", "reconfigure", "--pcr-banks", "sha1,sha384")
    assert (said["outcome"], said["keys"], said["pcr_banks"]["active"]) == ("reconfigured", [], ["sha1", "sha384"])
    assert show(tmp_path / "state")["keys"][0]["fingerprint"] == before["keys"][0]["fingerprint"]


def test_without_tpm2_pytss(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['tpm2_pytss'] = None; from crbd.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "provision", "--state", str(tmp_path / "state")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == TssMissingError.exit_code
    assert done.stderr.startswith("crbd: provisioning needs tpm2-pytss")
    assert done.stderr.endswith("pip install 'crbd[tss]'\n")
    assert done.stderr.count("\n") == 1
