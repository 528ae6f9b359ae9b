"""Accepting clients without ever giving up the listener."""

from __future__ import annotations

import errno
import logging

import trio

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds until the next try where the machine has run out of something."""
_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


async def accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next client.

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
            return accepted
