"""`swtpm_setup` beside swtpm's own, on other programs' TPMs, and as libvirt runs it."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtensionOID

import crbd
from crbd.provision.endorsement import Identities
from crbd.provision.provisioning import powered
from crbd.provision.staging import StagedStore
from crbd.provision.templates import PLATFORM_CERTIFICATE_INDEX
from crbd.provision.tpm import NvIndex, Tpm
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.layout import open_backend
from tests.compat.test_setup import Host, engine

SWTPM = "/usr/bin/swtpm"
SWTPM_SETUP = "/usr/bin/swtpm_setup"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which(SWTPM_SETUP) is None, reason="needs Debian's swtpm-tools"),
]
FULL = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", "vm:1", "--pcr-banks", "sha256,sha384")
OURS = (sys.executable, "-m", "crbd.compat.launch", "swtpm_setup")


def run(command: Sequence[str], *descriptors: int, user: str = "") -> subprocess.CompletedProcess[str]:
    """The command's end; `descriptors` go along. A `user` other than this one has / as the working directory."""
    environment = {**os.environ, "PYTHONPATH": str(Path(crbd.__file__).parent.parent)}
    return subprocess.run(
        ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command] if user else command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        pass_fds=descriptors,
        cwd="/" if user else None,
    )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return configured(tmp_path, monkeypatch)


def configured(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A user whose configuration names everything below `directory`."""
    made = Host(directory, directory / "ca")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(made.config))
    (made.config / "swtpm-localca.options").write_text(
        "--platform-manufacturer Fedora --platform-version 2.1 --platform-model QEMU\n"
    )
    made.configure(
        "create_certs_tool = /usr/bin/swtpm_localca",
        f"create_certs_tool_config = {made.config}/swtpm-localca.conf",
        f"create_certs_tool_options = {made.config}/swtpm-localca.options",
        "active_pcr_banks = sha256",
    )
    return made


def certificates(found: Identities, *, usage: bool) -> dict[int, dict[str, object]]:
    """What certificates of two TPMs have in common: all but keys, serial numbers, signatures and times."""
    left_out = {ExtensionOID.SUBJECT_KEY_IDENTIFIER, *(() if usage else (ExtensionOID.KEY_USAGE,))}
    compared = {}
    for shown in found.certificates:
        parsed = shown.parsed
        compared[shown.index] = {
            "issuer": parsed.issuer,
            "subject": parsed.subject.rfc4514_string(),
            "until": parsed.not_valid_after_utc,
            "of": shown.handle,
            "extensions": {
                found.oid.dotted_string: (found.critical, found.value.public_bytes())
                for found in parsed.extensions
                if found.oid not in left_out
            },
        }
    return compared


def nv_indices(state: Path) -> tuple[list[NvIndex], dict[str, bool]]:
    """All NV indices and PCR banks of a TPM at rest."""
    store = open_backend(f"dir://{state}", create=False, lock=False)
    staged = StagedStore(store, keeps=True)
    with powered(staged, engine, profile=None, new=False) as instance, Tpm.of_engine(instance.execute) as tpm:
        return [tpm.nv_index(index) for index in sorted(tpm.nv_indices())], tpm.banks()


@pytest.mark.parametrize("variant", [(), ("--allow-signing",), ("--allow-signing", "--decryption")], ids=" ".join)
def test_the_tpm_is_the_one_that_swtpms_own_makes(host: Host, tmp_path: Path, variant: tuple[str, ...]) -> None:
    """Handles, NV indices with their attributes, PCR banks and certificates field by field.

    swtpm 0.7 does not tell its swtpm_cert that EKs can sign; 0.11 does.
    """
    theirs_at, ours_at = tmp_path / "theirs", host.state
    theirs_at.mkdir()
    theirs = run([SWTPM_SETUP, "--tpm2", "--tpmstate", str(theirs_at), *FULL, *variant])
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr
    ours = run([*OURS, "--tpm2", "--tpmstate", str(ours_at), *FULL, *variant])
    assert ours.returncode == 0, ours.stdout + ours.stderr
    found = host.identities()
    host.state = theirs_at
    expected = host.identities()
    assert [(key.role, key.handle, key.algorithm) for key in found.keys] == [
        (key.role, key.handle, key.algorithm) for key in expected.keys
    ]
    assert certificates(found, usage=not variant) == certificates(expected, usage=not variant)
    eks = [shown.parsed for shown in found.certificates if shown.index != PLATFORM_CERTIFICATE_INDEX]
    usages = [certificate.extensions.get_extension_for_class(x509.KeyUsage).value for certificate in eks]
    assert {usage.digital_signature for usage in usages} == {bool(variant)}
    (our_indices, our_banks), (their_indices, their_banks) = nv_indices(ours_at), nv_indices(theirs_at)
    assert our_banks == their_banks
    assert [(index.index, hex(index.attributes)) for index in our_indices] == [
        (index.index, hex(index.attributes)) for index in their_indices
    ]
    assert sorted(path.name for path in ours_at.iterdir()) == sorted(path.name for path in theirs_at.iterdir())


def test_openssl_verifies_what_is_in_the_tpm(host: Host, tmp_path: Path) -> None:
    assert run([*OURS, "--tpm2", "--tpmstate", str(host.state), *FULL]).returncode == 0
    authority = tmp_path / "ca"
    for number, certificate in enumerate(host.identities().certificates):
        leaf = tmp_path / f"{number}.pem"
        leaf.write_text(certificate.pem)
        root, issuer = authority / "swtpm-localca-rootca-cert.pem", authority / "issuercert.pem"
        verified = run(["openssl", "verify", "-CAfile", str(root), "-untrusted", str(issuer), str(leaf)])
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert len(host.identities().certificates) == 3


class TestOtherProgram:
    """--tpm names Debian's swtpm: 0.7.1 does the work, over sockets."""

    TPM = ("--tpm", f"{SWTPM} socket")

    def test_it_is_provisioned(self, host: Host) -> None:
        done = run([*OURS, "--tpm2", "--tpmstate", str(host.state), *FULL, *self.TPM])
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(host.identities().keys) == 2
        assert len(host.identities().certificates) == 3
        _, banks = nv_indices(host.state)
        assert [name for name, active in banks.items() if active] == ["sha256", "sha384"]
        again = run([*OURS, "--tpm2", "--tpmstate", str(host.state), "--reconfigure", "--pcr-banks", "sha1", *self.TPM])
        assert again.returncode == 0, again.stdout + again.stderr
        _, banks = nv_indices(host.state)
        assert [name for name, active in banks.items() if active] == ["sha1"]

    @pytest.mark.parametrize("source", ["pwdfile", "pwdfile-fd"])
    def test_its_state_is_encrypted(self, host: Host, tmp_path: Path, source: str) -> None:
        (tmp_path / "secret").write_bytes(b"a passphrase")
        descriptor = os.open(tmp_path / "secret", os.O_RDONLY)
        value = str(descriptor) if source.endswith("fd") else str(tmp_path / "secret")
        arguments = (f"--{source}", value, "--cipher", "aes-256-cbc", *self.TPM)
        done = run([*OURS, "--tpm2", "--tpmstate", str(host.state), "--createek", *arguments], descriptor)
        os.close(descriptor)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(host.identities(SwtpmKey.from_passphrase(b"a passphrase", 32)).keys) == 2

    def test_a_failure_leaves_no_half_made_tpm(self, host: Host) -> None:
        host.configure("create_certs_tool = false")
        done = run([*OURS, "--tpm2", "--tpmstate", str(host.state), "--create-ek-cert", *self.TPM])
        assert done.returncode == 1
        assert "Authoring the TPM state failed" in done.stderr
        assert not (host.state / "tpm2-00.permall").exists()

    def test_a_program_that_is_no_tpm(self, host: Host) -> None:
        done = run([*OURS, "--tpm2", "--tpmstate", str(host.state), "--createek", "--tpm", "/bin/true socket"])
        assert done.returncode == 1
        assert "/bin/true" in done.stderr

    def test_capabilities_are_that_programs(self) -> None:
        told = json.loads(run([*OURS, "--print-capabilities", *self.TPM]).stdout)
        assert "tpm2-rsa-keysize-3072" in told["features"]


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
class TestLibvirt:
    """The command lines of libvirt 9, as user tss with / as the working directory."""

    @pytest.fixture
    def host(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
        """In a directory that user tss can reach, which pytest's are not."""
        user = pwd.getpwnam("tss")
        with tempfile.TemporaryDirectory(prefix="crbd-", dir="/var/tmp") as directory:
            made = configured(Path(directory), monkeypatch)
            for path in (Path(directory), made.state):
                os.chown(path, user.pw_uid, user.pw_gid)
            yield made

    @pytest.fixture
    def place(self, host: Host) -> Path:
        return host.state

    def libvirt(self, *arguments: str, descriptors: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
        return run([*OURS, *arguments], *descriptors, user="tss")

    def test_a_plain_tpm(self, host: Host, place: Path) -> None:
        log = str(place / "vm-swtpm.log")
        create = ("--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--not-overwrite")
        common = ("--tpm2", "--tpm-state", str(place))
        done = self.libvirt(*common, "--vmid", "vm:6e3c0f0e-2b0d-4b1d-9a5e-0d3c5e5d7a11", "--logfile", log, *create)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert {certificate.index for certificate in host.identities().certificates} == {
            *(0x01C00002, 0x01C00016),
            PLATFORM_CERTIFICATE_INDEX,
        }
        assert (place / "tpm2-00.permall").owner() == "tss"
        done = self.libvirt(*common, "--logfile", log, "--pcr-banks", "sha256,sha384", "--reconfigure")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        before = (place / "tpm2-00.permall").read_bytes()
        done = self.libvirt(*common, "--vmid", "vm:1", "--logfile", log, *create)
        assert done.returncode == 0
        assert (place / "tpm2-00.permall").read_bytes() == before

    def test_an_encrypted_tpm_with_the_passphrase_in_a_pipe(self, host: Host, place: Path) -> None:
        reader, writer = os.pipe()
        os.write(writer, b"libvirt's secret")
        os.close(writer)
        encrypted = ("--pwdfile-fd", str(reader), "--cipher", "aes-256-cbc")
        arguments = ("--tpm2", *encrypted, "--tpm-state", str(place), "--logfile", str(place / "log"), "--createek")
        done = self.libvirt(*arguments, "--not-overwrite", descriptors=(reader,))
        os.close(reader)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert len(host.identities(SwtpmKey.from_passphrase(b"libvirt's secret", 32)).keys) == 2

    def test_an_authority_out_of_reach_is_an_error_and_not_another_authority(self, host: Host, place: Path) -> None:
        (host.directory / "ca").mkdir(mode=0o700)
        done = self.libvirt("--tpm2", "--tpm-state", str(place), "--create-ek-cert")
        assert done.returncode == 1
        assert f"{host.directory}/ca/issuercert.pem cannot be used: Permission denied" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (place / "tpm2-00.permall").exists()

    def test_a_state_out_of_reach_is_an_error(self, host: Host, place: Path) -> None:
        os.chown(place, 0, 0)
        place.chmod(0o700)
        for more in ((), ("--not-overwrite",), ("--reconfigure",)):
            done = self.libvirt("--tpm2", "--tpm-state", str(place), *more)
            assert done.returncode == 1
            assert "Need read rights on directory" in done.stderr

    def test_capabilities(self) -> None:
        done = self.libvirt("--print-capabilities")
        assert done.returncode == 0
        assert "cmdarg-reconfigure-pcr-banks" in json.loads(done.stdout)["features"]

    def test_runas_does_the_same_for_others(self, host: Host, place: Path) -> None:
        done = run([*OURS, "--tpm2", "--runas", "tss", "--tpmstate", str(place), "--createek"])
        assert done.returncode == 0, done.stdout + done.stderr
        assert (place / "tpm2-00.permall").owner() == "tss"
        assert " as tss:tss @ " in done.stdout
