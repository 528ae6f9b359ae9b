"""sd_notify(3): telling the service manager how the service is, and giving it descriptors to keep."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable

_PATH_MAX = 107
BARRIER_TIMEOUT = 5.0
"""Seconds that the service manager may take to read what it is sent (sd_notify_barrier(3))."""


def notify(state: str, descriptors: Iterable[int] = ()) -> bool:
    """Send `state` (READY=1 and the like, one a line) to $NOTIFY_SOCKET, a path or an abstract name behind `@`.

    False where there is none. Raises OSError where it is there and cannot be reached.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@") or len(os.fsencode(address)) > _PATH_MAX:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        manager.settimeout(BARRIER_TIMEOUT)
        manager.connect(address)
        if passed := list(descriptors):
            socket.send_fds(manager, [state.encode()], passed)
        else:
            manager.send(state.encode())
    return True


def barrier() -> None:
    """Return when the service manager has dealt with all that was sent before.

    Raises OSError (TimeoutError after BARRIER_TIMEOUT).
    """
    reading, writing = os.pipe()
    try:
        sent = notify("BARRIER=1", (writing,))
    finally:
        os.close(writing)
    try:
        waiting = select.poll()
        waiting.register(reading, 0)
        # It closes its copy, the last one, when it comes to this message: that is the answer.
        if sent and not waiting.poll(BARRIER_TIMEOUT * 1000):
            raise TimeoutError(f"the service manager did not answer within {BARRIER_TIMEOUT:.0f} s")
    finally:
        os.close(reading)
