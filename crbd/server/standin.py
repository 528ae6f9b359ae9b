"""Who runs commands while the new program starts: the stand-in.

Theory. Python needs some tenths of a second to start, on a busy machine seconds, and a guest's driver gives a command
up after less than one. So the process that is about to execute the new program leaves a copy of itself behind (fork):
frozen like itself, with the same sockets and the same lock. When the exec has taken place, the copy thaws the data
client alone and serves it, as before. When the new program has started and needs nothing but the TPM, it calls; the
copy freezes for good, sends the handover and ends.

    FORKED --the exec failed--> gone                      nothing was touched: the old process serves on
    FORKED --the exec took place--> SERVING               its end of a pipe closed by the exec says so
    SERVING --called--> frozen, handover sent, gone
    SERVING --the new program is gone--> gone             all that was answered is durable

Only one of the two touches the TPM, its state and the data client at any moment. Control and register clients wait.
The copy has one thread, never goes back to the loop it was forked from, and ends without unwinding anything.
"""

from __future__ import annotations

import os
import select
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from crbd.state.handover import MAX_HANDOVER

_CALL = b"\1"
_FAILED = b"\1"


@dataclass(frozen=True, slots=True)
class StandIn:
    """The copy, as the process that left it behind and its successor see it."""

    pid: int
    call: int
    """Descriptor of the socket by which the successor calls it."""

    def take_over(self) -> bytes:
        """Called by the successor: the handover, once the copy has finished its command and ended. Raises OSError."""
        with socket.socket(fileno=self.call) as call:
            call.sendall(_CALL)
            received = bytearray()
            while piece := call.recv(1 << 20):
                received += piece
                if len(received) > MAX_HANDOVER:
                    break
        os.waitpid(self.pid, 0)
        return bytes(received)


class Departure:
    """The copy, until it is known whether the process that left it behind has become another program."""

    def __init__(self, stand_in: StandIn, failed: int) -> None:
        self.stand_in = stand_in
        self._failed = failed

    def call_off(self) -> None:
        """The exec failed: the copy ends, untouched."""
        os.write(self._failed, _FAILED)
        os.close(self._failed)
        os.close(self.stand_in.call)
        os.waitpid(self.stand_in.pid, 0)


def leave(serve: Callable[[int], bytes]) -> Departure:
    """Leave a copy of this process behind. Raises OSError.

    `serve` runs in the copy once this process has become another program: it serves until the descriptor it is given
    can be read, and returns the handover.
    """
    ours, theirs = socket.socketpair()
    waiting, failed = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks where there are threads. Those that are left here wait for work, and hold no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(failed)
        _be_the_copy(waiting, theirs, serve)
    theirs.close()
    os.close(waiting)
    return Departure(StandIn(pid, ours.detach()), failed)


def _be_the_copy(waiting: int, call: socket.socket, serve: Callable[[int], bytes]) -> NoReturn:
    """Never returns: what is above on the stack is the other process's."""
    status = 1
    try:
        if os.read(waiting, 1) == b"":
            handover = serve(call.fileno())
            select.select([call], [], [])
            if call.recv(1) == _CALL:
                call.sendall(handover)
                status = 0
        else:
            status = 0
    finally:
        os._exit(status)
