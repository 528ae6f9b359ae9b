"""One request to a running daemon over its control socket."""

from __future__ import annotations

import socket

from crbd.control.client import ReplyDecoder
from crbd.control.messages import Failure, Reply, Request, encode_request
from crbd.errors import DaemonError, UsageError, WireError
from crbd.server.endpoint import DescriptorEndpoint, Endpoint, TcpEndpoint

TIMEOUT = 10.0
"""Seconds that the daemon may take for an answer."""


def ask(endpoint: Endpoint, request: Request, patience: float = TIMEOUT) -> Reply:
    """The daemon's reply to a request, success or not, for which it may take `patience` seconds.

    Raises DaemonError where there is none, UsageError for fd:.
    """
    decoder = ReplyDecoder()
    decoder.expect(type(request))
    try:
        with _connect(endpoint) as connected:
            connected.settimeout(patience)
            connected.sendall(encode_request(request))
            while (reply := decoder.next_reply()) is None:
                piece = connected.recv(1 << 16)
                decoder.receive(piece)
                if not piece:
                    reply = decoder.next_reply(final=True)
                    break
    except TimeoutError as error:
        raise DaemonError(
            f"no answer from {endpoint} within {patience:.0f} s", "is it a crbd's control socket?"
        ) from error
    except OSError as error:
        raise DaemonError(f"{endpoint}: {error.strerror}", "name the control socket of a running crbd") from error
    except WireError as error:
        raise DaemonError(f"{endpoint} answered with something else: {error}", "is it a control socket?") from error
    if reply is None:
        raise DaemonError(f"{endpoint} closed the connection", "is it a crbd's control socket?")
    return reply


def unknown_to(endpoint: Endpoint, what: str, reply: Reply) -> DaemonError:
    """The error for a daemon that refuses a command of crbd's own: it is swtpm, or an older crbd."""
    result = f"0x{reply.result:x}" if isinstance(reply, Failure) else type(reply).__name__
    return DaemonError(
        f"the daemon at {endpoint} does not answer {what} ({result})", "it must be crbd, of this release or newer"
    )


def _connect(endpoint: Endpoint) -> socket.socket:
    match endpoint:
        case DescriptorEndpoint():
            raise UsageError(f"{endpoint} cannot be connected to", "give unix:PATH or tcp:HOST:PORT")
        case TcpEndpoint(host, port):
            return socket.create_connection((host, port), TIMEOUT)
        case _:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connected.settimeout(TIMEOUT)
            try:
                connected.connect(str(endpoint.path))
            except OSError:
                connected.close()
                raise
            return connected
