"""The pump: one thread that serves one hot connection over a socket.

Why a thread. A round trip through a thread that blocks in poll costs half of one on the trio loop, and a command that
computes for seconds does not keep the loop from answering control commands (docs/decisions/0001-pump-threads.md).

The thread polls the socket and an eventfd. The eventfd wakes it for the end: cancellation of the task that owns the
pump asks the TPM to give up its command, wakes the thread and waits for it. The thread is never abandoned: it may
hold the engine lock.

    IDLE       nothing received, or all of it answered: polls without a limit
    PARTIAL    a command has begun: polls until its deadline, then answers as `stalled` says
    ANSWERING  writes; a client that does not read is waited for, without the engine lock
    CLOSING    says no more, reads what still comes for a bounded time (so that TCP does not reset away the last
    answer), closes
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable

import trio

from crbd.tpm.framing import Command, DataConnection, Malformed
from crbd.tpm.head import HEAD_SIZE

log = logging.getLogger(__name__)

READ_SIZE = 8 * 1024
"""Bytes; the largest command fits, and a small buffer stays in the cache."""
STALL_TIMEOUT = 2.0
"""Seconds that a command may take from its first to its last byte."""
LINGER_TIMEOUT = 0.5
"""Seconds for which a connection that is being closed is still read."""

Answer = Callable[[bytes, int | None], bytes]
"""Runs a command on behalf of a locality (None: of the one that counts at the moment) and returns its response."""


class PumpEndedError(Exception):
    """The pump is to end now."""


class Pump:
    """Serves TPM commands on `connected`, a connected stream socket that it owns from now on.

    `answer` runs a command (blocking, in the pump's thread); `cancel` asks it to give up. `limit` is the largest
    command in bytes.
    """

    def __init__(self, connected: socket.socket, answer: Answer, cancel: Callable[[], None], limit: int) -> None:
        self._socket = connected
        self._answer = answer
        self._cancel = cancel
        self._limit = limit

    def peer_is_gone(self) -> bool:
        """Whether the other end has closed the connection, though the pump may not have come to see it. Any thread."""
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return any(happened & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, happened in poller.poll(0))

    async def run(self) -> None:
        """Serve until the client closes, breaks the connection, or this task is cancelled.

        The socket is closed then.
        """
        try:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            log.error("a data client is turned away: %s", error.strerror)
            self._socket.close()
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wake_when_cancelled, wake)
                # Shielded without a deadline: the wake-up ends the thread, and the engine's answer is always waited
                # for.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._serve, wake, limiter=trio.CapacityLimiter(1))
                nursery.cancel_scope.cancel()
        finally:
            self._socket.close()
            os.close(wake)

    async def _wake_when_cancelled(self, wake: int) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._cancel()
            os.eventfd_write(wake, 1)

    # -- in the thread
    # -----------------------------------------------------------------------------------------------------

    def _serve(self, wake: int) -> None:
        try:
            self._serve_until_closed(wake)
        except PumpEndedError:
            return
        except OSError as error:
            log.info("data connection broke: %s", error.strerror)

    def _serve_until_closed(self, wake: int) -> None:
        # Every name that the way of a quick command touches is local, and a read that is just one command does not take
        # the road through the connection: each microsecond here is one of every TPM command.
        poll, receive, send = self._poller(wake).poll, self._socket.recv, self._socket.send
        answer, limit = self._answer, self._limit
        connection = DataConnection(limit)
        deadline: float | None = None
        while True:
            # None waits for ever; milliseconds, and never 0 before the deadline is truly over.
            ready = poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000 + 1)
            if len(ready) != 1 or ready[0][0] == wake:
                if ready:
                    raise PumpEndedError
                self._send(connection.stalled().answer, wake)
                self._linger(wake)
                return
            try:
                data = receive(READ_SIZE)
            except BlockingIOError:
                continue
            # One plain command in one read: what every real client sends. (Nothing that begins with the send-command
            # header passes: what stands where a size would be is far above any limit.)
            size = len(data)
            if deadline is None and HEAD_SIZE <= size <= limit and data[2:6] == size.to_bytes(4, "big"):
                response = answer(data, None)
                try:
                    sent = send(response)
                except BlockingIOError:
                    sent = 0
                if sent != len(response):
                    self._send(response[sent:], wake)
                continue
            if not data:
                return
            events = connection.receive(data)
            if not self._answer_all(events, wake):
                self._linger(wake)
                return
            if not connection.partial:
                deadline = None
            elif events or deadline is None:
                deadline = time.monotonic() + STALL_TIMEOUT

    def _answer_all(self, events: tuple[Command | Malformed, ...], wake: int) -> bool:
        """False if the connection is to be closed."""
        for event in events:
            if isinstance(event, Malformed):
                self._send(event.answer, wake)
                if event.close:
                    return False
            else:
                self._send(event.frame(self._answer(event.body, event.locality)), wake)
        return True

    def _poller(self, wake: int) -> select.poll:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(wake, select.POLLIN)
        return poller

    def _send(self, data: bytes, wake: int) -> None:
        """One write where the client reads its answers. Raises OSError, PumpEndedError."""
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        poller.register(wake, select.POLLIN)
        rest = memoryview(data)[sent:]
        while rest:
            if any(descriptor == wake for descriptor, _ in poller.poll()):
                raise PumpEndedError
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                continue

    def _linger(self, wake: int) -> None:
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_TIMEOUT
        poller = self._poller(wake)
        while (patience := deadline - time.monotonic()) > 0:
            ready = poller.poll(patience * 1000)
            if not ready or any(descriptor == wake for descriptor, _ in ready) or not self._socket.recv(READ_SIZE):
                return
