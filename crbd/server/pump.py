"""The pump: one thread that serves one hot connection over a socket.

Why a thread. A round trip through a thread that blocks in poll costs half of one on the trio loop, and a command that
computes for seconds does not keep the loop from answering control commands (docs/decisions/0001-pump-threads.md).

The thread polls the socket and an eventfd. The eventfd wakes it for the end: cancellation of the task that owns the
pump asks the TPM to give up its command, wakes the thread and waits for it. The thread is never abandoned: it may
hold the engine lock.

The same eventfd wakes it to be frozen: then a command under way is finished and answered, and what is neither in the
kernel any more nor dealt with yet comes out as a value, with which another pump, perhaps in another process, goes on.

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
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class FrozenPump:
    """What a pump had taken from its client and not dealt with, and what it had for the client and not sent."""

    received: bytes = b""
    unsent: bytes = b""


class Pump:
    """Serves TPM commands on `connected`, a connected stream socket that it owns from now on.

    `answer` runs a command (blocking, in the pump's thread); `cancel` asks it to give up. `limit` is the largest
    command in bytes. `frozen` is where the pump before this one stopped. `once` closes the connection
    after one answer (swtpm's `disconnect`).
    """

    def __init__(
        self,
        connected: socket.socket,
        answer: Answer,
        cancel: Callable[[], None],
        limit: int,
        frozen: FrozenPump | None = None,
        *,
        once: bool = False,
    ) -> None:
        self._once = once
        self._socket = connected
        self._answer = answer
        self._cancel = cancel
        frozen = frozen or FrozenPump()
        self._limit = limit
        self._connection = DataConnection(limit, frozen.received)
        self._unsent = frozen.unsent
        self._wake = -1
        self._freezing = False
        self._closing = False
        """The client has been told that its connection ends: nothing of it is carried on."""
        self._ended = False

    @property
    def socket(self) -> socket.socket:
        """Of the client."""
        return self._socket

    def freeze(self) -> None:
        """Let `run` return as soon as no command is under way. Called on the loop, while `run` runs or before."""
        self._freezing = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def peer_is_gone(self) -> bool:
        """Whether the other end has closed the connection, though the pump may not have come to see it. Any thread."""
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return any(happened & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, happened in poller.poll(0))

    async def run(self) -> FrozenPump | None:
        """Serve until the client closes, breaks the connection, or this task is cancelled: the socket is closed then.

        Or until `freeze`: the socket stays open, and what is returned is where a successor goes on.
        """
        try:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            log.error("a data client is turned away: %s", error.strerror)
            self._socket.close()
            return None
        frozen = None
        self._wake = wake
        if self._freezing:
            os.eventfd_write(wake, 1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wake_when_cancelled, wake)
                # Shielded without a deadline: the wake-up ends the thread, and the engine's answer is always waited
                # for.
                with trio.CancelScope(shield=True):
                    frozen = await trio.to_thread.run_sync(self._serve, wake, limiter=trio.CapacityLimiter(1))
                self._ended = True
                nursery.cancel_scope.cancel()
        finally:
            self._wake = -1
            os.close(wake)
            if frozen is None:
                self._socket.close()
        return frozen

    def serve_until(self, call: int) -> FrozenPump | None:
        """Serve in this thread until the descriptor `call` can be read; where a successor goes on, or None where the
        client is gone.
        """
        self._freezing = True
        return self._serve(call)

    async def _wake_when_cancelled(self, wake: int) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not self._ended:
                self._cancel()
                os.eventfd_write(wake, 1)

    # -- in the thread
    # -----------------------------------------------------------------------------------------------------

    def _serve(self, wake: int) -> FrozenPump | None:
        try:
            if self._go_on(wake):
                self._serve_until_closed(wake)
        except PumpEndedError:
            if self._freezing and not self._closing:
                return FrozenPump(self._connection.held, self._unsent)
        except OSError as error:
            log.info("data connection broke: %s", error.strerror)
        return None

    def _serve_until_closed(self, wake: int) -> None:
        # Every name that the way of a quick command touches is local, and a read that is just one command does not take
        # the road through the connection: each microsecond here is one of every TPM command.
        poll, receive, send = self._poller(wake).poll, self._socket.recv, self._socket.send
        answer, limit, once = self._answer, self._limit, self._once
        connection = self._connection
        deadline = time.monotonic() + STALL_TIMEOUT if connection.partial else None
        while True:
            # None waits for ever; milliseconds, and never 0 before the deadline is truly over.
            ready = poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000 + 1)
            if len(ready) != 1 or ready[0][0] == wake:
                if ready:
                    raise PumpEndedError
                self._close(connection.stalled(), wake)
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
                if once:
                    self._say_no_more(wake)
                    return
                continue
            if not data:
                return
            connection.receive(data)
            answered = self._answer_all(wake)
            if answered is None:
                return
            if not connection.partial:
                deadline = None
            elif answered or deadline is None:
                deadline = time.monotonic() + STALL_TIMEOUT

    def _go_on(self, wake: int) -> bool:
        """Take up what the pump before this one left; false if the connection has come to its end with it."""
        unsent, self._unsent = self._unsent, b""
        if unsent:
            self._send(unsent, wake)
        return self._answer_all(wake) is not None

    def _answer_all(self, wake: int) -> int | None:
        """Answer what has been received whole; how many commands it was, or None where the connection was closed."""
        answered = 0
        while (event := self._connection.next_event()) is not None:
            answered += 1
            if isinstance(event, Command):
                self._send(event.frame(self._answer(event.body, event.locality)), wake)
            elif event.close:
                self._close(event, wake)
                return None
            else:
                self._send(event.answer, wake)
            if self._once:
                self._say_no_more(wake)
                return None
        return answered

    def _close(self, last: Malformed, wake: int) -> None:
        self._closing = True
        self._send(last.answer, wake)
        self._linger(wake)

    def _say_no_more(self, wake: int) -> None:
        self._closing = True
        self._linger(wake)

    def _poller(self, wake: int) -> select.poll:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(wake, select.POLLIN)
        return poller

    def _send(self, data: bytes, wake: int) -> None:
        """One write where the client reads its answers. Raises OSError; PumpEndedError, with the rest in `_unsent`."""
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
                self._unsent = bytes(rest)
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
