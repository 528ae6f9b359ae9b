"""Accepting clients without ever giving up the listener; and only those of the users that may be clients."""

from __future__ import annotations

import errno
import logging
import socket
from struct import Struct

import trio

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds until the next try where the machine has run out of something."""
_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


_CREDENTIALS = Struct("=iII")
"""struct ucred: process, user and group at the time of the connect (unix(7), SO_PEERCRED)."""


async def accept(listener: trio.socket.SocketType, allowed: frozenset[int] | None = None) -> trio.socket.SocketType:
    """The next client; where `allowed` is given, of a UNIX socket, the next one whose user is among them.

    One that is gone before it was accepted is passed over; a machine that has run out of descriptors or memory is
    waited for, since a daemon that ended would take the TPM along (accept(2)).

    Raises OSError for a listener that cannot be one.
    """
    while True:
        try:
            accepted, _ = await listener.accept()
        except OSError as error:
            if error.errno in _OUT_OF:
                log.error("a client has to wait: %s", error.strerror)
                await trio.sleep(PAUSE)
            elif error.errno != errno.ECONNABORTED:
                raise
        else:
            if allowed is None or _is_allowed(accepted, allowed):
                return accepted
            accepted.close()


def _is_allowed(client: trio.socket.SocketType, allowed: frozenset[int]) -> bool:
    if client.family != socket.AF_UNIX:
        return True
    pid, uid, _ = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in allowed:
        log.warning("process %d of user %d is turned away: --allow-uids does not name that user", pid, uid)
    return uid in allowed
