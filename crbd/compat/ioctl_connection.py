"""How swtpm_ioctl and swtpm_bios reach a daemon's sockets, and swtpm_ioctl's requests and replies on one."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import TypeVar

from crbd.control.client import ReplyDecoder
from crbd.control.messages import Failure, GetStateBlob, Reply, Request, encode_request
from crbd.control.spec import RESULT_SIZE
from crbd.errors import DaemonError, UsageError, WireError

Expected = TypeVar("Expected", bound=Reply)

PATIENCE = 20.0
"""Seconds for a connection or for an answer on the control channel: the TPM may be making a key."""
QUIET = 0.3
"""Seconds after which the 4 bytes of a refused GET_STATEBLOB are all of it (swtpm whose TPM is off sends no more)."""
LONGEST_PATH = 107
"""Bytes in the path of a UNIX socket."""


def connect_unix(path: str) -> socket.socket:
    """Connect to the socket at `path`. Raises OSError, and UsageError for a path that no socket can have."""
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError("Socket path is too long.")
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(PATIENCE)
    try:
        connected.connect(path)
    except OSError:
        connected.close()
        raise
    return connected


def connect_tcp(host: str, port: int) -> socket.socket:
    """Connect to the first of the host's addresses that lets us. Raises OSError; socket.gaierror: unknown host."""
    return socket.create_connection((host, port), PATIENCE)


class ControlClient:
    """One connection to a control channel, for one request after the other. It closes the socket at the end."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._decoder = ReplyDecoder()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, request: Request) -> Reply:
        """The reply, success or refusal.

        Raises OSError where there is none (TimeoutError after PATIENCE, ConnectionResetError if the daemon closed
        the connection) and WireError where the bytes are no reply.
        """
        deadline = time.monotonic() + PATIENCE
        self._decoder.expect(type(request))
        self._socket.settimeout(PATIENCE)
        self._socket.sendall(encode_request(request))
        received = 0
        while (reply := self._decoder.next_reply()) is None:
            maybe_over = isinstance(request, GetStateBlob) and received == RESULT_SIZE
            piece = self._read(QUIET if maybe_over else deadline - time.monotonic())
            if not piece:
                reply = self._decoder.next_reply(final=True)
                if reply is None:
                    raise self._no_reply(piece)
                return reply
            received += len(piece)
            self._decoder.receive(piece)
        return reply

    def _read(self, seconds: float) -> bytes | None:
        """What one read brings: nothing at the end of the stream, None if nothing comes in time."""
        self._socket.settimeout(max(seconds, 0.001))
        try:
            return self._socket.recv(1 << 16)
        except TimeoutError:
            return None

    @staticmethod
    def _no_reply(piece: bytes | None) -> OSError:
        number = errno.ETIMEDOUT if piece is None else errno.ECONNRESET
        return OSError(number, os.strerror(number))


def carry_out(
    client: ControlClient, request: Request, success: type[Expected], name: str, sent_as: str = ""
) -> Expected:
    """The reply to a request that succeeded. `name` is the request's in swtpm's words; `sent_as`, where they differ

    for a request that found no answer. Raises DaemonError, with the message of swtpm_ioctl.
    """
    try:
        reply = client.ask(request)
    except OSError as error:
        raise DaemonError(f"Could not execute {sent_as or name}: {error.strerror}") from error
    except WireError as error:
        raise DaemonError(f"Could not execute {sent_as or name}: {error}") from error
    if isinstance(reply, Failure):
        raise DaemonError(f"TPM result from {name}: 0x{reply.result:x}")
    if not isinstance(reply, success):
        raise DaemonError(f"Could not execute {sent_as or name}: the answer is to another request")
    return reply
