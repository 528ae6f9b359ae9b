"""`swtpm_localca`: swtpm's configuration and files, shared with swtpm's own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from crbd.compat.localca import main
from crbd.compat.localca_configuration import Configuration, default_file, read_configuration
from crbd.compat.localca_signer import LocalcaSigner, authority_files, open_localca
from crbd.compat.setup_log import Log
from crbd.errors import UsageError
from crbd.provision.signers import key_parameters
from crbd.provision.signing import (
    DevIdKind,
    DevIdRequest,
    EkRequest,
    PlatformAttributes,
    Specification,
    TpmAttributes,
)

TPM = (
    *("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "164"),
    *("--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm", "--tpm-version", "id:20191023", "--tpm2"),
)
ECC = ec.generate_private_key(ec.SECP384R1()).public_key()
RSA = rsa.generate_private_key(65537, 2048).public_key()


class Setting:
    """A user's configuration directory, the authority in it, and where certificates go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        (directory / "swtpm-localca.conf").write_text(
            f"statedir = {self.state}\nsigningkey = {self.state}/signkey.pem  # here\n"
            f"issuercert = {self.state}/issuercert.pem\ncertserial = {self.state}/certserial\n"
        )
        (directory / "swtpm-localca.options").write_text(
            "--platform-manufacturer Fedora\n--platform-version 2.1\n\n--platform-model QEMU\n"
        )

    def certify(self, *arguments: str, kind: str = "ek", key: str = "") -> x509.Certificate:
        words = ["--type", kind, "--ek", key or key_parameters(ECC), "--dir", str(self.directory), *TPM, *arguments]
        assert main(words) == 0
        return x509.load_der_x509_certificate((self.directory / f"{kind}.cert").read_bytes())

    def issuer(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.state / "issuercert.pem").read_bytes())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """With an authority: RSA-3072 keys take half a second."""
    with pytest.MonkeyPatch.context() as patch:
        setting = Setting(tmp_path_factory.mktemp("localca"))
        patch.setenv("XDG_CONFIG_HOME", str(setting.directory))
        setting.certify()
    return setting


@pytest.fixture
def setting(made: Setting, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(made.directory))
    return made


def test_the_authority_is_made_where_the_configuration_says(setting: Setting) -> None:
    names = {path.name for path in setting.state.iterdir()}
    root = {"swtpm-localca-rootca-cert.pem", "swtpm-localca-rootca-privkey.pem"}
    assert names == {".lock.swtpm-localca", "certserial", "issuercert.pem", "signkey.pem", *root}
    above = x509.load_pem_x509_certificate((setting.state / "swtpm-localca-rootca-cert.pem").read_bytes())
    setting.issuer().verify_directly_issued_by(above)
    assert [name.rfc4514_string() for name in (above.subject, setting.issuer().subject)] == [
        "CN=swtpm-localca-rootca",
        "CN=swtpm-localca",
    ]
    assert {(setting.state / name).stat().st_mode & 0o777 for name in names if "key" in name} == {0o600}
    key = load_pem_private_key((setting.state / "signkey.pem").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 3072


def test_certificates_of_every_kind(setting: Setting) -> None:
    ek = setting.certify("--vmid", "vm:1", key=key_parameters(RSA))
    platform = setting.certify("--vmid", "vm:1", kind="platform")
    iak = setting.certify("--vmid", "vm:1", "--tpm-serial-num", "IBM:1:2", kind="iak")
    for certificate in (ek, platform, iak):
        certificate.verify_directly_issued_by(setting.issuer())
        assert certificate.not_valid_after_utc.year == 9999
    assert platform.serial_number == ek.serial_number + 1
    assert iak.serial_number == ek.serial_number + 2
    assert ek.subject.rfc4514_string() == "CN=vm:1"
    assert iak.subject.rfc4514_string() == "2.5.4.5=vm:1"
    (name,) = platform.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [attribute.value for attribute in name.value] == ["Fedora", "QEMU", "2.1"]


def test_key_is_another_word_for_ek_and_secp256r1_needs_no_name(setting: Setting) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = key_parameters(key).removesuffix(",id=secp256r1")
    assert main(["--type", "ek", "--key", point, "--dir", str(setting.directory), *TPM]) == 0
    certificate = x509.load_der_x509_certificate((setting.directory / "ek.cert").read_bytes())
    assert certificate.public_key() == key


def test_signing_is_for_eks(setting: Setting) -> None:
    usage = setting.certify("--allow-signing").extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_agreement) == (True, False)
    usage = setting.certify("--allow-signing", kind="platform").extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_agreement) == (False, True)


@pytest.mark.parametrize(
    ("given", "subject"),
    [("a,CN=b", "CN=a_CN=b"), ("a+b", "CN=a_b"), ("", "CN=unknown"), ("x" * 90, f"CN={'x' * 64}")],
)
def test_no_name_of_a_machine_breaks_the_subject(setting: Setting, given: str, subject: str) -> None:
    assert setting.certify("--vmid", given).subject.rfc4514_string() == subject


def test_messages_go_to_the_log_file(setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting.certify("--logfile", str(tmp_path / "log"))
    assert main(["--type", "wrong", "--logfile", str(tmp_path / "log"), *TPM]) == 1
    assert (tmp_path / "log").read_text() == (
        "Successfully created EK certificate locally.\nUnknown certificate type 'wrong'.\n"
    )
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--bogus"], "unrecognized option '--bogus'", id="unknown"),
        pytest.param(["--type", "ek"], "TPM 1.2", id="TPM 1.2"),
        pytest.param([*TPM, "--ek", "12"], "The public key is not usable", id="tiny key"),
        pytest.param([*TPM, "--ek", "?"], "odd number of hex digits", id="no key"),
        pytest.param([*TPM, "--configfile", "/no/such"], "Need read rights on config file /no/such", id="no config"),
        pytest.param([*TPM, "--optsfile", "/no/such"], "Need read rights on options file /no/such", id="no options"),
        pytest.param([*TPM, "--type", "iak"], "--tpm-serial-num must be provided", id="no serial number"),
        pytest.param([*TPM, "--logfile", "/no/such/log"], "Cannot open logfile /no/such/log", id="no log"),
    ],
)
def test_errors_end_with_status_1(
    setting: Setting, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "--ek" in arguments else ["--ek", key_parameters(ECC), *arguments]
    assert main(given) == 1
    assert message in capsys.readouterr().err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    assert capsys.readouterr().out.startswith("Usage: swtpm_localca")


def test_without_any_configuration_it_is_crbds_own_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("crbd.compat.localca_configuration.SYSTEM_DIRECTORY", tmp_path / "etc")
    monkeypatch.setattr("crbd.compat.localca_signer.default_directory", lambda: tmp_path / "ca")
    assert main(["--type", "platform", "--ek", key_parameters(ECC), "--dir", str(tmp_path), *TPM]) == 0
    issuer = x509.load_pem_x509_certificate((tmp_path / "ca" / "issuer-cert.pem").read_bytes())
    made = x509.load_der_x509_certificate((tmp_path / "platform.cert").read_bytes())
    made.verify_directly_issued_by(issuer)


class TestSigner:
    """The same in the process of swtpm_setup."""

    def test_it_issues_what_provisioning_asks_for(self, setting: Setting) -> None:
        signer = open_localca("", "", Log(str(setting.directory / "log")))
        platform = PlatformAttributes("maker", "model", "1")
        asked = EkRequest(ECC, "vm", Specification("2.0", 0, 183), TpmAttributes(), platform, allow_signing=True)
        ek = signer.ek_certificate(asked)
        usage = x509.load_der_x509_certificate(ek).extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.digital_signature, usage.key_agreement) == (True, True)
        assert bytes.fromhex("020200b7") in ek
        made = x509.load_der_x509_certificate(signer.platform_certificate(asked))
        (name,) = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [attribute.value for attribute in name.value] == ["maker", "model", "1"]
        device = DevIdRequest(DevIdKind.IDEVID, RSA, "vm", Specification(), TpmAttributes(), platform, ek)
        assert x509.load_der_x509_certificate(signer.devid_certificate(device)).public_key() == RSA

    def test_the_options_file_names_the_platform_where_the_request_does_not(self, setting: Setting) -> None:
        signer: LocalcaSigner = open_localca("", "", Log(str(setting.directory / "log")))
        asked = EkRequest(ECC, "vm", Specification(), TpmAttributes())
        made = x509.load_der_x509_certificate(signer.platform_certificate(asked))
        (name,) = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [attribute.value for attribute in name.value] == ["Fedora", "QEMU", "2.1"]


class TestConfiguration:
    """`NAME = VALUE` lines."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("name = value", "value"),
            ("name=value", "value"),
            ("name =  a b  # comment", "a b"),
            ("name = first\nname = second", "first"),
            (" name = indented\nname = value", "value"),
            ("named = other\nname = value", "value"),
            ("# name = no\n", ""),
            ("name =", ""),
            ("name = ${HOME}/x/${NOT_SET}y${HOME}", "/home/me/x/y/home/me"),
            ("name = ${HOME", "${HOME"),
        ],
    )
    def test_values(self, text: str, expected: str) -> None:
        assert Configuration(text, {"HOME": "/home/me"})["name"] == expected

    def test_environment_of_pkcs11_modules(self) -> None:
        found = Configuration("env:MODULE_CONF = /a # b\nenv:1 = x\n", {})
        assert found.environment == {"MODULE_CONF": "/a # b"}

    def test_the_users_file_goes_before_the_systems(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert default_file("some.conf") == Path("/etc/some.conf")
        (tmp_path / "some.conf").touch()
        assert default_file("some.conf") == tmp_path / "some.conf"
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".config").mkdir()
        (tmp_path / ".config" / "some.conf").touch()
        assert default_file("some.conf") == tmp_path / ".config" / "some.conf"

    @pytest.mark.parametrize("missing", ["statedir", "signingkey", "issuercert"])
    def test_the_authoritys_files_must_be_named(self, missing: str) -> None:
        names = {"statedir", "signingkey", "issuercert"} - {missing}
        with pytest.raises(UsageError, match=f"Missing '{missing}' config value in config file /conf"):
            authority_files(Configuration("".join(f"{name} = /x\n" for name in names), {}), Path("/conf"))

    def test_passwords_of_both_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SWTPM_ROOTCA_PASSWORD", "root")
        text = "statedir = /d\nsigningkey = /k/key\nissuercert = /c\nsigningkey_password = sign\n"
        found = authority_files(Configuration(text, {}), Path("/conf"))
        assert (found.signing_password, found.root_password) == (b"sign", b"root")
        assert found.serial == Path("/d/certserial")
        assert found.root_key == Path("/k/swtpm-localca-rootca-privkey.pem")


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("swtpm_localca", path="/usr/bin") is None, reason="needs Debian's swtpm-tools")
def test_it_shares_an_authority_with_swtpms_own(setting: Setting) -> None:
    """Each makes an authority that the other goes on with, and counts on from its serial number."""
    words = ["--type", "ek", "--ek", key_parameters(ECC), "--dir", str(setting.directory), *TPM]
    ours = setting.certify()
    subprocess.run(["/usr/bin/swtpm_localca", *words], check=True, capture_output=True, timeout=30)
    theirs = x509.load_der_x509_certificate((setting.directory / "ek.cert").read_bytes())
    theirs.verify_directly_issued_by(setting.issuer())
    assert theirs.serial_number == ours.serial_number + 1
    assert setting.certify().serial_number == ours.serial_number + 2


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("swtpm_localca", path="/usr/bin") is None, reason="needs Debian's swtpm-tools")
def test_it_goes_on_with_an_authority_that_swtpm_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Setting(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    words = ["--type", "ek", "--ek", key_parameters(ECC), "--dir", str(tmp_path), *TPM]
    subprocess.run(["/usr/bin/swtpm_localca", *words], check=True, capture_output=True, timeout=60)
    theirs = x509.load_der_x509_certificate((tmp_path / "ek.cert").read_bytes())
    issuer = fresh.issuer()
    ours = fresh.certify()
    ours.verify_directly_issued_by(issuer)
    assert fresh.issuer() == issuer
    assert ours.serial_number == theirs.serial_number + 1
    assert read_configuration(tmp_path / "swtpm-localca.conf", "config file")["statedir"] == str(fresh.state)
