"""Signers that are other programs: what they are given, and what they may not get away with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key

from crbd.errors import AuthorityError, UsageError
from crbd.provision import signers
from crbd.provision.authority import AuthorityFiles, LocalAuthority, open_authority
from crbd.provision.signers import CertsTool, ProgramSigner, ToolSigner, key_parameters, open_signer
from crbd.provision.signing import (
    DevIdKind,
    DevIdRequest,
    DevIdSigner,
    EkRequest,
    PlatformAttributes,
    Specification,
    TpmAttributes,
)

ECC = ec.generate_private_key(ec.SECP384R1()).public_key()
RSA = rsa.generate_private_key(65537, 2048).public_key()


def request(
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey = ECC, *, signs: bool = False, decrypts: bool = True
) -> EkRequest:
    platform = PlatformAttributes("maker", "model", "1.0")
    return EkRequest(
        key, "machine", Specification(), TpmAttributes(), platform, allow_signing=signs, decryption=decrypts
    )


def device_request(ek_certificate: bytes) -> DevIdRequest:
    return DevIdRequest(
        DevIdKind.IAK, ECC, "machine", Specification(), TpmAttributes(), PlatformAttributes(), ek_certificate
    )


def program(tmp_path: Path, text: str) -> str:
    """An executable Python program."""
    path = tmp_path / "program"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return str(path)


def authority(tmp_path: Path) -> LocalAuthority:
    return open_authority(AuthorityFiles.own(tmp_path / "ca"))


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_a_program_is_given_the_request_and_prints_the_certificate(tmp_path: Path, encoding: Encoding) -> None:
    wanted = authority(tmp_path).ek_certificate(request())
    (tmp_path / "answer").write_bytes(x509.load_der_x509_certificate(wanted).public_bytes(encoding))
    hook = program(
        tmp_path,
        f"""import shutil, sys
open({str(tmp_path / "asked")!r}, "wb").write(sys.stdin.buffer.read())
shutil.copyfileobj(open({str(tmp_path / "answer")!r}, "rb"), sys.stdout.buffer)
""",
    )
    signer = open_signer(f"exec:{hook}")
    assert isinstance(signer, DevIdSigner)
    assert signer.ek_certificate(request(signs=True)) == wanted
    asked = json.loads((tmp_path / "asked").read_bytes())
    assert load_pem_public_key(asked.pop("public_key").encode()) == ECC
    assert asked == {
        "type": "ek",
        "subject": "machine",
        "tpm_specification": {"family": "2.0", "level": 0, "revision": 164},
        "tpm": {"manufacturer": "id:00001014", "model": "swtpm", "version": "id:20191023"},
        "platform": {"manufacturer": "maker", "model": "model", "version": "1.0"},
        "allow_signing": True,
        "decryption": True,
    }
    signer.platform_certificate(request())
    assert json.loads((tmp_path / "asked").read_bytes())["type"] == "platform"
    signer.devid_certificate(device_request(wanted))
    asked = json.loads((tmp_path / "asked").read_bytes())
    assert asked["type"] == "iak"
    assert x509.load_pem_x509_certificate(asked["ek_certificate"].encode()).public_bytes(Encoding.DER) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("print('hello')", "gave something that is no certificate", id="nonsense"),
        pytest.param("", "gave something that is no certificate", id="nothing"),
        pytest.param("print('x' * 70000)", "gave something that is no certificate", id="too much"),
        pytest.param("raise SystemExit('no, thanks')", "ended with status 1: no, thanks", id="failure"),
        pytest.param("import time; time.sleep(60)", r"no certificate within \d+ s", id="silence"),
    ],
)
def test_a_program_without_an_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr(signers, "PROGRAM_TIMEOUT", 0.5)
    with pytest.raises(AuthorityError, match=message):
        ProgramSigner(program(tmp_path, text)).ek_certificate(request())


def test_a_certificate_for_another_key_is_refused(tmp_path: Path) -> None:
    other = authority(tmp_path).ek_certificate(request(RSA))
    (tmp_path / "answer").write_bytes(other)
    with pytest.raises(AuthorityError, match="for another key"):
        ProgramSigner(
            program(tmp_path, f"import sys; sys.stdout.buffer.write(open({str(tmp_path / 'answer')!r}, 'rb').read())")
        ).ek_certificate(request())


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(AuthorityError, match="/no/such cannot be run: No such file"):
        ProgramSigner("/no/such").ek_certificate(request())


TOOL = """
import json, os, shutil, sys
words = sys.argv[1:]
json.dump(words, open({asked!r}, "w"))
print("made it")
shutil.copy({answer!r}, os.path.join(words[words.index("--dir") + 1], words[words.index("--type") + 1] + ".cert"))
"""


def tool(tmp_path: Path, answer: bytes) -> str:
    (tmp_path / "answer").write_bytes(answer)
    return program(tmp_path, TOOL.format(asked=str(tmp_path / "asked"), answer=str(tmp_path / "answer")))


def test_a_tool_is_called_as_swtpm_setup_calls_it(tmp_path: Path) -> None:
    wanted = authority(tmp_path).ek_certificate(request())
    told: list[str] = []
    called = CertsTool(tool(tmp_path, wanted), "/conf", "/options", "/log")
    signer = ToolSigner(called, told.append)
    assert signer.ek_certificate(request(signs=True, decrypts=True)) == wanted
    words = json.loads((tmp_path / "asked").read_text())
    directory = words[words.index("--dir") + 1]
    assert words == [
        *("--type", "ek", "--ek", key_parameters(ECC), "--allow-signing", "--decryption", "--dir", directory),
        *("--logfile", "/log", "--vmid", "machine", "--tpm-spec-family", "2.0", "--tpm-spec-level", "0"),
        *("--tpm-spec-revision", "164", "--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm"),
        *("--tpm-version", "id:20191023", "--tpm2", "--configfile", "/conf", "--optsfile", "/options"),
    ]
    assert not os.path.exists(directory)
    assert told[0].startswith("  Invoking ")
    assert told[1:] == ["program: made it"]
    signer.platform_certificate(request())
    assert json.loads((tmp_path / "asked").read_text())[1] == "platform"


def test_a_tool_is_told_the_tpms_serial_number_for_device_identities(tmp_path: Path) -> None:
    wanted = authority(tmp_path).ek_certificate(request())
    ToolSigner(CertsTool(tool(tmp_path, wanted))).devid_certificate(device_request(wanted))
    words = json.loads((tmp_path / "asked").read_text())
    assert words[:4] == ["--type", "iak", "--key", key_parameters(ECC)]
    assert words[words.index("--tpm-serial-num") + 1].startswith("IBM:")


def test_a_tool_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match=r"left no ek\.cert"):
        ToolSigner(CertsTool(program(tmp_path, ""))).ek_certificate(request())


def test_keys_are_spelt_with_all_their_digits() -> None:
    assert len(key_parameters(RSA)) == 512
    small = ec.derive_private_key(0x9D, ec.SECP521R1()).public_key()
    x, y, curve = key_parameters(small).split(",")
    assert (len(x), len(y), curve) == (2 + 132, 2 + 132, "id=secp521r1")


@pytest.mark.parametrize("spec", ["", "remote", "exec:", "tool", "local:"])
def test_a_signer_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="names no signer"):
        open_signer(spec)


def test_options_of_the_local_authority_go_with_it_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no use for --ca-dir"):
        open_signer("exec:program", tmp_path)
    signer = open_signer("local", tmp_path / "ca", "http://ca.example/")
    made = x509.load_der_x509_certificate(signer.ek_certificate(request()))
    assert made.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
