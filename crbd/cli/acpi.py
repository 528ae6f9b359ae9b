"""`crbd acpi`: the ACPI tables by which a guest finds the registers that `crbd serve --registers` serves."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import tarfile
import tempfile
from enum import Enum
from pathlib import Path

from crbd.acpi import grub
from crbd.acpi.slot import Slot, parse_slot
from crbd.acpi.tables import PciFunction, ssdt, tpm2
from crbd.errors import OperatorError, UsageError
from crbd.vfiouser.configuration import DEVICE, VENDOR
from crbd.vfiouser.spec import BAR_SIZE

DESCRIPTION = """Write the ACPI tables by which a guest finds the registers that crbd serve --registers serves as a PCI
device, and print the QEMU options that give them to the guest. docs/acpi.md has whole command lines."""


class Architecture(Enum):
    """Which of QEMU's machines: x86 are q35 and pc, which take tables themselves, aarch64 is virt."""

    X86 = "x86"
    AARCH64 = "aarch64"


_MAKER = "grub-mkimage"
_MODULES = Path("/usr/lib/grub") / grub.FORMAT
_GRUB_PACKAGES = "install grub-common and grub-efi-arm64-bin"
_PARTITION = "esp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `crbd acpi`."""
    parser.add_argument(
        "--slot",
        required=True,
        metavar="DEVICE.FUNCTION",
        help="where the device is, in hexadecimal as in QEMU's addr= (10.0); behind a root port: PORT/DEVICE (3.0/0.0)",
    )
    parser.add_argument(
        "--arch", required=True, choices=[each.value for each in Architecture], help="x86: q35 and pc; aarch64: virt"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the files go; made if absent")
    parser.add_argument(
        "--grub",
        action="store_true",
        help="also DIR/esp, an EFI system partition whose GRUB installs the tables and goes on to the guest's own boot "
        "loader (aarch64, where QEMU takes no tables)",
    )
    parser.add_argument(
        "--grub-modules",
        type=Path,
        metavar="DIR",
        default=_MODULES,
        help=f"GRUB's for {grub.FORMAT} (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write, print, return 0. Raises OperatorError."""
    architecture, slot, directory = Architecture(arguments.arch), _parse(arguments.slot), arguments.out
    if arguments.grub and architecture is not Architecture.AARCH64:
        raise UsageError("--grub is for --arch aarch64", "leave it out: on x86 QEMU takes the tables itself")
    tables = dict(zip(grub.TABLES, (tpm2(), ssdt(slot, PciFunction(VENDOR, DEVICE, BAR_SIZE))), strict=True))
    program = _make_grub(tables, arguments.grub_modules) if arguments.grub else None
    try:
        directory.mkdir(exist_ok=True)
        for name, table in tables.items():
            _replace(directory / name, table)
        if program is not None:
            (directory / _PARTITION / grub.PROGRAM).parent.mkdir(parents=True, exist_ok=True)
            _replace(directory / _PARTITION / grub.PROGRAM, program)
    except OSError as error:
        raise OperatorError(
            f"cannot write to {directory}: {error.strerror}", "give a directory that can be written to with --out"
        ) from error
    for line in _qemu_options(architecture, directory.absolute(), with_grub=program is not None):
        print(line)
    return 0


def _parse(text: str) -> Slot:
    try:
        return parse_slot(text)
    except ValueError as error:
        raise UsageError(f"--slot {text!r}: {error}", "give the device as QEMU's addr= has it, such as 10.0") from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        try:
            temporary.write(data)
            # For whoever runs QEMU, who may be another user: there is nothing secret in it.
            os.fchmod(temporary.fileno(), 0o644)
            temporary.flush()
            Path(temporary.name).replace(path)
        except OSError:
            Path(temporary.name).unlink(missing_ok=True)
            raise


def _make_grub(tables: dict[str, bytes], modules: Path) -> bytes:
    """GRUB with the tables inside. Raises OperatorError."""
    try:
        version = grub.version_of((modules / "modinfo.sh").read_text(errors="replace"))
    except OSError as error:
        raise OperatorError(
            f"there are no modules of GRUB for {grub.FORMAT} in {modules}", f"{_GRUB_PACKAGES}, or give --grub-modules"
        ) from error
    if version is None or version < grub.OLDEST:
        release = "unknown" if version is None else "{}.{:02}".format(*version)
        raise OperatorError(
            f"the GRUB in {modules} is too old ({release}): it crashes on the firmware's tables",
            f"give the modules of {'{}.{}'.format(*grub.OLDEST)} or newer with --grub-modules (docs/acpi.md)",
        )
    with tempfile.TemporaryDirectory(prefix="crbd-acpi-") as place:
        archive, image = Path(place) / "memdisk.tar", Path(place) / "image"
        archive.write_bytes(_memory_disk(tables | {grub.CONFIGURATION: grub.SCRIPT.encode()}))
        command = [_MAKER, "-O", grub.FORMAT, "-d", str(modules), "-o", str(image), *grub.MODULES]
        # The prefix last: -m sets one, too.
        command += ["-m", str(archive), "-p", grub.PREFIX]
        try:
            done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise OperatorError(f"{_MAKER} is missing, which --grub needs", _GRUB_PACKAGES) from error
        if done.returncode:
            said = done.stderr.strip().replace("\n", "; ")
            raise OperatorError(f"{_MAKER} failed: {said}", f"its GRUB and that of {modules} must be of one release")
        return image.read_bytes()


def _memory_disk(files: dict[str, bytes]) -> bytes:
    """A tar archive, the same for the same files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{grub.PREFIX.partition('/')[2]}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def _qemu_options(architecture: Architecture, directory: Path, *, with_grub: bool) -> list[str]:
    """What brings the tables to the guest; nothing where the operator has to see to that."""
    if architecture is Architecture.X86:
        return [f"-acpitable file={_quoted(directory / name)}" for name in grub.TABLES]
    if with_grub:
        return [
            f"-drive if=none,id=crbd-acpi,readonly=on,format=raw,file=fat:{_quoted(directory / _PARTITION)}",
            "-device virtio-blk-pci,drive=crbd-acpi,bootindex=0",
        ]
    return []


def _quoted(path: Path) -> str:
    """In QEMU's options a comma ends a value, and two stand for one."""
    return str(path).replace(",", ",,")
