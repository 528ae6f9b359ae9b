"""The register pump: two threads that serve one vfio-user client over a socket.

Why two. The client must have its answer to every message within seconds (QEMU gives 5, and then the device is dead for
good), so no reply may wait for the TPM: one thread polls, reads and answers, the other one executes. A guest looks for
the end of a command right after it has started it, and then sleeps for about a millisecond. So the first thread, having
answered the write that started a command, waits for the second one a little before it reads on: a quick command is over
before the guest looks (docs/decisions/0007-register-pump.md).

The first thread polls the socket and an eventfd, which wakes it for the end and to be frozen. To freeze, it goes on
answering until the command under way is done; one that is started after that stays started, and the successor executes
it.

    POLLING    whole messages are dealt with as they come, in order
    WAITING    a command has just been started: for its end, at most GRACE
    ANSWERING  writes; a client that does not read is waited for
"""

from __future__ import annotations

import logging
import os
import queue
import select
import socket

import trio

from crbd.errors import EngineError, StateError, StoreError
from crbd.server.pump import PumpEndedError
from crbd.service.instance import Instance
from crbd.service.served import ServedRegisters
from crbd.state.handover import RegistersLink
from crbd.vfiouser.connection import Connection
from crbd.vfiouser.messages import Close, Event, Move, ReadRegisters, Reply, Reset, WriteRegisters
from crbd.vfiouser.spec import Errno

log = logging.getLogger(__name__)

READ_SIZE = 8 * 1024
"""Bytes; a message of a real client is far below, and a small buffer stays in the cache."""
GRACE = 0.005
"""Seconds that the client's next message may wait for a command. Short for a guest that waits for its answer, long for
all commands but those that make or use RSA keys."""


class RegisterPump:
    """Serves `connected`, a connected stream socket that it owns from now on, going on from `link`.

    `registers` are the instance's; `descriptor` is that of their data buffer, `mappable` whether a client may map it.
    """

    def __init__(
        self,
        connected: socket.socket,
        instance: Instance,
        registers: ServedRegisters,
        link: RegistersLink,
        descriptor: int,
        *,
        mappable: bool,
    ) -> None:
        self.socket = connected
        """Of the client."""
        self._instance = instance
        self._registers = registers
        self._connection = Connection(link.connection, mappable=mappable)
        self._unsent, self._with_buffer = link.unsent, link.with_buffer
        self._descriptor = descriptor
        self._wake = -1
        self._freezing = False
        self._stopping = False
        self._todo: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """True for each command that is to be executed, False for the end."""
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        """The numbers of the commands that are done."""
        self._started = 0
        self._finished = 0
        """The numbers of the last command that was given to the other thread, and of the last that came back."""

    @property
    def configuration(self) -> bytes:
        """The device's config space, which outlives a client."""
        return self._connection.freeze().configuration

    def freeze(self) -> None:
        """Let `run` return as soon as no command is under way. Called on the loop, while `run` runs or before."""
        self._freezing = True
        self._wake_up()

    async def run(self) -> RegistersLink | None:
        """Serve until the client closes, breaks the connection, or this task is cancelled: the socket is closed then.

        Or until `freeze`: the socket stays open, and what is returned is where a successor goes on.
        """
        frozen = None
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            log.error("a register client is turned away: %s", error.strerror)
            self.socket.close()
            return None
        if self._freezing:
            self._wake_up()
        ended = False
        try:
            async with trio.open_nursery() as nursery:

                async def stop_when_cancelled() -> None:
                    try:
                        await trio.sleep_forever()
                    finally:
                        if not ended:
                            self._stop()

                nursery.start_soon(stop_when_cancelled)
                # Shielded without a deadline: the wake-up ends the threads, and the engine's answer is always waited
                # for.
                with trio.CancelScope(shield=True):
                    frozen = await self._run_threads()
                ended = True
                nursery.cancel_scope.cancel()
        finally:
            os.close(self._wake)
            self._wake = -1
            if frozen is None:
                self.socket.close()
        return frozen

    async def _run_threads(self) -> RegistersLink | None:
        limiter = trio.CapacityLimiter(2)
        async with trio.open_nursery() as threads:

            async def execute() -> None:
                await trio.to_thread.run_sync(self._execute_all, limiter=limiter)

            threads.start_soon(execute)
            return await trio.to_thread.run_sync(self._serve, limiter=limiter)

    def _stop(self) -> None:
        self._stopping = True
        self._registers.cancel()
        self._wake_up()

    def _wake_up(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # -- in the thread that executes

    def _execute_all(self) -> None:
        try:
            while self._todo.get():
                self._instance.execute_started()
                self._finished_one()
        finally:
            # Whatever happened: without this thread the other one is of no use.
            self._stopping = True
            self._done.put(0)
            self._wake_up()

    def _finished_one(self) -> None:
        self._finished += 1
        self._done.put(self._finished)
        if self._freezing:
            self._wake_up()

    # -- in the thread that answers

    def _serve(self) -> RegistersLink | None:
        try:
            self._serve_until_closed()
        except PumpEndedError:
            if self._freezing and not self._stopping:
                self._wait_until_idle()
                return RegistersLink(self._connection.freeze(), self._unsent, self._with_buffer)
        except OSError as error:
            log.info("register connection broke: %s", error.strerror)
        finally:
            self._todo.put(False)
        return None

    def _serve_until_closed(self) -> None:
        unsent, self._unsent = self._unsent, b""
        if unsent:
            self._send(unsent, with_buffer=self._with_buffer)
        self._registers.relocate(self._connection.base)
        if self._registers.executing:
            self._start()
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        poll, receive, connection = poller.poll, self.socket.recv, self._connection
        while self._deal_with_all():
            for descriptor, _ in poll():
                if descriptor == self._wake:
                    self._heed_wake_up()
            try:
                # Without room for descriptors the kernel discards those that come along: there is none to be lost.
                data = receive(READ_SIZE)
            except BlockingIOError:
                continue
            if not data:
                return
            connection.receive(data)

    def _heed_wake_up(self) -> None:
        """Raises PumpEndedError if this is the end."""
        os.eventfd_read(self._wake)
        if self._stopping or (self._freezing and self._is_idle()):
            raise PumpEndedError

    def _deal_with_all(self) -> bool:
        """Deal with all that has been received whole; whether the connection goes on."""
        while (event := self._connection.next_event()) is not None:
            if not self._deal_with(event):
                return False
        return True

    def _deal_with(self, event: Event) -> bool:
        match event:
            case ReadRegisters(_, offset, size):
                self._send(event.reply(self._registers.read(offset, size)))
            case WriteRegisters(writes, reply):
                self._write(writes, reply)
            case Reply(data, with_buffer):
                self._send(data, with_buffer=with_buffer)
            case Move(base, writes, reply):
                self._registers.relocate(base)
                self._write(writes, reply)
            case Reset():
                self._reset(event)
            case Close(data, reason):
                log.warning("register client dropped: %s", reason)
                self._send(data)
                return False
        return True

    def _write(self, writes: tuple[tuple[int, bytes], ...], reply: bytes) -> None:
        started = self._registers.write(writes)
        if reply:
            self._send(reply)
        if started:
            self._start()

    def _reset(self, event: Reset) -> None:
        """Without a queue: the client waits for the reply, and what executes is cancelled first."""
        try:
            self._instance.reset()
            self._registers.relocate(0)
        except (EngineError, StateError, StoreError) as error:
            log.error("the TPM is off, since its reset failed: %s", error)
            self._send(event.head.failure(Errno.EIO))
        else:
            self._send(event.head.reply())

    # -- between the two

    def _start(self) -> None:
        """Have the command that was started executed, and wait for it a little. While freezing: leave it started."""
        if self._freezing:
            return
        self._started += 1
        self._todo.put(True)
        try:
            while self._done.get(timeout=GRACE) != self._started:
                pass
        except queue.Empty:
            return

    def _is_idle(self) -> bool:
        return self._finished == self._started

    def _wait_until_idle(self) -> None:
        while not (self._is_idle() or self._stopping):
            self._done.get()

    # -- sending

    def _send(self, data: bytes, *, with_buffer: bool = False) -> None:
        """One write where the client reads its answers.

        Raises OSError; PumpEndedError at the end, with the rest in `_unsent`.
        """
        rest = memoryview(data)
        poller: select.poll | None = None
        while rest:
            try:
                if with_buffer:
                    sent = socket.send_fds(self.socket, [rest], [self._descriptor])
                    with_buffer = False
                else:
                    sent = self.socket.send(rest)
                rest = rest[sent:]
            except BlockingIOError:
                if poller is None:
                    poller = select.poll()
                    poller.register(self.socket, select.POLLOUT)
                    poller.register(self._wake, select.POLLIN)
                if any(descriptor == self._wake for descriptor, _ in poller.poll()):
                    self._unsent, self._with_buffer = bytes(rest), with_buffer
                    raise PumpEndedError from None
