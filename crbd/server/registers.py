"""The register channel: who is the one register client, and the pump that serves it.

One client at a time; a second one waits in the backlog. A client that goes leaves TPM, registers and config space as
they are, so that one that comes back finds them (vfio-user, "Client Disconnection"); a VMM that starts resets them.
"""

from __future__ import annotations

import socket

import trio

from crbd.server.accepting import accept
from crbd.server.frost import Frost, FrozenError
from crbd.server.links import Links
from crbd.server.register_buffer import RegisterBuffer
from crbd.server.register_pump import RegisterPump
from crbd.service.instance import Instance
from crbd.service.served import ServedRegisters
from crbd.state.handover import RegistersLink
from crbd.vfiouser.configuration import INITIAL
from crbd.vfiouser.connection import Snapshot


class RegisterChannel:
    """The register side of one instance. `frozen` takes the client that is stopped by `freeze`; `allowed` are the users
    whose clients are accepted, None for all."""

    def __init__(
        self,
        instance: Instance,
        registers: ServedRegisters,
        buffer: RegisterBuffer,
        frozen: Links,
        *,
        allowed: frozenset[int] | None = None,
    ) -> None:
        self._instance = instance
        self._registers = registers
        self._buffer = buffer
        self._frozen = frozen
        self._allowed = allowed
        self._configuration = INITIAL
        self._pump: RegisterPump | None = None
        self._free = trio.Condition()
        self._frost = Frost()

    def freeze(self) -> None:
        """Stop serving as soon as no command is under way."""
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
        try:
            while True:
                with self._frost.point():
                    await self.stopped()
                with self._frost.point():
                    accepted = await accept(accepting, self._allowed)
                fresh = RegistersLink(Snapshot(configuration=self._configuration))
                await self.serve_connected(socket.socket(fileno=accepted.detach()), fresh)
        except FrozenError:
            return

    async def serve_connected(
        self,
        connected: socket.socket,
        link: RegistersLink,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve one client until it is gone or frozen. There must be no other, or this raises RuntimeError.

        With a `link` of another process go on where that one stopped.
        """
        if self._pump is not None:
            raise RuntimeError("there is a register client already")
        connected.setblocking(False)
        pump = RegisterPump(
            connected,
            self._instance,
            self._registers,
            link,
            self._buffer.descriptor,
            mappable=self._buffer.mappable,
        )
        self._pump = pump
        task_status.started()
        if self._frost.fallen:
            pump.freeze()
        try:
            stopped_at = await pump.run()
            self._configuration = pump.configuration
            if stopped_at is not None:
                self._frozen.append((stopped_at, connected))
        finally:
            self._pump = None
            with trio.CancelScope(shield=True):
                async with self._free:
                    self._free.notify_all()
