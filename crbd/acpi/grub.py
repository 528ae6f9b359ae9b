"""GRUB as the way in for the tables where the VMM takes none: QEMU for aarch64.

GRUB is started before the guest's own boot loader, installs the tables with its command `acpi`, and hands over. It
brings what it needs along in a memory disk, a tar archive that grub-mkimage puts into the program: so one file that
boots anywhere is all there is.

Source: GRUB Manual 2.12, "acpi", "Embedding a configuration file", and `cmdpath` among its variables.
"""

from __future__ import annotations

from typing import Final

FORMAT: Final = "arm64-efi"
"""What grub-mkimage calls it."""
PROGRAM: Final = "EFI/BOOT/BOOTAA64.EFI"
"""Where UEFI on aarch64 looks for what it is to start, on a disk it knows nothing of (UEFI 2.10, 3.5.1.1)."""
PREFIX: Final = "(memdisk)/crbd"
TABLES: Final = ("tpm2.aml", "ssdt.aml")
CONFIGURATION: Final = "grub.cfg"
"""The name of GRUB's own configuration, in the memory disk and on the EFI system partition."""
MODULES: Final = (
    *("acpi", "boot", "chain", "configfile", "echo", "ext2", "fat", "linux", "ls", "memdisk", "minicmd", "normal"),
    *("part_gpt", "part_msdos", "regexp", "search", "search_fs_file", "tar", "test"),
)

SCRIPT: Final = rf"""
# Made by `crbd acpi --grub`.
regexp --set=1:crbd_own '^(\([^)]*\))' "$cmdpath"

if ! acpi {" ".join(f"{PREFIX}/{table}" for table in TABLES)}; then
    echo "crbd: the ACPI tables of the TPM were not installed: the guest will not find its TPM"
fi

# What to do next: what a grub.cfg beside this program says,
if [ -f "$cmdpath/{CONFIGURATION}" ]; then
    set root="$crbd_own"
    configfile "$cmdpath/{CONFIGURATION}"
fi

# or else the boot loader on another disk, the installed system's before the one for removable media.
for crbd_disk in (*); do
    if [ "$crbd_disk" != "$crbd_own" -a "$crbd_disk" != "(memdisk)" ]; then
        for crbd_loader in "$crbd_disk"/EFI/*/shimaa64.efi "$crbd_disk"/EFI/*/grubaa64.efi "$crbd_disk"/{PROGRAM}; do
            if [ -f "$crbd_loader" ]; then
                chainloader "$crbd_loader" && boot
            fi
        done
    fi
done
echo "crbd: no boot loader was found on another disk, and there is no $cmdpath/{CONFIGURATION}"
"""
"""Run by GRUB. An error in it ends at GRUB's prompt, on the guest's console."""
