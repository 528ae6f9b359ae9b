"""A daemon in this process, on real sockets, with the fake TPM in sight; and clients that speak to it in bytes."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import trio

from crbd.engine.fake import FakeEngine
from crbd.engine.port import Engine, StatePort
from crbd.server.daemon import serve
from crbd.server.endpoint import Endpoint, UnixEndpoint
from crbd.server.options import DaemonOptions
from crbd.server.succession import Program
from crbd.service.options import InstanceOptions
from crbd.store.memory import MemoryStore
from crbd.store.port import Store

PATIENCE = 10.0
"""Seconds after which something that should have happened is a failure."""


class Daemon:
    """A running daemon: its sockets, its engine, and whether it has ended."""

    def __init__(self, ctrl: Path, data: Path) -> None:
        self.ctrl = ctrl
        self.data = data
        self.engines: list[FakeEngine] = []
        self.ended = trio.Event()

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def make_engine(self, port: StatePort) -> Engine:
        self.engines.append(FakeEngine(port))
        return self.engines[-1]

    async def control(self) -> Client:
        return await Client.connect(self.ctrl)

    async def data_client(self) -> Client:
        return await Client.connect(self.data)


class Client:
    """A connected stream socket whose every wait has a deadline. `opened` are all that were made."""

    opened: ClassVar[list[Client]] = []

    def __init__(self, connected: trio.socket.SocketType) -> None:
        self.socket = connected
        self.opened.append(self)

    @classmethod
    async def connect(cls, path: Path) -> Client:
        connected = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await connected.connect(str(path))
        return cls(connected)

    async def send(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        with trio.fail_after(PATIENCE):
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            sent = await self.socket.sendmsg([data], ancillary)
            while sent < len(data):
                sent += await self.socket.send(data[sent:])

    async def receive(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end of the stream."""
        received = b""
        with trio.fail_after(PATIENCE):
            while len(received) < size and (piece := await self.socket.recv(size - len(received))):
                received += piece
        return received

    async def ask(self, data: bytes, size: int, descriptors: tuple[int, ...] = ()) -> bytes:
        await self.send(data, descriptors)
        return await self.receive(size)

    async def run(self, command: bytes) -> bytes:
        """A TPM command's whole response."""
        head = await self.ask(command, 10)
        return head + await self.receive(int.from_bytes(head[2:6], "big") - 10)

    async def at_end(self) -> bool:
        """Whether the daemon closes this connection without sending more."""
        try:
            return await self.receive(1) == b""
        except ConnectionResetError:
            return True

    def finish_sending(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def abandon(self) -> None:
        """Close without a running trio."""
        if self.socket.fileno() >= 0:
            os.close(self.socket.detach())


@asynccontextmanager
async def running(
    place: Path,
    options: InstanceOptions | None = None,
    *,
    data: Endpoint | None = None,
    ctrl: Endpoint | None = None,
    store: Store | None = None,
    program: Program | None = None,
) -> AsyncIterator[Daemon]:
    """A daemon with UNIX sockets `ctrl` and `data` in `place`, or the endpoints given; ended when the block is left."""
    daemon = Daemon(place / "ctrl", place / "data")
    daemon_options = DaemonOptions(
        ctrl=ctrl or UnixEndpoint(daemon.ctrl),
        data=data or UnixEndpoint(daemon.data),
        instance=options or InstanceOptions(may_manufacture=True),
    )
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            try:
                await serve(
                    daemon_options,
                    store or MemoryStore(),
                    daemon.make_engine,
                    program=program,
                    task_status=task_status,
                )
            finally:
                daemon.ended.set()

        await nursery.start(partial(run))
        try:
            yield daemon
        finally:
            nursery.cancel_scope.cancel()
