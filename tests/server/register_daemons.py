"""A daemon in this process that serves registers, beside its other channels; and guests that run in threads."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from crbd.engine.port import Engine, StatePort
from crbd.server.daemon import serve
from crbd.server.endpoint import UnixEndpoint
from crbd.server.options import DaemonOptions
from crbd.service.options import InstanceOptions, Startup
from crbd.store.memory import MemoryStore
from crbd.store.port import Store
from tests.vfiouser.vmm import PATIENCE

from .daemons import Daemon

T = TypeVar("T")


@asynccontextmanager
async def serving(
    place: Path,
    *,
    make_engine: Callable[[StatePort], Engine] | None = None,
    startup: Startup = Startup.CLEAR,
    store: Store | None = None,
) -> AsyncIterator[Daemon]:
    """A daemon with sockets `ctrl`, `data` and `registers` in `place`; ended when the block is left."""
    daemon = Daemon(place / "ctrl", place / "data")
    options = DaemonOptions(
        ctrl=UnixEndpoint(daemon.ctrl),
        data=UnixEndpoint(daemon.data),
        instance=InstanceOptions(startup=startup, may_manufacture=True, serves_registers=True),
        registers=UnixEndpoint(place / "registers"),
    )
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await serve(options, store or MemoryStore(), make_engine or daemon.make_engine, task_status=task_status)

        await nursery.start(run)
        try:
            yield daemon
        finally:
            nursery.cancel_scope.cancel()


async def in_thread(work: Callable[[], T]) -> T:
    """What blocks, beside the daemon."""
    with trio.fail_after(2 * PATIENCE):
        return await trio.to_thread.run_sync(work)


class Blocking:
    """A control or data client that blocks, as a VMM does."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size and (piece := self.socket.recv(size - len(received))):
            received += piece
        return received

    def ask(self, request: bytes, size: int) -> bytes:
        self.socket.sendall(request)
        return self.receive(size)

    def run(self, command: bytes) -> bytes:
        """A TPM command's whole response."""
        self.socket.sendall(command)
        return self.response()

    def response(self) -> bytes:
        head = self.receive(10)
        return head + self.receive(int.from_bytes(head[2:6], "big") - 10)
