"""`swtpm_setup`: what libvirt and people ask of it, and what it leaves."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

import crbd
from crbd.compat.localca_signer import open_localca
from crbd.compat.setup import main
from crbd.compat.setup_log import Log
from crbd.compat.setup_tpm import TpmProgram, chosen_program
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import StateWrongKeyError
from crbd.provision.endorsement import Identities, read_identities
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.layout import open_backend

QUICK = ("--ek1keyalgo", "secp256r1", "--ek2keyalgo", "secp256r1")
"""One EK, made in milliseconds."""
LOCALCA = """statedir = {ca}
signingkey = {ca}/signkey.pem
issuercert = {ca}/issuercert.pem
certserial = {ca}/certserial
"""
HEX_KEY = "00112233445566778899aabbccddeeff"


def engine(port: StatePort) -> Engine:
    return LibtpmsEngine(port)


class Host:
    """A user's configuration and a place for a TPM."""

    def __init__(self, directory: Path, authority: Path) -> None:
        self.directory = directory
        self.config = directory / "config"
        self.state = directory / "state"
        self.state.mkdir()
        self.config.mkdir()
        (self.config / "swtpm-localca.conf").write_text(LOCALCA.format(ca=authority))
        (self.config / "swtpm-localca.options").write_text("--platform-manufacturer Fedora\n")
        self.configure("create_certs_tool = /usr/bin/swtpm_localca")

    def configure(self, *lines: str) -> None:
        (self.config / "swtpm_setup.conf").write_text("\n".join(lines) + "\n")

    def setup(self, *arguments: str) -> int:
        return main(["--tpm2", "--tpmstate", str(self.state), *arguments])

    def identities(self, key: SwtpmKey | None = None, uri: str = "") -> Identities:
        store = open_backend(uri or f"dir://{self.state}", create=False, swtpm_key=key, lock=False)
        try:
            return read_identities(store, engine)
        finally:
            store.close()

    def permanent(self) -> bytes:
        return (self.state / "tpm2-00.permall").read_bytes()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority that is there: its RSA-3072 keys take half a second."""
    directory = tmp_path_factory.mktemp("authority")
    (directory / "conf").write_text(LOCALCA.format(ca=directory))
    (directory / "options").touch()
    open_localca(str(directory / "conf"), str(directory / "options"), Log(str(directory / "log")))
    return directory


@pytest.fixture
def host(tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    umask = os.umask(0o022)
    yield Host(tmp_path, authority)
    os.umask(umask)


class TestMaking:
    """A TPM that was not there."""

    def test_keys_certificates_and_files(self, host: Host, authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", "vm:1")
        assert host.setup(*QUICK, *arguments) == 0
        found = host.identities()
        assert [key.role for key in found.keys] == ["EK"]
        issuer = x509.load_pem_x509_certificate((authority / "issuercert.pem").read_bytes())
        by_index = {certificate.index: certificate.parsed for certificate in found.certificates}
        assert set(by_index) == {0x01C0000A, 0x01C08000}
        for certificate in by_index.values():
            certificate.verify_directly_issued_by(issuer)
            assert certificate.public_key() == found.keys[0].public.key
            assert certificate.subject.rfc4514_string() == "CN=vm:1"
        (name,) = by_index[0x01C08000].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert next(iter(name.value)).value == "Fedora"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in host.state.iterdir()}
        assert modes == {".lock": 0o640, "tpm2-00.permall": 0o640}
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith("Starting vTPM manufacturing as ")
        assert "Successfully created NVRAM area 0x1c08000 for platform certificate." in told
        assert told[-3] == "Successfully activated PCR banks sha256 among sha1,sha256,sha384,sha512."
        assert told[-2] == "Successfully authored TPM state."

    def test_the_defaults_are_swtpms(self, host: Host) -> None:
        assert host.setup("--createek") == 0
        assert [key.handle for key in host.identities().keys] == [0x81010001, 0x81010016]
        assert not host.identities().certificates

    def test_nothing_asked_for_is_a_bare_tpm(self, host: Host) -> None:
        assert host.setup() == 0
        assert not host.identities().keys
        assert host.permanent()

    def test_device_identities(self, host: Host) -> None:
        keys = ("--iakkeyalgo", "secp256r1", "--idevidkeyalgo", "ECC_NIST_P256")
        assert host.setup(*QUICK, "--create-ek-cert", *keys) == 0
        assert {key.role for key in host.identities().keys} == {"EK", "IAK", "IDevID"}
        assert len(host.identities().certificates) == 3

    def test_signing_eks(self, host: Host) -> None:
        assert host.setup(*QUICK, "--create-ek-cert", "--allow-signing") == 0
        (certificate,) = host.identities().certificates
        usage = certificate.parsed.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.digital_signature, usage.key_agreement) == (True, False)

    def test_copies_of_certificates(self, host: Host, tmp_path: Path) -> None:
        (tmp_path / "copies").mkdir()
        assert host.setup(*QUICK, "--create-ek-cert", "--write-ek-cert-files", str(tmp_path / "copies")) == 0
        (certificate,) = host.identities().certificates
        assert [path.name for path in (tmp_path / "copies").iterdir()] == ["ek-secp256r1.crt"]
        assert (tmp_path / "copies" / "ek-secp256r1.crt").read_bytes() == certificate.der

    def test_a_linear_file(self, host: Host, tmp_path: Path) -> None:
        place = f"file://{tmp_path / 'linear'}"
        assert main(["--tpm2", "--tpm-state", place, *QUICK, "--createek"]) == 0
        assert len(host.identities(uri=place).keys) == 1
        assert main(["--tpm2", "--tpm-state", place, *QUICK, "--createek"]) == 1
        assert main(["--tpm2", "--tpm-state", place, *QUICK, "--createek", "--not-overwrite"]) == 0
        assert main(["--tpm2", "--tpm-state", place, "--overwrite"]) == 0
        assert not host.identities(uri=place).keys

    def test_messages_go_to_the_log_file(self, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert host.setup(*QUICK, "--createek", "--logfile", str(tmp_path / "log")) == 0
        assert capsys.readouterr() == ("", "")
        assert "Successfully authored TPM state." in (tmp_path / "log").read_text()

    def test_without_configuration_there_are_certificates_all_the_same(
        self, host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
        monkeypatch.setattr("crbd.compat.localca_configuration.SYSTEM_DIRECTORY", tmp_path / "etc")
        monkeypatch.setattr("crbd.compat.localca_signer.default_directory", lambda: tmp_path / "ca")
        assert host.setup(*QUICK, "--create-ek-cert") == 0
        issuer = x509.load_pem_x509_certificate((tmp_path / "ca" / "issuer-cert.pem").read_bytes())
        (certificate,) = host.identities().certificates
        certificate.parsed.verify_directly_issued_by(issuer)


class TestPcrBanks:
    """Which banks become active."""

    @pytest.mark.parametrize(
        ("arguments", "configured", "active"),
        [
            ((), "", "sha256"),
            ((), "active_pcr_banks = sha384", "sha384"),
            (("--pcr-banks", "sha1,sha512"), "active_pcr_banks = sha384", "sha1,sha512"),
            (("--pcr-banks", "sha1", "--pcr-banks", " sha256 "), "", "sha1,sha256"),
            (("--pcr-banks", "-"), "", "sha1,sha256,sha384,sha512"),
            (("--pcr-banks", ","), "active_pcr_banks = sha384", "sha384"),
        ],
    )
    def test_when_a_tpm_is_made(
        self,
        host: Host,
        arguments: tuple[str, ...],
        configured: str,
        active: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        host.configure(configured)
        assert host.setup(*arguments) == 0
        assert f"Successfully activated PCR banks {active} among " in capsys.readouterr().out

    def test_when_one_is_reconfigured(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        assert host.setup(*QUICK, "--create-ek-cert") == 0
        before = host.identities()
        assert host.setup("--pcr-banks", "sha384", "--reconfigure") == 0
        assert host.identities() == before
        told = capsys.readouterr().out
        assert "Starting vTPM reconfiguration as " in told
        assert "Successfully activated PCR banks sha384 among sha1,sha256,sha384,sha512." in told

    def test_a_bank_that_no_tpm_has(self, host: Host) -> None:
        assert host.setup("--pcr-banks", "md5") == 1
        assert not (host.state / "tpm2-00.permall").exists()

    def test_there_must_be_a_tpm_to_reconfigure(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        assert host.setup("--pcr-banks", "sha384", "--reconfigure") == 1
        assert "there is no TPM state" in capsys.readouterr().err
        assert not (host.state / "tpm2-00.permall").exists()


class TestExisting:
    """A TPM that is there."""

    def test_it_is_not_touched_unasked(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        assert host.setup() == 0
        before = host.permanent()
        assert host.setup() == 1
        assert capsys.readouterr().err == "Found existing TPM state 'tpm2-00.permall'.\n"
        assert host.setup("--not-overwrite") == 0
        assert capsys.readouterr().out == "Not overwriting existing state file.\n"
        assert host.setup("--not-overwrite", "--overwrite") == 0
        assert host.permanent() == before

    @pytest.mark.parametrize("found", [b"", b"damaged"])
    def test_what_cannot_be_read_is_there_too(self, host: Host, found: bytes) -> None:
        (host.state / "tpm2-00.permall").write_bytes(found)
        assert host.setup() == 1
        assert host.setup("--not-overwrite") == 0
        assert host.setup("--reconfigure") == 1
        assert host.permanent() == found
        assert host.setup("--overwrite") == 0
        host.identities()

    def test_overwriting_makes_another_tpm_and_forgets_the_old_ones_volatile_state(self, host: Host) -> None:
        assert host.setup(*QUICK, "--createek") == 0
        before = host.identities().keys
        (host.state / "tpm2-00.volatilestate").write_bytes(b"of the old one")
        assert host.setup(*QUICK, "--createek", "--overwrite") == 0
        assert host.identities().keys != before
        assert not (host.state / "tpm2-00.volatilestate").exists()

    def test_a_failure_leaves_the_old_tpm(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        assert host.setup(*QUICK, "--createek") == 0
        before = host.permanent()
        host.configure("create_certs_tool = false")
        assert host.setup(*QUICK, "--create-ek-cert", "--overwrite") == 1
        assert "An error occurred. Authoring the TPM state failed." in capsys.readouterr().err
        assert host.permanent() == before

    def test_a_failure_leaves_no_tpm_where_there_was_none(self, host: Host) -> None:
        host.configure("create_certs_tool = false")
        assert host.setup(*QUICK, "--create-ek-cert") == 1
        assert {path.name for path in host.state.iterdir()} <= {".lock"}


class TestEncryption:
    """Keys and passphrases, from files and descriptors."""

    @pytest.mark.parametrize("cipher", ["", "aes-cbc", "aes-128-cbc", "aes-256-cbc"])
    @pytest.mark.parametrize("source", ["keyfile", "keyfile-fd", "pwdfile", "pwdfile-fd"])
    def test_state_is_sealed(self, host: Host, tmp_path: Path, source: str, cipher: str) -> None:
        size = 32 if cipher == "aes-256-cbc" else 16
        secret = (HEX_KEY * (size // 16)).encode() if source.startswith("key") else b"a passphrase"
        key = SwtpmKey.from_hex(secret, size) if source.startswith("key") else SwtpmKey.from_passphrase(secret, size)
        (tmp_path / "secret").write_bytes(secret)
        value = str(tmp_path / "secret")
        if source.endswith("fd"):
            value = str(os.open(value, os.O_RDONLY))
        cipher_option = ("--cipher", cipher) if cipher else ()
        assert host.setup(*QUICK, "--createek", f"--{source}", value, *cipher_option) == 0
        assert len(host.identities(key).keys) == 1
        with pytest.raises(StateWrongKeyError):
            host.identities(SwtpmKey.from_passphrase(b"wrong", size))

    def test_reconfiguring_needs_the_key(self, host: Host, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        (tmp_path / "wrong").write_bytes(b"wrong")
        assert host.setup("--pwdfile", str(tmp_path / "secret")) == 0
        before = host.permanent()
        assert host.setup("--reconfigure", "--pwdfile", str(tmp_path / "wrong")) == 1
        assert host.setup("--reconfigure") == 1
        assert host.permanent() == before
        assert host.setup("--reconfigure", "--pwdfile", str(tmp_path / "secret"), "--pcr-banks", "sha384") == 0
        host.identities(SwtpmKey.from_passphrase(b"secret", 16))

    def test_overwriting_needs_no_key(self, host: Host, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        assert host.setup("--pwdfile", str(tmp_path / "secret")) == 0
        assert host.setup("--overwrite") == 0
        host.identities()

    def test_a_key_that_cannot_be_read(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        assert host.setup("--keyfile", "/no/such") == 1
        assert "The keyfile /no/such cannot be read." in capsys.readouterr().err
        assert host.setup("--pwdfile-fd", "9876") == 1
        assert "Bad file descriptor" in capsys.readouterr().err


class TestTools:
    """create_certs_tool of the configuration."""

    def test_a_tool_of_ones_own_is_run(
        self, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", str(Path(crbd.__file__).parent.parent))
        tool = tmp_path / "my-tool"
        tool.write_text(
            f"#!{sys.executable}\nimport sys\nfrom crbd.compat.localca import main\nprint('hello')\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        tool.chmod(0o755)
        host.configure(
            f"create_certs_tool = {tool}",
            "create_certs_tool_config = ${XDG_CONFIG_HOME}/swtpm-localca.conf",
            "create_certs_tool_options = ${XDG_CONFIG_HOME}/swtpm-localca.options",
        )
        assert host.setup(*QUICK, "--create-ek-cert", "--create-platform-cert") == 0
        told = capsys.readouterr().out
        assert f"  Invoking {tool} --type ek --ek x=" in told
        assert "my-tool: hello" in told
        assert len(host.identities().certificates) == 2

    def test_a_wrapper_by_swtpms_name_is_run_too(self, host: Host, tmp_path: Path) -> None:
        wrapper = tmp_path / "swtpm_localca"
        wrapper.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
        wrapper.chmod(0o755)
        host.configure(f"create_certs_tool = {wrapper}")
        assert host.setup(*QUICK, "--create-ek-cert") == 1
        assert (tmp_path / "called").exists()

    def test_a_tool_that_is_not_there(self, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
        host.configure("create_certs_tool = no-such-tool")
        assert host.setup(*QUICK, "--create-ek-cert") == 1
        assert "Could not find no-such-tool in PATH." in capsys.readouterr().err


LAUNCHERS = Path(crbd.__file__).parent.parent / "libexec" / "crbd"


@pytest.mark.skipif(not LAUNCHERS.is_dir(), reason="needs a checkout")
class TestOwnCommands:
    """crbd's own swtpm and swtpm_localca are not run: what they do is done in this process."""

    def test_the_tpm_is_ours(self) -> None:
        assert chosen_program(f"{LAUNCHERS / 'swtpm'} socket") is None
        assert chosen_program(f"{LAUNCHERS / 'swtpm'} chardev") is not None
        assert chosen_program("cat socket") == TpmProgram(("cat", "socket"))

    def test_the_certificates_are_ours(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(LAUNCHERS))
        for tool in (LAUNCHERS / "swtpm_localca", "swtpm_localca", "/no/such/swtpm-localca"):
            host.configure(f"create_certs_tool = {tool}")
            arguments = ("--tpm", f"{LAUNCHERS / 'swtpm'} socket", "--create-ek-cert", "--overwrite")
            assert host.setup(*QUICK, *arguments) == 0
            assert len(host.identities().certificates) == 1


class TestConfigFiles:
    """--create-config-files."""

    NAMES = ("swtpm_setup.conf", "swtpm-localca.conf", "swtpm-localca.options")

    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
        return tmp_path / "mine"

    def test_they_are_written_once(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--create-config-files", "root"]) == 0
        assert capsys.readouterr().out == "".join(f"Writing {config / name}.\n" for name in self.NAMES)
        before = {name: (config / name).read_text() for name in self.NAMES}
        assert main(["--create-config-files", "root"]) == 1
        assert "swtpm_setup.conf already exists. Refusing to overwrite." in capsys.readouterr().err
        assert main(["--create-config-files=root,skip-if-exist"]) == 0
        (config / "swtpm_setup.conf").write_text("mine")
        assert main(["--create-config-files=overwrite,root"]) == 0
        assert {name: (config / name).read_text() for name in self.NAMES} == before

    def test_they_work(self, config: Path, tmp_path: Path) -> None:
        assert main(["--create-config-files", "root"]) == 0
        (tmp_path / "state").mkdir()
        arguments = ["--tpm2", "--tpmstate", str(tmp_path / "state"), *QUICK, "--create-ek-cert"]
        assert main(arguments) == 0
        assert (config / "var" / "lib" / "swtpm-localca" / "issuercert.pem").exists()

    def test_words_that_exclude_each_other(self, config: Path) -> None:
        assert main(["--create-config-files", "overwrite,skip-if-exist,root"]) == 1
        assert not config.exists()

    @pytest.mark.skipif(os.getuid() != 0, reason="concerns root")
    def test_root_must_say_so(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--create-config-files"]) == 1
        assert "Requiring the 'root' flag" in capsys.readouterr().err
        assert not config.exists()


def test_capabilities_are_what_libvirt_believes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-capabilities"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["type"] == "swtpm_setup"
    assert {
        *("tpm-2.0", "cmdarg-keyfile-fd", "cmdarg-pwdfile-fd", "cmdarg-write-ek-cert-files"),
        *("cmdarg-create-config-files", "cmdarg-reconfigure-pcr-banks", "tpm2-rsa-keysize-2048"),
    } <= set(told["features"])
    assert "tpm-1.2" not in told["features"]
    assert ("cmdarg-profile" in told["features"]) == bool(told["profiles"])


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_what_only_tells(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert capsys.readouterr().out.startswith("TPM emulator setup tool version ")


STATE = ("--tpm2", "--tpmstate", "STATE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--bogus"], "swtpm_setup: unrecognized option '--bogus'", id="unknown"),
        pytest.param(["--tpm2"], "--tpm-state must be provided", id="no state"),
        pytest.param(["--tpmstate", "/tmp"], "does not support TPM 1.2", id="TPM 1.2"),
        pytest.param(["--tpmstate", "/tmp", "--ecc"], "--ecc requires --tpm2", id="ecc"),
        pytest.param(["--tpm2", "--tpmstate", "/no/such"], "cannot access directory /no/such", id="no directory"),
        pytest.param([*STATE, "--take-ownership"], "Taking ownership", id="ownership"),
        pytest.param([*STATE, "--cipher", "rot13"], "Unsupported cipher rot13", id="cipher"),
        pytest.param([*STATE, "--keyfile-fd", "x"], "Invalid file descriptor 'x'", id="fd"),
        pytest.param([*STATE, "--reconfigure", "--createek"], "Reconfiguration", id="EK"),
        pytest.param(
            ["--tpm2", "--tpmstate", "STATE", "--reconfigure", "--profile", "{}"], "profile", id="new profile"
        ),
        pytest.param([*STATE, "--createek", "--rsa-keysize", "1024"], "size 1024", id="size"),
        pytest.param([*STATE, "--createek", "--ek1keyalgo", "x"], "algorithm x is", id="ek1"),
        pytest.param([*STATE, "--createek", "--iakkeyalgo", "rsa2048"], "IAK", id="IAK"),
        pytest.param([*STATE, "--config", "/no/such"], "config file /no/such", id="config"),
        pytest.param([*STATE, "--runas", "nobody-at-all"], "does not exist", id="runas"),
        pytest.param([*STATE, "--write-ek-cert-files", "/no/such"], "/no/such", id="copies"),
        pytest.param(
            ["--tpm2", "--tpmstate", "STATE", "--profile-remove-disabled", "x"], "Unsupported para", id="fips"
        ),
        pytest.param([*STATE, "--profile", "{}", "--profile-name", "a"], "Only one", id="two"),
        pytest.param([*STATE, "--profile", "{"], "Could not parse JSON", id="no JSON"),
        pytest.param([*STATE, "--profile", "{}"], "Failed to get 'Name'", id="no name"),
        pytest.param([*STATE, "--profile-name", "a/b"], "unacceptable characters", id="path"),
        pytest.param([*STATE, "--profile-file", "/no/such"], "open profile file", id="file"),
        pytest.param([*STATE, "--tpm", "/no/such socket"], "is not an executable", id="tpm"),
        pytest.param([*STATE, "--logfile", "/no/such/log"], "Cannot open logfile", id="log"),
    ],
)
def test_wrong_options_end_with_one_line_and_status_1(
    host: Host, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("STATE", str(host.state)) for argument in arguments]
    assert main(given) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(host.state.iterdir())
