"""libvirt's domains with crbd as their TPM: what `virsh` does with them, and what their guests see.

crbd's directory of commands is the first in libvirtd's PATH; it is not told anything else of crbd.
"""

from __future__ import annotations

import base64
import os
import pwd
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_der_x509_certificate

from crbd.cli.compat_path import find_directory

from .libvirt_bed import BOOT_SECONDS, Domain, Libvirt, domain, libvirtd
from .qemu import GuestImage
from .shell import Shell
from .waiting import Deadline

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.getuid() != 0, reason="libvirtd is started as root"),
    pytest.mark.skipif(shutil.which("libvirtd") is None, reason="needs Debian's libvirt-daemon"),
]
EK_CERTIFICATES = {0x01C00002: 0x81010001, 0x01C00016: 0x81010016}
"""NV index of an endorsement key's certificate, and the key's handle: RSA-2048 and P-384, libvirt's choice."""
PLATFORM_CERTIFICATE = 0x01C08000
NV = "0x1500042"
_DEFINE_NV = f"tpm2_nvdefine -Q -C o -s 16 {NV}"
_WRITE_NV = "printf %-16s '{}' >/tmp/in; tpm2_nvwrite -Q -C o -i /tmp/in " + NV
_READ_NV = f"tpm2_nvread -C o -s 16 {NV}"
_DEFINE_GUARDED = "tpm2_nvdefine -Q -C o -s 4 -a 'authread|authwrite' -p password 0x1500043"
_USE_GUARDED = "printf abcd | tpm2_nvwrite -Q -C 0x1500043 -P password -i - 0x1500043"
"""What is guarded against guessing: a TPM whose power goes after such a use takes that for a wrong guess, unless it got
a TPM2_Shutdown."""
_PCR = "cat /sys/class/tpm/tpm0/pcr-sha256/12"
_EXTEND = f"tpm2_pcrextend 12:sha256={'5a' * 32}"
_LOCKOUT_COUNTER = "tpm2_getcap properties-variable | sed -n 's/^TPM2_PT_LOCKOUT_COUNTER: //p'"
_OBEY_POWER_BUTTON = """
setsid sh -c '
    until grep -q "^ *[1-9]" /sys/firmware/acpi/interrupts/ff_pwr_btn; do sleep 0.1; done
    poweroff -f
' >/dev/null 2>&1 </dev/null &
"""


@pytest.fixture(scope="module")
def libvirt(image: GuestImage) -> Iterator[Libvirt]:
    with libvirtd(image) as running:
        yield running


@pytest.fixture(scope="module")
def other(image: GuestImage) -> Iterator[Libvirt]:
    """A second host."""
    with libvirtd(image) as running:
        yield running


@pytest.fixture
def vm(libvirt: Libvirt) -> Iterator[Domain]:
    with domain(libvirt, f"vm-{uuid.uuid4().hex[:8]}") as made:
        yield made


def _nv(shell: Shell, index: int) -> bytes:
    """What an NV index holds."""
    said = shell.read(f"tpm2_nvread -C o 0x{index:x} >/tmp/out 2>/tmp/error || cat /tmp/error; base64 /tmp/out")
    return base64.b64decode(said)


def _verify(leaf: Path, authority: Path) -> str:
    root, issuer = authority / "swtpm-localca-rootca-cert.pem", authority / "issuercert.pem"
    command = ["openssl", "verify", "-CAfile", str(root), "-untrusted", str(issuer), str(leaf)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_what_a_guest_finds(vm: Domain, tmp_path: Path) -> None:
    """A TPM with endorsement keys, and certificates of just these keys that openssl follows to the root."""
    vm.define()
    shell = vm.boot()
    process = vm.tpm()
    assert process.user == pwd.getpwnam("tss").pw_uid
    assert str(find_directory() / "swtpm") in process.command
    assert shell.read("basename $(readlink /sys/class/tpm/tpm0/device/driver)") == "tpm_crb"
    assert shell.read("cat /sys/class/tpm/tpm0/tpm_version_major") == "2"
    indices = {int(word, 16) for word in shell.read("tpm2_getcap handles-nv-index").split() if word != "-"}
    assert indices == {*EK_CERTIFICATES, PLATFORM_CERTIFICATE}
    for index, handle in EK_CERTIFICATES.items():
        certificate = load_der_x509_certificate(_nv(shell, index))
        (tmp_path / "leaf.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        assert _verify(tmp_path / "leaf.pem", vm.libvirt.authority).endswith("leaf.pem: OK\n")
        assert certificate.subject.rfc4514_string() == f"CN={vm.name}:{vm.uuid}"
        public = shell.read(f"tpm2_readpublic -Q -c 0x{handle:x} -f pem -o /tmp/ek.pem; cat /tmp/ek.pem")
        assert serialization.load_pem_public_key(public.encode()) == certificate.public_key()
    vm.destroy()
    assert vm.permanent.owner() == "tss"


def test_capabilities(libvirt: Libvirt) -> None:
    """What libvirt says of emulated TPMs is what our programs say of themselves: there is no TPM 1.2."""
    told = libvirt.virsh("domcapabilities", "--virttype", "qemu", "--machine", "q35")
    tpm = told.partition("<tpm ")[2].partition("</tpm>")[0]
    assert tpm.startswith("supported='yes'")
    for value in ("tpm-crb", "tpm-tis", "emulator", "2.0"):
        assert f"<value>{value}</value>" in tpm
    assert "<value>1.2</value>" not in tpm


def test_undefine(vm: Domain) -> None:
    """The TPM goes with its domain, or stays for one that comes back."""
    vm.define()
    vm.start()
    vm.destroy()
    kept = vm.permanent.read_bytes()
    vm.libvirt.virsh("undefine", vm.name, "--keep-tpm")
    vm.define()
    assert vm.permanent.read_bytes() == kept
    vm.libvirt.virsh("undefine", vm.name, "--tpm")
    assert not vm.state.parent.exists()


def test_a_start_that_fails(vm: Domain) -> None:
    """QEMU ends before it has the TPM, which libvirt then shuts down with swtpm_ioctl."""
    vm.define()
    vm.cut_console()
    assert "Failed to connect" in vm.libvirt.refusal("start", vm.name)
    assert vm.libvirt.ran("swtpm_ioctl --unix ")
    deadline = Deadline(10)
    while left := vm.running_tpms():
        assert not deadline.passed, left


def test_save_and_restore(vm: Domain, tmp_path: Path) -> None:
    """All of the TPM is in the file: that the state directory has gone back meanwhile does not count."""
    vm.define()
    shell = vm.boot()
    shell.read(f"{_DEFINE_NV}; {_WRITE_NV.format('before')}")
    before = vm.permanent.read_bytes()
    shell.read(f"{_WRITE_NV.format('after')}; {_EXTEND}; {_EXTEND}")
    # Past the resource manager: the object stays loaded.
    shell.read("export TPM2TOOLS_TCTI=device:/dev/tpm0; tpm2_createprimary -Q -c /tmp/primary")
    pcr, loaded = shell.read(_PCR), shell.read("tpm2_getcap -T device:/dev/tpm0 handles-transient")
    assert set(pcr) != {"0"}
    assert "0x80000000" in loaded
    process = vm.tpm()
    saved = vm.libvirt.root / f"{vm.name}.saved"
    vm.libvirt.virsh("save", vm.name, str(saved))
    process.await_end()
    assert vm.permanent.read_bytes() != before
    vm.permanent.write_bytes(before)
    assert not vm.state.joinpath("tpm2-00.volatilestate").exists()

    vm.libvirt.virsh("restore", str(saved))
    saved.unlink()
    shell = vm.shell()
    assert shell.read(_PCR) == pcr
    assert shell.read(_READ_NV).strip() == "after"
    assert shell.read("tpm2_getcap -T device:/dev/tpm0 handles-transient") == loaded
    shell.read(_EXTEND)
    pcr = shell.read(_PCR)

    vm.libvirt.virsh("managedsave", vm.name)
    assert vm.running_tpms() == []
    shell = vm.start()
    assert shell.read(_PCR) == pcr
    vm.destroy()
    shell = vm.boot()
    assert set(shell.read(_PCR)) == {"0"}
    assert shell.read(_READ_NV).strip() == "after"


def test_reset_reboot_shutdown(vm: Domain) -> None:
    """The TPM starts anew with its machine; neither way looks like an attack to it."""
    vm.define()
    shell = vm.boot()
    process = vm.tpm()
    shell.read(f"{_DEFINE_NV}; {_WRITE_NV.format('kept')}; {_EXTEND}")
    shell.read(_DEFINE_GUARDED)
    for command in ("reset", "reboot"):
        assert set(shell.read(_PCR)) != {"0"}
        shell.read(_USE_GUARDED)
        shell.read(_OBEY_POWER_BUTTON)
        vm.libvirt.virsh(command, vm.name)
        shell.await_boot(BOOT_SECONDS)
        assert set(shell.read(_PCR)) == {"0"}
        assert shell.read(_READ_NV).strip() == "kept"
        assert int(shell.read(_LOCKOUT_COUNTER), 16) == 0
        shell.read(_EXTEND)
    assert vm.tpm() == process
    shell.read(_OBEY_POWER_BUTTON)
    vm.libvirt.virsh("shutdown", vm.name)
    process.await_end(30)
    deadline = Deadline(10)
    while (state := vm.libvirt.virsh("domstate", vm.name)) != "shut off":
        assert not deadline.passed, state


def test_pcr_banks(vm: Domain) -> None:
    """Those that the domain names, at every start; where it names none any more, they stay."""
    for wanted, active in (
        ("<active_pcr_banks><sha256/><sha384/></active_pcr_banks>", {"sha256", "sha384"}),
        ("<active_pcr_banks><sha512/></active_pcr_banks>", {"sha512"}),
        ("", {"sha512"}),
    ):
        vm.define(wanted)
        shell = vm.boot()
        assert set(shell.read("cd /sys/class/tpm/tpm0; ls -d pcr-*").split()) == {f"pcr-{bank}" for bank in active}
        vm.destroy()


def test_migration(vm: Domain, other: Libvirt) -> None:
    """To another host, to stay: the TPM that arrived is on the disk there, and no longer here."""
    vm.define()
    shell = vm.boot()
    shell.read(f"{_DEFINE_NV}; {_WRITE_NV.format('moved')}; {_EXTEND}")
    pcr, process = shell.read(_PCR), vm.tpm()
    vm.libvirt.virsh(*vm.migration(other))
    try:
        process.await_end()
        shell, moved = vm.shell(), vm.at(other)
        assert shell.read(_PCR) == pcr
        assert moved.tpm().number != process.number
        assert not vm.permanent.exists()
        moved.destroy()
        assert moved.boot().read(_READ_NV).strip() == "moved"
    finally:
        other.remove(vm.name)


class _Secret:
    """A passphrase that libvirt keeps."""

    def __init__(self, libvirt: Libvirt, directory: Path) -> None:
        self.uuid = str(uuid.uuid4())
        self._directory = directory
        self._description = directory / "secret.xml"
        self._description.write_text(
            f"<secret ephemeral='no' private='yes'><uuid>{self.uuid}</uuid>"
            f"<usage type='vtpm'><name>{self.uuid}</name></usage></secret>"
        )
        self._libvirt = libvirt
        self.tell(libvirt)

    def tell(self, libvirt: Libvirt) -> None:
        """Let a libvirtd know that there is one."""
        libvirt.virsh("secret-define", str(self._description))

    def set(self, passphrase: str, libvirt: Libvirt | None = None) -> None:
        """Give the first libvirtd that knew of it, or another one, the passphrase."""
        file = self._directory / "passphrase"
        file.write_text(passphrase)
        (libvirt or self._libvirt).virsh("secret-set-value", self.uuid, "--file", str(file), "--plain")


@pytest.fixture
def secret(libvirt: Libvirt, tmp_path: Path) -> _Secret:
    if libvirt.attempt("secret-list").returncode:
        pytest.skip("this libvirtd keeps no secrets: Debian 13 has that in libvirt-daemon-driver-secret")
    return _Secret(libvirt, tmp_path)


def test_encrypted_state(vm: Domain, secret: _Secret) -> None:
    secret.set("the passphrase")
    vm.define(f"<encryption secret='{secret.uuid}'/>")
    shell = vm.boot()
    shell.read(f"{_DEFINE_NV}; {_WRITE_NV.format('sealed')}; {_EXTEND}")
    pcr = shell.read(_PCR)
    vm.libvirt.virsh("managedsave", vm.name)
    shell = vm.start()
    assert shell.read(_PCR) == pcr
    vm.destroy()
    sealed = vm.permanent.read_bytes()
    flags = int.from_bytes(sealed[4:6], "big")
    assert flags & 1, "encrypted"

    secret.set("another passphrase")
    refusal = vm.libvirt.refusal("start", vm.name)
    assert f"{vm.uuid}/tpm2/tpm2-00.permall is encrypted with another key" in refusal
    assert vm.running_tpms() == []
    assert vm.permanent.read_bytes() == sealed

    secret.set("the passphrase")
    shell = vm.boot()
    assert shell.read(_READ_NV).strip() == "sealed"


def test_a_migration_that_fails(vm: Domain, other: Libvirt, secret: _Secret) -> None:
    """The other host has another passphrase: the guest goes on here, with its TPM."""
    secret.set("the passphrase")
    secret.tell(other)
    secret.set("another passphrase", other)
    vm.define(f"<encryption secret='{secret.uuid}'/>")
    shell = vm.boot()
    shell.read(f"{_DEFINE_NV}; {_WRITE_NV.format('sealed')}; {_EXTEND}")
    pcr, process = shell.read(_PCR), vm.tpm()
    try:
        vm.libvirt.refusal(*vm.migration(other))
        assert "permall state blob is encrypted with another key" in other.log_of_tpm(vm.name)
        assert other.virsh("list", "--all", "--name") == ""
        assert vm.running_tpms() == [process]
        assert shell.read(_PCR) == pcr
        shell.read(f"{_WRITE_NV.format('still here')}; {_EXTEND}")
        assert shell.read(_READ_NV).strip() == "still here"
    finally:
        other.remove(vm.name)
