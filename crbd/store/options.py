"""How the files of swtpm's layouts are to be treated: what swtpm's `--tpmstate` sets."""

from __future__ import annotations

from dataclasses import dataclass

PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What an operator may choose. There is no `fsync`: what is acknowledged is on the disk, always."""

    mode: int = PRIVATE
    """Of state files that are written, whatever the umask."""
    adopt_mode: bool = False
    """Give it to those that are there too, as swtpm does where its operator chose a mode."""
    lock_mode: int = PRIVATE
    """Of a `.lock` that is made."""
    locking: bool = True
    """Exclude other processes. False is swtpm's `lock=false`: whoever says so sees to it himself."""
    backup: bool = False
    """Keep the permanent state before the present one. The directory layout alone has this."""


DEFAULT = FileOptions()
