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
from crbd.server.pump import Pump
from crbd.service.instance import Instance

HANDOVER_TIMEOUT = 5.0
"""Seconds to wait for the pump of a client that is gone to end (its last command may still compute)."""


class DataChannel:
    """The data side of one instance. `limit` is the largest command in bytes.

    `once` closes each connection after its first answer; `gone` is called whenever a client is gone, whichever way it
    had come.
    """

    def __init__(
        self,
        instance: Instance,
        limit: int,
        nursery: trio.Nursery,
        *,
        once: bool = False,
        gone: Callable[[], None] | None = None,
    ) -> None:
        self._instance = instance
        self._limit = limit
        self._once = once
        self._gone = gone
        self._nursery = nursery
        self._pump: Pump | None = None
        self._free = trio.Condition()

    async def serve_listener(self, listener: socket.socket) -> None:
        """Serve the clients of a listening socket one after the other, for ever."""
        accepting = trio.socket.from_stdlib_socket(listener)
        while True:
            await self.serve_connected(_plain(await accept(accepting)))

    async def serve_connected(self, connected: socket.socket) -> None:
        """Serve one client until it is gone, as soon as no other one is being served."""
        async with self._free:
            while self._pump is not None:
                await self._free.wait()
            self._pump = self._new_pump(connected)
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
        self._pump = self._new_pump(connected)
        self._nursery.start_soon(self._run, self._pump)
        return True

    async def _is_free(self) -> bool:
        with trio.move_on_after(HANDOVER_TIMEOUT):
            async with self._free:
                while self._pump is not None and self._pump.peer_is_gone():
                    await self._free.wait()
        return self._pump is None

    def _new_pump(self, connected: socket.socket) -> Pump:
        connected.setblocking(False)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Pump(connected, self._instance.execute, self._instance.cancel, self._limit, once=self._once)

    async def _run(self, pump: Pump) -> None:
        frozen = None
        try:
            frozen = await pump.run()
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
