"""sd_notify(3): telling the service manager how the service is."""

from __future__ import annotations

import os
import socket

_PATH_MAX = 107


def notify(state: str) -> bool:
    """Send `state` (READY=1 and the like) to $NOTIFY_SOCKET, a path or an abstract name behind `@`.

    False where there is none. Raises OSError where it is there and cannot be reached.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@") or len(os.fsencode(address)) > _PATH_MAX:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        manager.sendto(state.encode(), address)
    return True
