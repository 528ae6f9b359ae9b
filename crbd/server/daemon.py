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
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from crbd import __version__
from crbd.control.messages import Outcome
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, EngineFailedError, HandoverError, StateError, StateWriteError, StoreError
from crbd.server.checkpoints import keep_checkpoints
from crbd.server.control import ControlChannel
from crbd.server.data import DataChannel
from crbd.server.endpoint import DescriptorEndpoint, Endpoint, OpenEndpoint, adopted, opened
from crbd.server.fdstore import BUFFER, claimed, frozen_before, leave
from crbd.server.frost import Links
from crbd.server.pidfile import PidFile
from crbd.server.pump import FrozenPump, Pump
from crbd.server.register_buffer import RegisterBuffer
from crbd.server.register_buffer import adopted as adopted_buffer
from crbd.server.register_buffer import made as made_buffer
from crbd.server.registers import RegisterChannel
from crbd.server.succession import KEPT_SIGNALS, LOCK, Inheritance, Program, listen_to_kept_signals
from crbd.server.supervision import keep_watchdog, tell_ending, tell_ready, tell_upgrading
from crbd.service.control import ControlService
from crbd.service.frozen import document_of
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.handover import NAME as HANDOVER
from crbd.state.handover import ControlLink, DataLink, Handover, Link, Listener, RegistersLink, descriptors_in, encode
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.port import Store

log = logging.getLogger(__name__)

WRITER = f"crbd {__version__}"
COMMAND_PATIENCE = 30.0
"""Seconds that an upgrade waits for a command under way before it asks the TPM to give it up."""
CANCEL_INTERVAL = 0.1
"""Seconds between two such requests."""
OPTION = {"ctrl": "--ctrl", "data": "--data", "registers": "--registers"}


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """Where the daemon is reached, and how long it lives. At least one of the three endpoints is given; `registers`
    exactly where the instance's options serve registers."""

    ctrl: Endpoint | None
    data: Endpoint | None
    instance: InstanceOptions
    registers: Endpoint | None = None
    """Where register clients connect: vfio-user."""
    allowed_users: frozenset[int] | None = None
    """Whose clients are accepted on UNIX sockets; None for all that can reach them."""
    pid_file: Path | int | None = None
    """A path, or the descriptor of an open file."""
    disconnect: bool = False
    """Close each data connection after its first answer."""
    end_with_data_client: bool = False
    """End when a data client is gone, whichever way it had come (swtpm's `--terminate`)."""
    end_with_ctrl_client: bool = False
    """End when the control client is gone (swtpm's `--ctrl …,terminate`)."""
    upgrade_at_hangup: bool = True
    """Whether SIGHUP asks for an upgrade; if not it ends the daemon, like SIGTERM."""
    supervised: bool = False
    """Tell the service manager, where there is one, how the daemon is."""
    fd_store: bool = False
    """At SIGTERM leave the clients to the service manager."""

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """Those that are given, by channel."""
        channels = (("ctrl", self.ctrl), ("data", self.data), ("registers", self.registers))
        return {name: endpoint for name, endpoint in channels if endpoint is not None}


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
    with trio.open_signal_receiver(*KEPT_SIGNALS) as signals, ExitStack() as cleanup:
        listen_to_kept_signals()
        cleanup.callback(store.close)
        if inherited is not None and inherited.handover.at_rest:
            inherited = claimed(inherited, store, options.endpoints)
        # The pid file is written last and removed last: when it is gone another daemon may take over.
        pid_file = _pid_file(options, inherited)
        if pid_file is not None:
            cleanup.push(pid_file)
        daemon = _Daemon(
            options, store, make_engine, program=program, pid_file=pid_file, inherited=inherited, cleanup=cleanup
        )
        if inherited is None:
            daemon.begin()
        else:
            daemon.go_on(inherited.handover)
        if wall_in is not None:
            wall_in()
        async with trio.open_nursery() as watching:
            ended = trio.CancelScope()
            watching.start_soon(_heed, signals, daemon, ended)
            watching.start_soon(keep_checkpoints, daemon.instance)
            with ended:
                log.info("serving the TPM in %s%s", store.name, daemon.where)
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
            cleanup.close()
            watching.cancel_scope.cancel()
    log.info("ended")


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


def _pid_file(options: DaemonOptions, inherited: Inheritance | None) -> PidFile | None:
    if inherited is not None and not inherited.handover.at_rest:
        written = inherited.handover.pid_file
        return PidFile.of_this_process(Path(written)) if written else None
    return None if options.pid_file is None else PidFile(options.pid_file)


class _Daemon:
    """One TPM and its clients. What is opened here goes onto `cleanup`, which takes it back in the opposite order."""

    def __init__(
        self,
        options: DaemonOptions,
        store: Store,
        make_engine: Callable[[StatePort], Engine],
        *,
        program: Program | None,
        pid_file: PidFile | None,
        inherited: Inheritance | None,
        cleanup: ExitStack,
    ) -> None:
        self._options = options
        self._store = store
        self._program = program
        self._cleanup = cleanup
        self._pid_file = pid_file
        self._buffer = _buffer(options, inherited, cleanup)
        shared = None if self._buffer is None else self._buffer.memory
        self._instance = Instance(make_engine, store, options.instance, shared)
        cleanup.callback(self._instance.close)
        self._endpoints: dict[str, OpenEndpoint] = {}
        self._links: Links = []
        """Clients that wait to be served on."""
        cleanup.callback(self._close_links)
        self._answer: Outcome | None = None
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

    # -- the two beginnings

    def begin(self) -> None:
        """Everything up to the moment that clients are served. Raises OperatorError."""
        self._instance.check()
        for name, endpoint in self._options.endpoints.items():
            self._endpoints[name] = self._cleanup.enter_context(opened(endpoint, OPTION[name]))
            if not self._endpoints[name].listening:
                self._links.append((_fresh(name), self._endpoints[name].socket))
        try:
            self._instance.begin()
        except StoreError as error:
            raise StateWriteError.of(error) from error
        except EngineError as error:
            raise EngineFailedError(str(error), "the state was not changed; see the messages above") from error
        if self._pid_file is not None:
            self._pid_file.write()

    def go_on(self, handover: Handover) -> None:
        """Everything that another process left to this one. Raises OperatorError."""
        try:
            self._instance.thaw(frozen_before(handover), HANDOVER, live_buffer=BUFFER in handover.descriptors)
        except (EngineError, StoreError) as error:
            raise HandoverError(str(error), "go on with the release that wrote it") from error
        for name, endpoint in self._options.endpoints.items():
            if name in handover.listeners:
                descriptor, identity = handover.descriptors[f"listener.{name}"], handover.listeners[name].identity
                self._endpoints[name] = self._cleanup.enter_context(adopted(endpoint, descriptor, identity))
            elif handover.at_rest:
                self._endpoints[name] = self._cleanup.enter_context(opened(endpoint, OPTION[name]))
        if handover.at_rest:
            self._instance.make_durable()
            if self._pid_file is not None:
                self._pid_file.write()
        for number, link in enumerate(handover.links):
            self._links.append((link, socket.socket(fileno=handover.descriptors[f"link.{number}"])))
        pause = (time.monotonic_ns() - handover.frozen_at) / 1e6
        said = f"{WRITER} goes on for {handover.writer}; clients waited {pause:.0f} ms"
        log.info("%s", said)
        self._answer = Outcome(done=True, text=said.encode())

    # -- serving

    async def serve_until_frozen(self) -> bool:
        """Serve until the daemon is to end (false), or until its clients are frozen for an upgrade (true)."""
        options, ending = self._options, trio.Event()
        controls_over = trio.Event()

        async with trio.open_nursery() as tasks:

            def end() -> None:
                ending.set()
                tasks.cancel_scope.cancel()

            links, self._links = self._links, []
            data = DataChannel(
                self._instance,
                self._instance.buffer_size(0).maximum,
                tasks,
                self._links,
                once=options.disconnect,
                gone=end if options.end_with_data_client else None,
                allowed=options.allowed_users,
            )
            control = ControlChannel(
                ControlService(self._instance),
                data.attach,
                shut_down=end,
                upgrade=self.upgrade,
                frozen=self._links,
                gone=end if options.end_with_ctrl_client else None,
                allowed=options.allowed_users,
            )

            registers = self._register_channel()

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

    def _register_channel(self) -> RegisterChannel | None:
        served = self._instance.served
        if self._buffer is None or served is None:
            return None
        allowed = self._options.allowed_users
        return RegisterChannel(self._instance, served, self._buffer, self._links, allowed=allowed)

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
        in_the_way = await program.try_out(handover)
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
                self._program.become(self._handover(), self._stand_in())
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
            handover = self._handover()
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
        serving = next((number for number, (link, _) in enumerate(self._links) if isinstance(link, DataLink)), None)
        return None if serving is None else partial(self._stand_in_for, os.getpid(), serving)

    def _stand_in_for(self, pid: int, number: int, call: int) -> bytes:
        """In the copy: serve that client until called; the handover that process `pid` goes on from."""
        link, connected = self._links[number]
        if isinstance(link, DataLink):
            limit, frozen = self._instance.buffer_size(0).maximum, FrozenPump(link.received, link.unsent)
            pump = Pump(
                connected, self._instance.execute, self._instance.cancel, limit, frozen, once=self._options.disconnect
            )
            # A client that is gone is found to be gone by the successor too.
            left = pump.serve_until(call) or FrozenPump()
            self._links[number] = (DataLink(left.received, left.unsent), connected)
        return encode(replace(self._handover(), pid=pid))

    def _handover_or_reason(self) -> Handover | str:
        try:
            return self._handover()
        except (StoreError, StateError, EngineError) as error:
            return str(error)

    def _handover(self) -> Handover:
        """All that a successor needs, with the clients that are frozen. Raises StoreError, StateError, EngineError."""
        frozen_at = time.monotonic_ns()
        frozen, estate = self._instance.freeze(), self._store.estate()
        links = tuple(link for link, _ in self._links)
        descriptors = {f"link.{number}": connected.fileno() for number, (_, connected) in enumerate(self._links)}
        listening = {name: each for name, each in self._endpoints.items() if each.listening}
        descriptors |= {f"listener.{name}": each.socket.fileno() for name, each in listening.items()}
        descriptors |= descriptors_in(links)
        if estate.lock is not None:
            descriptors[LOCK] = estate.lock
        if self._buffer is not None:
            descriptors[BUFFER] = self._buffer.descriptor
        options = self._options.instance
        keys = {"seal": estate.data_key, "file": _bytes(options.file_key), "migration": _bytes(options.migration_key)}
        return Handover(
            pid=os.getpid(),
            frozen_at=frozen_at,
            writer=WRITER,
            document=document_of(frozen, WRITER),
            instance=frozen.facts,
            changed=frozen.changed,
            changed_side=frozen.side,
            held=estate.held,
            held_side=estate.held_side,
            secrets={name: key for name, key in keys.items() if key},
            pid_file=str(self._pid_file.written or "") if self._pid_file is not None else "",
            listeners={name: Listener(each.identity) for name, each in listening.items()},
            links=links,
            descriptors=descriptors,
        )

    def _close_links(self) -> None:
        for _, connected in self._links:
            connected.close()


def _fresh(channel: str) -> Link:
    links: dict[str, Link] = {"ctrl": ControlLink(), "data": DataLink(), "registers": RegistersLink()}
    return links[channel]


def _buffer(options: DaemonOptions, inherited: Inheritance | None, cleanup: ExitStack) -> RegisterBuffer | None:
    """The data buffer of the registers, where there are any to serve. Raises OperatorError."""
    if options.registers is None:
        return None
    if inherited is not None and BUFFER in inherited.handover.descriptors:
        return cleanup.enter_context(adopted_buffer(inherited.handover.descriptors[BUFFER]))
    return cleanup.enter_context(made_buffer())


def _bytes(key: SwtpmKey | None) -> bytes:
    return b"" if key is None else key.secret
