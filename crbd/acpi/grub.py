"""GRUB as the way in for the tables where the VMM takes none: QEMU for aarch64.

GRUB is started before the guest's own boot loader, installs the tables with its command `acpi`, and hands over. It
brings what it needs along in a memory disk, a tar archive that grub-mkimage puts into the program: so one file that
boots anywhere is all there is.

Firmware for aarch64 has an XSDT and no RSDT. GRUB before 2.12 looks for the latter, and crashes.

Source: GRUB Manual 2.12, "acpi", "Embedding a configuration file", and `cmdpath` among its variables.
"""

from __future__ import annotations

import re
from typing import Final

FORMAT: Final = "arm64-efi"
"""What grub-mkimage calls it."""
PROGRAM: Final = "EFI/BOOT/BOOTAA64.EFI"
"""Where UEFI on aarch64 looks for what it is to start, on a disk it knows nothing of (UEFI 2.10, 3.5.1.1)."""
OLDEST: Final = (2, 12)
"""The first GRUB that understands the firmware's tables."""
PREFIX: Final = "(memdisk)/crbd"
TABLES: Final = ("tpm2.aml", "ssdt.aml")
CONFIGURATION: Final = "grub.cfg"
"""The name of GRUB's own configuration, in the memory disk."""
NEXT: Final = "next.cfg"
"""That of the operator's, beside the program. Not grub.cfg: Debian's GRUB would read that in place of ours."""
MODULES: Final = (
    *("acpi", "boot", "chain", "configfile", "echo", "ext2", "fat", "linux", "ls", "memdisk", "minicmd", "normal"),
    *("part_gpt", "part_msdos", "regexp", "search", "search_fs_file", "tar", "test"),
)

SCRIPT: Final = rf"""
# Made by `crbd acpi --grub`.
# Where this program was started from: GRUB's own name for it, or Debian's.
set crbd_here="$cmdpath"
if [ -z "$crbd_here" ]; then
    set crbd_here="$fw_path"
fi
regexp --set=1:crbd_own '^\(([^)]*)\)' "$crbd_here"

if ! acpi {" ".join(f"{PREFIX}/{table}" for table in TABLES)}; then
    echo "crbd: the ACPI tables of the TPM were not installed: the guest will not find its TPM"
fi

# What to do next: what a {NEXT} beside this program says,
if [ -f "$crbd_here/{NEXT}" ]; then
    set root="$crbd_own"
    configfile "$crbd_here/{NEXT}"
fi

# or else the boot loader on another disk, the installed system's before the one for removable media.
for crbd_disk in (*); do
    if [ "$crbd_disk" != "($crbd_own)" -a "$crbd_disk" != "(memdisk)" ]; then
        for crbd_loader in "$crbd_disk"/EFI/*/shimaa64.efi "$crbd_disk"/EFI/*/grubaa64.efi "$crbd_disk"/{PROGRAM}; do
            if [ -f "$crbd_loader" ]; then
                # What is started is told the root as the device that it comes from.
                regexp --set=1:root '^\((.*)\)$' "$crbd_disk"
                if chainloader "$crbd_loader"; then
                    boot
                fi
            fi
        done
    fi
done
echo "crbd: no boot loader was found on another disk, and there is no $crbd_here/{NEXT}."
echo "The firmware shows GRUB only disks with a bootindex."
"""
"""Run by GRUB. An error in it ends at GRUB's prompt, on the guest's console."""


def version_of(description: str) -> tuple[int, int] | None:
    """GRUB's release, by the file modinfo.sh beside its modules; None if it does not say."""
    found = re.search(r'^grub_version="(\d+)\.(\d+)', description, re.MULTILINE | re.ASCII)
    return (int(found[1]), int(found[2])) if found else None
