"""The data channel: who is the one client, and the pump that serves it.

One client at a time, whichever way it came: accepted from the listener, or handed over by SET_DATAFD. A second one on
the listener waits in the backlog; a second descriptor is refused, unless the first client is gone already and its
pump has only not noticed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from crbd.server.accepting import accept
from crbd.server.frost import Frost, FrozenError
from crbd.server.links import Links
from crbd.server.pump import FrozenPump, Pump
from crbd.service.instance import Instance
from crbd.state.handover import DataLink

HANDOVER_TIMEOUT = 5.0
"""Seconds to wait for the pump of a client that is gone to end (its last command may still compute)."""


class DataChannel:
    """The data side of one instance. `limit` is the largest command in bytes.

    Clients that `freeze` stops go into `frozen`. `once` closes each connection after its first answer; `gone` is called
    whenever a client is gone, whichever way it had come. `allowed` are the users whose clients are accepted, None for
    all.
    """

    def __init__(
        self,
        instance: Instance,
        limit: int,
        nursery: trio.Nursery,
        frozen: Links,
        *,
        once: bool = False,
        gone: Callable[[], None] | None = None,
        allowed: frozenset[int] | None = None,
    ) -> None:
        self._instance = instance
        self._limit = limit
        self._once = once
        self._gone = gone
        self._allowed = allowed
        self._nursery = nursery
        self._pump: Pump | None = None
        self._free = trio.Condition()
        self._frost = Frost()
        self._frozen = frozen

    def freeze(self) -> None:
        """Stop serving as soon as no command is under way. Descriptors can no longer be attached."""
        self._frost.fall()
        if self._pump is not None:
            self._pump.freeze()

    @property
    def idle(self) -> bool:
        """Whether no client is being served."""
        return self._pump is None

    async def stopped(self) -> None:
        """Return when no client is being served."""
        async with self._free:
            while self._pump is not None:
                await self._free.wait()

    async def serve_listener(self, listener: socket.socket) -> None:
        """Serve the clients of a listening socket one after the other, for ever."""
        accepting = trio.socket.from_stdlib_socket(listener)
        while not self._frost.fallen:
            try:
                with self._frost.point():
                    accepted = await accept(accepting, self._allowed)
            except FrozenError:
                return
            await self.serve_connected(_plain(accepted))

    async def serve_connected(
        self,
        connected: socket.socket,
        link: DataLink | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve one client until it is gone, as soon as no other one is being served.

        With `link` go on where another process stopped. The client has its place when the task has started, if there
        is one.
        """
        link = link or DataLink()
        try:
            with self._frost.point():
                async with self._free:
                    while self._pump is not None:
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                        await self._free.wait()
                    self._pump = self._new_pump(connected, link)
        except FrozenError:
            self._frozen.append((link, connected))
            return
        task_status.started()
        await self._run(self._pump)

    async def attach(self, descriptor: int) -> bool:
        """Take over a descriptor from SET_DATAFD.

        False, with the descriptor closed, if there is a data client already or it is no stream socket.
        """
        try:
            connected = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)
            return False
        if connected.type != socket.SOCK_STREAM or not await self._is_free():
            connected.close()
            return False
        self._pump = self._new_pump(connected, DataLink())
        self._nursery.start_soon(self._run, self._pump)
        return True

    async def _is_free(self) -> bool:
        with trio.move_on_after(HANDOVER_TIMEOUT):
            async with self._free:
                while self._pump is not None and self._pump.peer_is_gone():
                    await self._free.wait()
        return self._pump is None

    def _new_pump(self, connected: socket.socket, link: DataLink) -> Pump:
        connected.setblocking(False)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frozen = FrozenPump(link.received, link.unsent)
        return Pump(connected, self._instance.execute, self._instance.cancel, self._limit, frozen, once=self._once)

    async def _run(self, pump: Pump) -> None:
        if self._frost.fallen:
            pump.freeze()
        frozen = None
        try:
            frozen = await pump.run()
            if frozen is not None:
                # Before those that wait for its place.
                self._frozen.insert(0, (DataLink(frozen.received, frozen.unsent), pump.socket))
        finally:
            self._pump = None
            with trio.CancelScope(shield=True):
                async with self._free:
                    self._free.notify_all()
        if frozen is None and self._gone is not None:
            self._gone()


def _plain(accepted: trio.socket.SocketType) -> socket.socket:
    """The standard library's socket of a trio socket, which gives it up."""
    return socket.socket(fileno=accepted.detach())
