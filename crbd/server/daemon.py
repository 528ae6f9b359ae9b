"""The daemon: one TPM, its endpoints, and how they begin, end and pass to a successor.

Order at the start: state is locked and looked at, sockets are opened, the TPM is powered on if the options say so,
then clients are served. What fails on the way takes back what came before it: a start that fails leaves no socket and
no lock behind. At the end: the pump is told to finish (its command is cancelled), the sockets are removed, the TPM is
shut down, the lock is released, the pid file is removed.

A daemon that leaves its clients to a service manager (crbd.server.fdstore) stops serving as one that is upgraded, shuts
the TPM down and ends; it removes no socket that its successor will listen on.

A daemon that is upgraded (crbd.server.succession) stops serving without any of that: first the control clients, whose
requests may need the TPM, then the data clients. Where becoming the new program fails after all, the same daemon serves
the same clients on. A daemon that is the new program begins by going on: no socket is opened, no TPM powered on.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial

import trio

from crbd import __version__
from crbd.control.messages import Outcome
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, HandoverError, StateError, StoreError
from crbd.server.checkpoints import keep_checkpoints
from crbd.server.control import ControlChannel
from crbd.server.data import DataChannel
from crbd.server.endpoint import DescriptorEndpoint
from crbd.server.fdstore import leave
from crbd.server.links import Links
from crbd.server.options import DaemonOptions
from crbd.server.premises import Premises
from crbd.server.pump import FrozenPump, Pump
from crbd.server.registers import RegisterChannel
from crbd.server.succession import KEPT_SIGNALS, Inheritance, Program, listen_to_kept_signals
from crbd.server.supervision import keep_watchdog, tell_ending, tell_ready, tell_upgrading
from crbd.service.control import ControlService
from crbd.service.instance import Instance
from crbd.state.handover import ControlLink, DataLink, Handover, RegistersLink, encode
from crbd.store.port import Store

log = logging.getLogger(__name__)

WRITER = f"crbd {__version__}"
COMMAND_PATIENCE = 30.0
"""Seconds that an upgrade waits for a command under way before it asks the TPM to give it up."""
CANCEL_INTERVAL = 0.1
"""Seconds between two such requests."""
OPTION = {"ctrl": "--ctrl", "data": "--data", "registers": "--registers"}


async def serve(
    options: DaemonOptions,
    store: Store,
    make_engine: Callable[[StatePort], Engine],
    *,
    program: Program | None = None,
    inherited: Inheritance | None = None,
    ready: Callable[[], None] | None = None,
    wall_in: Callable[[], None] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve one TPM until SHUTDOWN or a signal ends it. `store` is locked; it is closed at the end, whatever happens.

    `program` is what an upgrade starts; without it there is none. `inherited` is what another process leaves to this
    one. `ready` is called once, when clients are served: the sockets listen, the pid file is written. `wall_in` is
    called once before that, when all of it is open and no thread runs yet; what it raises ends the start.

    Raises OperatorError when the start fails.
    """
    # Signals count from the first moment: one that comes during the start ends the daemon when that is done.
    with trio.open_signal_receiver(*KEPT_SIGNALS) as signals:
        listen_to_kept_signals()
        with closing(Premises(options, store, make_engine, inherited)) as premises:
            await _serve(premises, signals, program, ready=ready, wall_in=wall_in, task_status=task_status)
    log.info("ended")


async def serve_in(
    premises: Premises,
    *,
    program: Program | None = None,
    ready: Callable[[], None] | None = None,
    wall_in: Callable[[], None] | None = None,
) -> None:
    """As `serve`, where everything is open already; it is closed at the end. KEPT_SIGNALS are blocked until now."""
    with trio.open_signal_receiver(*KEPT_SIGNALS) as signals, closing(premises):
        listen_to_kept_signals()
        await _serve(premises, signals, program, ready=ready, wall_in=wall_in)
    log.info("ended")


async def _serve(
    premises: Premises,
    signals: AsyncIterator[int],
    program: Program | None,
    *,
    ready: Callable[[], None] | None,
    wall_in: Callable[[], None] | None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    options, daemon = premises.options, _Daemon(premises, program)
    if wall_in is not None:
        wall_in()
    async with trio.open_nursery() as watching:
        ended = trio.CancelScope()
        watching.start_soon(_heed, signals, daemon, ended)
        watching.start_soon(keep_checkpoints, daemon.instance)
        with ended:
            log.info("serving the TPM in %s%s", premises.store.name, daemon.where)
            if options.supervised:
                watching.start_soon(keep_watchdog, daemon.instance.take_a_turn)
                tell_ready(daemon.doing)
            if ready is not None:
                ready()
            task_status.started()
            # Ends by itself only where every client was handed over connected and the last one is gone.
            while await daemon.serve_until_frozen() and daemon.hand_over():
                pass
        if options.supervised:
            tell_ending("shutting the TPM down")
        # A second signal is no reason to leave the TPM without its shutdown.
        premises.close()
        watching.cancel_scope.cancel()


async def _heed(signals: AsyncIterator[int], daemon: _Daemon, scope: trio.CancelScope) -> None:
    async with trio.open_nursery() as upgrades:
        async for number in signals:
            if number == signal.SIGHUP and daemon.upgrades_at_hangup:
                upgrades.start_soon(_upgrade, daemon)
            else:
                log.info("ending at %s", signal.Signals(number).name)
                if number != signal.SIGTERM or not daemon.leave():
                    scope.cancel()


async def _upgrade(daemon: _Daemon) -> None:
    in_the_way = await daemon.upgrade()
    if in_the_way is not None:
        log.error("the upgrade is not done, and the TPM goes on as before: %s", in_the_way)


class _Daemon:
    """The clients of one TPM, and what becomes of them."""

    def __init__(self, premises: Premises, program: Program | None) -> None:
        self._premises = premises
        self._options = premises.options
        self._store = premises.store
        self._instance = premises.instance
        self._endpoints = premises.endpoints
        self._buffer = premises.buffer
        self._program = program
        self._answer: Outcome | None = premises.answer
        """For the client that asked for an upgrade."""
        self._freeze: Callable[[], None] | None = None
        self._upgrading = trio.Lock()
        self._leaving = False

    @property
    def where(self) -> str:
        """The endpoints, for the log."""
        return "".join(f" at {each.endpoint}" for each in self._endpoints.values())

    @property
    def doing(self) -> str:
        """What it does, for the service manager."""
        return f"serving the TPM in {self._store.name}{self.where}"

    @property
    def upgrades_at_hangup(self) -> bool:
        """What SIGHUP means."""
        return self._options.upgrade_at_hangup

    @property
    def instance(self) -> Instance:
        """The TPM."""
        return self._instance

    # -- serving

    async def serve_until_frozen(self) -> bool:
        """Serve until the daemon is to end (false), or until its clients are frozen for an upgrade (true)."""
        options, ending = self._options, trio.Event()
        controls_over = trio.Event()

        async with trio.open_nursery() as tasks:

            def end() -> None:
                ending.set()
                tasks.cancel_scope.cancel()

            links, frozen = self._premises.take_links()
            data = DataChannel(
                self._instance,
                self._instance.buffer_size(0).maximum,
                tasks,
                frozen,
                once=options.disconnect,
                gone=end if options.end_with_data_client else None,
                allowed=options.allowed_users,
            )
            control = ControlChannel(
                ControlService(self._instance),
                data.attach,
                shut_down=end,
                upgrade=self.upgrade,
                frozen=frozen,
                gone=end if options.end_with_ctrl_client else None,
                allowed=options.allowed_users,
            )

            registers = self._register_channel(frozen)

            def freeze() -> None:
                if not control.frost.fallen:
                    control.frost.fall()
                    tasks.start_soon(self._freeze_data, data, registers, controls_over)

            self._freeze = freeze
            await self._start_links(links, data, control, tasks)
            if registers is not None:
                await self._start_registers(links, registers, tasks)
            async with trio.open_nursery() as control_tasks:
                await self._start_controls(links, control, control_tasks)
            controls_over.set()
        self._freeze = None
        return control.frost.fallen and not ending.is_set()

    async def _start_links(
        self, links: Links, data: DataChannel, control: ControlChannel, nursery: trio.Nursery
    ) -> None:
        for link, connected in links:
            if isinstance(link, DataLink):
                await nursery.start(data.serve_connected, connected, link)
        if (listener := self._endpoints.get("data")) is not None and listener.listening:
            nursery.start_soon(data.serve_listener, listener.socket)

    def _register_channel(self, frozen: Links) -> RegisterChannel | None:
        served = self._instance.served
        if self._buffer is None or served is None:
            return None
        allowed = self._options.allowed_users
        return RegisterChannel(self._instance, served, self._buffer, frozen, allowed=allowed)

    async def _start_registers(self, links: Links, registers: RegisterChannel, nursery: trio.Nursery) -> None:
        for link, connected in links:
            if isinstance(link, RegistersLink):
                await nursery.start(registers.serve_connected, connected, link)
        if (listener := self._endpoints.get("registers")) is not None and listener.listening:
            nursery.start_soon(registers.serve_listener, listener.socket)

    async def _start_controls(self, links: Links, control: ControlChannel, nursery: trio.Nursery) -> None:
        controls = [(link, connected) for link, connected in links if isinstance(link, ControlLink)]
        # Whoever has the channel first: the others wait for it.
        for link, connected in sorted(controls, key=lambda each: not each[0].has_turn):
            talking = trio.socket.from_stdlib_socket(connected)
            await nursery.start(control.serve_connected, talking, link, self._answer)
        self._answer = None
        if (listener := self._endpoints.get("ctrl")) is not None and listener.listening:
            nursery.start_soon(control.serve_listener, listener.socket)

    async def _freeze_data(
        self, data: DataChannel, registers: RegisterChannel | None, controls_over: trio.Event
    ) -> None:
        """When no request needs the TPM any more, stop the clients that run commands; one that computes too long gives
        up. Register clients last: they have their answers until then."""
        channels: list[DataChannel | RegisterChannel] = [data]
        if registers is not None:
            channels.append(registers)
        async with self._patience():
            await controls_over.wait()
            for channel in channels:
                channel.freeze()
                await channel.stopped()

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """What is waited for inside may wait for a TPM command: one that takes too long is cancelled.

        Nothing may be raised inside: a nursery would wrap it.
        """
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lose_patience, scope)
            try:
                yield
            finally:
                scope.cancel()

    async def _lose_patience(self, scope: trio.CancelScope) -> None:
        with scope:
            await self._cancel_commands()

    async def _cancel_commands(self) -> None:
        await trio.sleep(COMMAND_PATIENCE)
        log.warning("a command takes more than %.0f s and is cancelled, for the upgrade", COMMAND_PATIENCE)
        while True:
            self._instance.cancel()
            await trio.sleep(CANCEL_INTERVAL)

    # -- the upgrade

    async def upgrade(self) -> str | None:
        """See whether the installed program can go on, and if so stop serving; what is in the way, if anything is."""
        if self._program is None:
            return (
                "this process does not know what to start (after a change of the root directory, --pcap, --no-upgrade)"
            )
        if self._upgrading.locked():
            return "an upgrade is under way"
        async with self._upgrading:
            if self._options.supervised:
                tell_upgrading()
            in_the_way = await self._try_upgrade(self._program)
            if in_the_way is not None and self._options.supervised:
                tell_ready(self.doing)
            return in_the_way

    async def _try_upgrade(self, program: Program) -> str | None:
        async with self._patience():
            handover = await trio.to_thread.run_sync(self._handover_or_reason)
        if isinstance(handover, str):
            return handover
        # Abandoned when the daemon is to end: the trial ends by itself.
        in_the_way = await trio.to_thread.run_sync(program.try_out, handover, abandon_on_cancel=True)
        if in_the_way is None:
            if self._freeze is None:
                return "the daemon is ending"
            self._freeze()
        return in_the_way

    def hand_over(self) -> bool:
        """Become the installed program; true where that is not possible, to serve on. Or, where the daemon leaves, give
        all to the service manager; false."""
        if self._leaving:
            self._leave()
            return False
        try:
            if self._program is not None:
                self._program.become(self._premises.handover(), self._stand_in())
        except (OSError, StoreError, StateError, EngineError) as error:
            log.error("the upgrade is not done, and the TPM goes on as before: %s", error)
            self._answer = Outcome(done=False, text=str(error).encode())
            if self._options.supervised:
                tell_ready(self.doing)
        return True

    def leave(self) -> bool:
        """Stop serving, so that the clients can be left to the service manager; false where that is not to be."""
        if not self._options.fd_store or self._leaving or self._freeze is None:
            return False
        self._leaving = True
        self._freeze()
        return True

    def _leave(self) -> None:
        try:
            handover = self._premises.handover()
            kept = [name for name, each in self._endpoints.items() if not isinstance(each.endpoint, DescriptorEndpoint)]
            self._instance.lay_down()
            leave(handover.only_listening(kept), self._store)
        except (OSError, StoreError, StateError, EngineError, HandoverError) as error:
            log.error("the clients are not kept for a restart: %s", error)
            return
        for name in kept:
            self._endpoints[name].stays = True
        log.info("left to the service manager, in case that it starts this TPM again: clients and the running TPM")

    def _stand_in(self) -> Callable[[int], bytes] | None:
        """How a copy of this process serves the data client, if there is one, until the new program has started."""
        links = enumerate(self._premises.links)
        serving = next((number for number, (link, _) in links if isinstance(link, DataLink)), None)
        return None if serving is None else partial(self._stand_in_for, os.getpid(), serving)

    def _stand_in_for(self, pid: int, number: int, call: int) -> bytes:
        """In the copy: serve that client until called; the handover that process `pid` goes on from."""
        link, connected = self._premises.links[number]
        if isinstance(link, DataLink):
            limit, frozen = self._instance.buffer_size(0).maximum, FrozenPump(link.received, link.unsent)
            pump = Pump(
                connected, self._instance.execute, self._instance.cancel, limit, frozen, once=self._options.disconnect
            )
            # A client that is gone is found to be gone by the successor too.
            left = pump.serve_until(call) or FrozenPump()
            self._premises.links[number] = (DataLink(left.received, left.unsent), connected)
        return encode(replace(self._premises.handover(), pid=pid))

    def _handover_or_reason(self) -> Handover | str:
        try:
            return self._premises.handover()
        except (StoreError, StateError, EngineError) as error:
            return str(error)
