"""The control channel: one client at a time, its requests answered in order.

A request that has to wait for the TPM is carried out in a worker thread; one that must not wait (`while_executing` in
the table: above all CANCEL_TPM_CMD) is answered at once, on the loop. A client that stops in the middle of a request
is dropped; until then nothing of that request has reached the TPM.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Awaitable, Callable

import trio

from crbd.control import messages as m
from crbd.control.connection import ControlConnection, Received, Rejected
from crbd.control.spec import BY_REQUEST
from crbd.service.control import ControlService
from crbd.tpm.results import TpmResult

log = logging.getLogger(__name__)

READ_SIZE = 64 * 1024
STALL_TIMEOUT = 0.5
"""Seconds for a whole request of ordinary size (swtpm's figure)."""
STALL_BYTES_PER_SECOND = 1024 * 1024
"""A request that declares a long body gets a second more for every so many bytes."""
SEND_TIMEOUT = 5.0
"""Seconds that a client may let a reply lie before it is dropped."""
MAX_DESCRIPTORS = 8
"""Descriptors taken in with one read; the kernel closes any beyond."""

_INT_SIZE = array.array("i").itemsize


class ControlChannel:
    """The control side of one instance.

    `attach` takes a descriptor from SET_DATAFD, which it owns from then on, and says whether it was taken.
    `shut_down` is called after SHUTDOWN has been answered.
    """

    def __init__(
        self, service: ControlService, attach: Callable[[int], Awaitable[bool]], shut_down: Callable[[], None]
    ) -> None:
        self._service = service
        self._attach = attach
        self._shut_down = shut_down

    async def serve_listener(self, listener: socket.socket) -> None:
        """Serve the clients of a listening socket one after the other, for ever."""
        accepting = trio.socket.from_stdlib_socket(listener)
        while True:
            accepted, _ = await accepting.accept()
            await self.serve_connected(accepted)

    async def serve_connected(self, connected: trio.socket.SocketType) -> None:
        """Serve one client until it is gone or dropped. The socket is closed then."""
        connection = ControlConnection()
        try:
            await self._converse(connected, connection)
        except OSError as error:
            log.info("control connection broke: %s", error.strerror)
        finally:
            _close_all(connection.abandon())
            connected.close()

    async def _converse(self, connected: trio.socket.SocketType, connection: ControlConnection) -> None:
        deadline: float | None = None
        while True:
            while (event := connection.next_event()) is not None:
                deadline = None
                if not await self._answer_event(connected, event):
                    return
            if not connection.partial:
                deadline = None
            elif deadline is None:
                deadline = trio.current_time() + STALL_TIMEOUT
            allowance = connection.declared_size / STALL_BYTES_PER_SECOND
            with trio.move_on_at(float("inf") if deadline is None else deadline + allowance) as patience:
                data, descriptors = await _receive(connected)
            if patience.cancelled_caught:
                log.warning("control client stopped in the middle of a request; dropped")
                return
            if not data:
                _close_all(descriptors)
                return
            connection.receive(data, descriptors)
            _close_all(connection.unclaimed_fds())

    async def _answer_event(self, connected: trio.socket.SocketType, event: Received | Rejected) -> bool:
        """Answer; False if the conversation is over."""
        if isinstance(event, Rejected):
            log.warning("control request rejected: %s", event.reason)
            return await _send(connected, m.encode_reply(m.Failure(event.result))) and not event.close
        request = event.request
        sent = await _send(connected, m.encode_reply(await self._reply(request)))
        if isinstance(request, m.Shutdown):
            self._shut_down()
            return False
        return sent

    async def _reply(self, request: m.Request) -> m.Reply:
        if isinstance(request, m.SetDataFd):
            return m.Done() if await self._attach(request.fd) else m.Failure(TpmResult.IO_ERROR)
        if BY_REQUEST[type(request)].while_executing:
            return self._service.answer(request)
        return await trio.to_thread.run_sync(self._service.answer, request)


async def _receive(connected: trio.socket.SocketType) -> tuple[bytes, tuple[int, ...]]:
    """Bytes and the descriptors that came with them."""
    data, ancillary, _, _ = await connected.recvmsg(
        READ_SIZE, socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % _INT_SIZE])
    return data, tuple(descriptors)


async def _send(connected: trio.socket.SocketType, reply: bytes) -> bool:
    """Send a reply in one write where the client reads; False if it does not read at all."""
    rest = memoryview(reply)
    with trio.move_on_after(SEND_TIMEOUT) as patience:
        while rest:
            rest = rest[await connected.send(rest) :]
    if patience.cancelled_caught:
        log.warning("control client does not read its replies; dropped")
    return not patience.cancelled_caught


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
