"""What a daemon has open while it lives: its TPM, its sockets and those of its clients, its pid file.

It is opened without trio, and before trio is imported: that takes as long as all else together, and there are callers
(libvirt) that give a socket one second to appear.

Order: state is locked and looked at, sockets are opened, the TPM is powered on if the options say so, the pid file is
written. What fails on the way takes back what came before it: a start that fails leaves no socket and no lock behind.
At the end the sockets are removed, the TPM is shut down, the lock is released, and the pid file is removed: when that
is gone another daemon may take over.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from crbd import __version__
from crbd.control.replies import Outcome
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, EngineFailedError, HandoverError, StateError, StateWriteError, StoreError
from crbd.server.endpoint import OpenEndpoint, adopted, opened
from crbd.server.fdstore import BUFFER, claimed, frozen_before
from crbd.server.links import Links
from crbd.server.options import DaemonOptions
from crbd.server.pidfile import PidFile
from crbd.server.register_buffer import RegisterBuffer
from crbd.server.register_buffer import adopted as adopted_buffer
from crbd.server.register_buffer import made as made_buffer
from crbd.server.succession import LOCK, Inheritance
from crbd.service.frozen import document_of
from crbd.service.instance import Instance
from crbd.state.handover import NAME as HANDOVER
from crbd.state.handover import ControlLink, DataLink, Handover, Link, Listener, RegistersLink, descriptors_in
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.port import Store

log = logging.getLogger(__name__)

WRITER = f"crbd {__version__}"
OPTION = {"ctrl": "--ctrl", "data": "--data", "registers": "--registers"}


class Premises:
    """All of it, open. `close` it at the end; twice is no error."""

    def __init__(
        self,
        options: DaemonOptions,
        store: Store,
        make_engine: Callable[[StatePort], Engine],
        inherited: Inheritance | None = None,
    ) -> None:
        """Open it, or take it over from the process before this one. `store` is closed at the end, whatever happens.

        Raises OperatorError; nothing is open then.
        """
        self.options = options
        self.store = store
        self.endpoints: dict[str, OpenEndpoint] = {}
        self.links: Links = []
        """Clients that wait to be served on."""
        self.answer: Outcome | None = None
        """For the client that asked for an upgrade of the process before this one."""
        self._cleanup = ExitStack()
        self._cleanup.callback(store.close)
        with ExitStack() as undo:
            undo.callback(self.close)
            if inherited is not None and inherited.handover.at_rest:
                inherited = claimed(inherited, store, options.endpoints)
            self._pid_file = _pid_file(options, inherited)
            if self._pid_file is not None:
                self._cleanup.push(self._pid_file)
            self.buffer = _buffer(options, inherited, self._cleanup)
            shared = None if self.buffer is None else self.buffer.memory
            self.instance = Instance(make_engine, store, options.instance, shared)
            self._cleanup.callback(self.instance.close)
            self._cleanup.callback(self._close_links)
            if inherited is None:
                self._begin()
            else:
                self._go_on(inherited.handover)
            undo.pop_all()

    def close(self) -> None:
        """Take everything back, in the opposite order."""
        self._cleanup.close()

    def take_links(self) -> tuple[Links, Links]:
        """The clients that wait, and the list for those that will."""
        taken, self.links = self.links, []
        return taken, self.links

    def _begin(self) -> None:
        """Everything up to the moment that clients are served. Raises OperatorError."""
        self.instance.check()
        for name, endpoint in self.options.endpoints.items():
            self.endpoints[name] = self._cleanup.enter_context(opened(endpoint, OPTION[name]))
            if not self.endpoints[name].listening:
                self.links.append((_fresh(name), self.endpoints[name].socket))
        try:
            self.instance.begin()
        except StoreError as error:
            raise StateWriteError.of(error) from error
        except EngineError as error:
            raise EngineFailedError(str(error), "the state was not changed; see the messages above") from error
        if self._pid_file is not None:
            self._pid_file.write()

    def _go_on(self, handover: Handover) -> None:
        """Everything that another process left to this one. Raises OperatorError."""
        try:
            self.instance.thaw(frozen_before(handover), HANDOVER, live_buffer=BUFFER in handover.descriptors)
        except (EngineError, StoreError, StateError) as error:
            # After a restart there is no way back, but the TPM at rest: the next start finds no handover.
            raise HandoverError(str(error), "go on with the release that wrote it") from error
        for name, endpoint in self.options.endpoints.items():
            if name in handover.listeners:
                descriptor, identity = handover.descriptors[f"listener.{name}"], handover.listeners[name].identity
                self.endpoints[name] = self._cleanup.enter_context(adopted(endpoint, descriptor, identity))
            elif handover.at_rest:
                self.endpoints[name] = self._cleanup.enter_context(opened(endpoint, OPTION[name]))
        if handover.at_rest:
            self.instance.make_durable()
            if self._pid_file is not None:
                self._pid_file.write()
        for number, link in enumerate(handover.links):
            self.links.append((link, socket.socket(fileno=handover.descriptors[f"link.{number}"])))
        pause = (time.monotonic_ns() - handover.frozen_at) / 1e6
        said = f"{WRITER} goes on for {handover.writer}; clients waited {pause:.0f} ms"
        log.info("%s", said)
        self.answer = Outcome(done=True, text=said.encode())

    def handover(self) -> Handover:
        """All that a successor needs, with the clients that are frozen. Raises StoreError, StateError, EngineError."""
        frozen_at = time.monotonic_ns()
        frozen, estate = self.instance.freeze(), self.store.estate()
        links = tuple(link for link, _ in self.links)
        descriptors = {f"link.{number}": connected.fileno() for number, (_, connected) in enumerate(self.links)}
        listening = {name: each for name, each in self.endpoints.items() if each.listening}
        descriptors |= {f"listener.{name}": each.socket.fileno() for name, each in listening.items()}
        descriptors |= descriptors_in(links)
        if estate.lock is not None:
            descriptors[LOCK] = estate.lock
        if self.buffer is not None:
            descriptors[BUFFER] = self.buffer.descriptor
        options = self.options.instance
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
        for _, connected in self.links:
            connected.close()


def _pid_file(options: DaemonOptions, inherited: Inheritance | None) -> PidFile | None:
    if inherited is not None and not inherited.handover.at_rest:
        written = inherited.handover.pid_file
        return PidFile.of_this_process(Path(written)) if written else None
    return None if options.pid_file is None else PidFile(options.pid_file)


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
