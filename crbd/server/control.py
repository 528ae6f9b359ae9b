"""The control channel: one client has it at a time, its requests are answered in order; crbd's own commands anybody
may send.

A request that has to wait for the TPM is carried out in a worker thread; one that must not wait (`while_executing` in
the table: above all CANCEL_TPM_CMD) is answered at once, on the loop. A client that stops in the middle of a request
is dropped; until then nothing of that request has reached the TPM.
"""

from __future__ import annotations

import array
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from enum import Enum

import trio

from crbd.control import messages as m
from crbd.control import spec
from crbd.control.connection import ControlConnection, Received, Rejected
from crbd.control.spec import BY_REQUEST
from crbd.server.accepting import accept
from crbd.server.frost import Frost, FrozenError
from crbd.server.links import Links
from crbd.service.control import ControlService
from crbd.state.handover import ControlLink
from crbd.tpm.results import TpmResult

log = logging.getLogger(__name__)

READ_SIZE = 64 * 1024
STALL_TIMEOUT = 0.5
"""Seconds for a whole request of ordinary size (swtpm's figure)."""
STALL_BYTES_PER_SECOND = 1024 * 1024
"""A request that declares a long body gets a second more for every so many bytes."""
SEND_TIMEOUT = 5.0
"""Seconds that a client may let a reply lie before it is dropped."""
MAX_CLIENTS = 16
"""Clients connected at once, all but one of them waiting; further ones wait in the backlog."""
MAX_DESCRIPTORS = 8
"""Descriptors taken in with one read; the kernel closes any beyond."""

_INT_SIZE = array.array("i").itemsize


class ControlChannel:
    """The control side of one instance.

    `attach` takes a descriptor from SET_DATAFD, which it owns from then on, and says whether it was taken. `shut_down`
    is called after SHUTDOWN has been answered. `gone` is called when a client is gone that had the channel, or that
    said nothing while nobody had it. `upgrade` answers UPGRADE: with what is in the way, or with None, and then frost
    falls; clients that it stops go into `frozen`. `allowed` are the users whose clients are accepted, None for all.
    """

    def __init__(
        self,
        service: ControlService,
        attach: Callable[[int], Awaitable[bool]],
        *,
        shut_down: Callable[[], None],
        upgrade: Callable[[], Awaitable[str | None]],
        frozen: Links,
        gone: Callable[[], None] | None = None,
        allowed: frozenset[int] | None = None,
    ) -> None:
        self._service = service
        self._attach = attach
        self._shut_down = shut_down
        self._upgrade = upgrade
        self._gone = gone
        self._allowed = allowed
        self._turn = trio.Lock()
        self.frost = Frost()
        self._frozen = frozen

    async def serve_listener(self, listener: socket.socket) -> None:
        """Serve the clients of a listening socket, for ever."""
        accepting = trio.socket.from_stdlib_socket(listener)
        places = trio.Semaphore(MAX_CLIENTS)
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    with self.frost.point():
                        await places.acquire()
                    with self.frost.point():
                        accepted = await accept(accepting, self._allowed)
                    nursery.start_soon(self._serve_at, places, accepted)
            except FrozenError:
                return

    async def _serve_at(self, places: trio.Semaphore, accepted: trio.socket.SocketType) -> None:
        try:
            await self.serve_connected(accepted)
        finally:
            places.release()

    async def serve_connected(
        self,
        connected: trio.socket.SocketType,
        link: ControlLink | None = None,
        owed: m.Reply | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve one client until it is gone or dropped: the socket is closed then. Or until frost falls.

        With `link` go on where another process stopped; `owed` answers its UPGRADE. A client that had its turn has it
        again when the task has started.
        """
        conversation = _Conversation(connected, self._turn, self._reply, self.frost)
        try:
            if link is not None:
                conversation.take_up(link, owed)
            task_status.started()
            if await conversation.run() is _End.SHUTDOWN:
                self._shut_down()
        except FrozenError:
            self._frozen.append(conversation.freeze())
            return
        except OSError as error:
            log.info("control connection broke: %s", error.strerror)
        finally:
            counted = conversation.counts
            conversation.close()
        if counted and self._gone is not None:
            self._gone()

    async def _reply(self, request: m.Request) -> m.Reply:
        if isinstance(request, m.SetDataFd):
            return m.Done() if await self._attach(request.fd) else m.Failure(TpmResult.IO_ERROR)
        if isinstance(request, m.Upgrade):
            in_the_way = await self._upgrade()
            if in_the_way is None:
                raise FrozenError
            return m.Outcome(done=False, text=in_the_way.encode()[: spec.MAX_OUTCOME])
        if BY_REQUEST[type(request)].while_executing:
            return self._service.answer(request)
        return await trio.to_thread.run_sync(self._service.answer, request)


class _End(Enum):
    """How a conversation ended."""

    CLIENT = "the client is gone, or dropped"
    SHUTDOWN = "SHUTDOWN was answered"


class _Conversation:
    """One client. Its first request that is not crbd's own waits for `turn`, which it then holds to its end."""

    def __init__(
        self,
        connected: trio.socket.SocketType,
        turn: trio.Lock,
        reply: Callable[[m.Request], Awaitable[m.Reply]],
        frost: Frost,
    ) -> None:
        self._connected = connected
        self._connection = ControlConnection()
        self._turn = turn
        self._has_turn = False
        self._spoke = False
        self._reply = reply
        self._frost = frost
        self._unsent = b""
        self._owed = False
        self._frozen = False

    def take_up(self, link: ControlLink, owed: m.Reply | None) -> None:
        """Go on where another conversation stopped; `owed` answers its UPGRADE, if it waits for that."""
        self._connection = ControlConnection.thaw(link.connection)
        self._unsent = link.unsent
        self._spoke = True
        if link.owed and owed is not None:
            self._unsent += m.encode_reply(owed)
        # Should two claim it, the second waits for it like everybody else.
        if link.has_turn and not self._turn.locked():
            self._turn.acquire_nowait()
            self._has_turn = True

    def freeze(self) -> tuple[ControlLink, socket.socket]:
        """Where it stopped, and its socket. Nothing is closed; the turn is free."""
        self._frozen = True
        link = ControlLink(self._connection.freeze(), self._unsent, self._has_turn, self._owed)
        connected = socket.socket(fileno=self._connected.detach())
        if self._has_turn:
            self._turn.release()
            self._has_turn = False
        return link, connected

    @property
    def counts(self) -> bool:
        """Whether this is the channel's client, rather than one that waits or that asks for crbd's own alone."""
        return self._has_turn or not (self._spoke or self._turn.locked())

    async def run(self) -> _End:
        """Read and answer. Raises OSError when the connection breaks, FrozenError when frost stops it."""
        deadline: float | None = None
        if self._unsent and not await self._send(b""):
            return _End.CLIENT
        while True:
            while (event := self._connection.next_event()) is not None:
                deadline = None
                end = await self._answer(event)
                if end is not None:
                    return end
            if not self._connection.partial:
                deadline = None
            elif deadline is None:
                deadline = trio.current_time() + STALL_TIMEOUT
            if not await self._read(deadline):
                return _End.CLIENT

    def close(self) -> None:
        """Close the socket and every descriptor that came and was not taken; give the turn to the next."""
        if self._frozen:
            return
        _close_all(self._connection.abandon())
        self._connected.close()
        if self._has_turn:
            self._turn.release()

    async def _read(self, deadline: float | None) -> bool:
        """Take in what the client sends next; False if it is gone, or too late with the rest of a request."""
        allowance = self._connection.declared_size / STALL_BYTES_PER_SECOND
        with trio.move_on_at(math.inf if deadline is None else deadline + allowance) as patience:
            with self._frost.point():
                data, descriptors = await _receive(self._connected)
        if patience.cancelled_caught:
            log.warning("control client stopped in the middle of a request; dropped")
            return False
        self._connection.receive(data, descriptors)
        _close_all(self._connection.unclaimed_fds())
        return bool(data)

    async def _answer(self, event: Received | Rejected) -> _End | None:
        """Answer; says how the conversation is over, if it is."""
        if isinstance(event, Rejected):
            log.warning("control request rejected: %s", event.reason)
            read = await self._send(m.encode_reply(m.Failure(event.result)))
            return None if read and not event.close else _End.CLIENT
        request = event.request
        self._spoke = True
        if not self._has_turn and not BY_REQUEST[type(request)].extension:
            try:
                with self._frost.point():
                    await self._turn.acquire()
                    self._has_turn = True
            except FrozenError:
                self._connection.put_back(event)
                raise
        self._owed = isinstance(request, m.Upgrade)
        reply = m.encode_reply(await self._reply(request))
        self._owed = False
        if isinstance(request, m.Shutdown):
            await self._send(reply, to_the_end=True)
            return _End.SHUTDOWN
        return None if await self._send(reply) else _End.CLIENT

    async def _send(self, reply: bytes, *, to_the_end: bool = False) -> bool:
        """Send a reply in one write where the client reads; False if it does not read at all.

        Raises FrozenError, with what was not sent in `_unsent`; not where it goes `to_the_end`, frost or not.
        """
        self._unsent += reply
        with trio.move_on_after(SEND_TIMEOUT) as patience:
            while self._unsent:
                with nullcontext() if to_the_end else self._frost.point():
                    self._unsent = self._unsent[await self._connected.send(self._unsent) :]
        if patience.cancelled_caught:
            log.warning("control client does not read its replies; dropped")
        return not patience.cancelled_caught


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


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
