"""Guests whose TPM is a PCI device: QEMU 11 from scripts/qemu11-chroot, and the daemon's registers over vfio-user.

QEMU runs outside of the chroot, by the chroot's loader on the chroot's libraries: so it needs neither mounts nor root,
and all paths are this machine's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .daemon import CRBD, DaemonKind, TpmDaemon, tpm_daemon
from .qemu import Guest, GuestImage, started

CHECKOUT = Path(__file__).resolve().parent.parent.parent
REGISTERS = "tpm.regs"


class Bed(Enum):
    """What runs before the kernel, which decides how it gets the tables."""

    SEABIOS = "seabios"
    OVMF = "ovmf"
    AAVMF = "aavmf"
    """aarch64: the firmware starts the GRUB that `crbd acpi --grub` makes, which starts the kernel beside it."""
    AAVMF_CHAIN = "aavmf-chain"
    """The same with the kernel on another disk, which has a boot loader of its own."""

    @property
    def arm(self) -> bool:
        """Whether the guest is one for aarch64."""
        return self in (Bed.AAVMF, Bed.AAVMF_CHAIN)

    @property
    def boot_seconds(self) -> float:
        """The deadline for power-on to shell: several times what it takes where it was tried."""
        return 60.0 if self is Bed.SEABIOS else 120.0


@dataclass(frozen=True, slots=True)
class Qemu11:
    """QEMU 11 where scripts/qemu11-chroot put it."""

    root: Path

    @classmethod
    def find(cls) -> Qemu11 | None:
        """None where it was not made."""
        root = Path(os.environ.get("CRBD_CACHE") or CHECKOUT / ".cache") / "trixie"
        return cls(root) if (root / "usr" / "bin" / "qemu-system-aarch64").exists() else None

    def program(self, name: str) -> list[str]:
        """The beginning of its command line."""
        libraries = self.root / "usr" / "lib" / "x86_64-linux-gnu"
        run = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
        data = [text for place in ("qemu", "seabios") for text in ("-L", str(self.share(place)))]
        return [*run, str(self.root / "usr" / "bin" / name), *data]

    def share(self, name: str) -> Path:
        """A file or directory of its /usr/share."""
        return self.root / "usr" / "share" / name


@dataclass(frozen=True, slots=True)
class ArmImage:
    """The guest for aarch64, and GRUB's modules."""

    guest: GuestImage
    grub: Path

    @classmethod
    def make(cls) -> ArmImage:
        """Made, or found, by scripts/guest-image."""
        command = [sys.executable, str(CHECKOUT / "scripts" / "guest-image"), "aarch64"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"scripts/guest-image failed:\n{done.stderr}"
        paths = {key: Path(value) for key, value in (line.split("=", 1) for line in done.stdout.splitlines())}
        return cls(GuestImage(paths["kernel"], paths["initrd"]), paths["grub"])


@dataclass(frozen=True, slots=True)
class Place:
    """Where the device is plugged in: for crbd, and for QEMU with the options that make the bus."""

    slot: str
    bus: str = "pcie.0"
    address: str = "10.0"
    options: tuple[str, ...] = ()

    def device(self, registers: Path) -> str:
        """The value of QEMU's -device for the registers served at that socket."""
        where = {"type": "unix", "path": str(registers)}
        device = {"driver": "vfio-user-pci", "id": "tpm", "bus": self.bus, "addr": self.address, "socket": where}
        return json.dumps(device)

    def acpi(self, directory: Path, *options: str) -> list[str]:
        """Have `crbd acpi` write to `directory`, and return the QEMU options that it prints."""
        command = [*CRBD, "acpi", "--slot", self.slot, "--out", str(directory), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


ON_ROOT_BUS = Place("10.0")
BEHIND_PORT = Place("3.0/0.0", "below", "0.0", ("-device", "pcie-root-port,id=below,bus=pcie.0,addr=3.0,chassis=1"))


@contextmanager
def served_daemon(
    directory: Path, *, create: bool = True, program: Sequence[str] = CRBD, options: Sequence[str] = ()
) -> Iterator[TpmDaemon]:
    """A daemon that serves its registers at DIRECTORY/tpm.regs, powered on; its control socket is for the tests."""
    registers = ["--registers", f"vfio-user:{directory / REGISTERS}", "--flags", "not-need-init"]
    with tpm_daemon(
        directory, create=create, kind=DaemonKind.CRBD, program=program, options=[*registers, *options]
    ) as daemon:
        yield daemon


@dataclass(frozen=True, slots=True)
class Machine:
    """How a guest is made; `image` and `arm` may be absent where no bed asks for them."""

    qemu: Qemu11
    image: GuestImage | None = None
    arm: ArmImage | None = None

    @contextmanager
    def guest(self, bed: Bed, directory: Path, place: Place = ON_ROOT_BUS) -> Iterator[Guest]:
        """A booted guest with the registers at DIRECTORY/tpm.regs. QEMU is killed at the end if it still runs."""
        device = [*place.options, "-device", place.device(directory / REGISTERS)]
        acpi = directory / "acpi"
        if bed.arm:
            assert self.arm is not None
            device += place.acpi(acpi, "--arch", "aarch64", "--grub", "--grub-modules", str(self.arm.grub))
        else:
            device += place.acpi(acpi, "--arch", "x86")
        with self.guest_with(device, bed, directory) as running:
            yield running

    @contextmanager
    def guest_with(self, device: Sequence[str], bed: Bed, directory: Path) -> Iterator[Guest]:
        """The same with a TPM of another kind, or none: `device` are QEMU's options for it."""
        machine = self._arm_machine(bed, directory) if bed.arm else self._x86_machine(bed, directory)

        def command(console_fd: int, monitor_fd: int) -> list[str]:
            return [
                *machine,
                *device,
                *("-display", "none", "-nodefaults", "-no-user-config"),
                *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
                *("-chardev", f"socket,id=monitor,fd={monitor_fd}", "-mon", "chardev=monitor,mode=control"),
            ]

        with started(command, directory, bed.boot_seconds) as running:
            yield running

    def _x86_machine(self, bed: Bed, directory: Path) -> list[str]:
        assert self.image is not None
        command = [*self.qemu.program("qemu-system-x86_64"), "-accel", "tcg", "-M", "q35", "-m", "512"]
        command += ["-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)]
        command += ["-append", "console=ttyS0,115200 quiet"]
        if bed is Bed.OVMF:
            command += self._flash("OVMF/OVMF_CODE_4M.fd", "OVMF/OVMF_VARS_4M.fd", directory)
        return command

    def _arm_machine(self, bed: Bed, directory: Path) -> list[str]:
        assert self.arm is not None
        command = [*self.qemu.program("qemu-system-aarch64"), "-accel", "tcg", "-M", "virt", "-cpu", "cortex-a57"]
        command += ["-m", "1024", *self._flash("AAVMF/AAVMF_CODE.fd", "AAVMF/AAVMF_VARS.fd", directory)]
        acpi = directory / "acpi"
        if bed is Bed.AAVMF:
            self._put_kernel(acpi / "esp", "next.cfg")
            return command
        disk = directory / "disk"
        self._put_kernel(disk, "grub.cfg")
        loader = disk / "EFI" / "debian" / "grubaa64.efi"
        loader.parent.mkdir(exist_ok=True)
        # An installed system's: it looks for its configuration beside itself.
        modules = ("configfile", "fat", "linux", "normal", "part_msdos", "echo")
        make = ["grub-mkimage", "-O", "arm64-efi", "-d", str(self.arm.grub), "-p", "/EFI/BOOT", "-o", str(loader)]
        subprocess.run([*make, *modules], check=True)
        drive = f"if=none,id=disk,readonly=on,format=raw,file=fat:{disk}"
        return [*command, "-drive", drive, "-device", "virtio-blk-pci,drive=disk,bootindex=1"]

    def _put_kernel(self, partition: Path, configuration: str) -> None:
        """The guest's kernel and the configuration that starts it, for a GRUB on that partition."""
        assert self.arm is not None
        boot = partition / "EFI" / "BOOT"
        boot.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.arm.guest.kernel, partition / "vmlinuz")
        shutil.copyfile(self.arm.guest.initrd, partition / "initrd")
        lines = "linux /vmlinuz console=ttyAMA0 quiet\ninitrd /initrd\nboot\n"
        (boot / configuration).write_text(lines)

    def _flash(self, code: str, variables: str, directory: Path) -> list[str]:
        """The firmware's code, and its variables in a copy of their own."""
        own = directory / "variables.fd"
        if not own.exists():
            shutil.copyfile(self.qemu.share(variables), own)
        return [
            *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={self.qemu.share(code)}"),
            *("-drive", f"if=pflash,format=raw,unit=1,file={own}"),
        ]
