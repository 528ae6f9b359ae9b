"""The service manager's file descriptor store: sd_notify(3), FileDescriptorStoreMax= in systemd.service(5).

A message is never answered. `notify.barrier` says when all were read; whether a descriptor was taken shows only at the
next start. The manager drops a descriptor that has hung up, unless it is told not to look (FDPOLL=0).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from crbd.systemd.notify import notify


def keep(name: str, descriptor: int) -> bool:
    """Give it to the manager, under a name (1 to 255 printable ASCII characters, no colon); False without a manager.

    Raises OSError.
    """
    return notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", (descriptor,))


def forget(names: Iterable[str]) -> None:
    """Have the manager close what it keeps under these names. Raises OSError."""
    for name in names:
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def room() -> int | None:
    """How many descriptors it keeps for this service; None where it does not say (systemd before 254)."""
    said = os.environ.get("FDSTORE", "")
    return int(said) if said.isdecimal() else None
