"""The daemon: one TPM, its endpoints, and how they begin and end.

Order at the start: state is locked and looked at, sockets are opened, the TPM is powered on if the options say so,
then clients are served. What fails on the way takes back what came before it: a start that fails leaves no socket and
no lock behind. At the end: the pump is told to finish (its command is cancelled), the TPM is shut down, the sockets
are removed, the lock is released.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, EngineFailedError, StoreError
from crbd.server.control import ControlChannel
from crbd.server.data import DataChannel
from crbd.server.endpoint import Endpoint, OpenEndpoint, opened
from crbd.server.pidfile import pid_file
from crbd.service.control import ControlService
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.store.port import Store

log = logging.getLogger(__name__)

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """Where the daemon is reached. At least one of the two is given."""

    ctrl: Endpoint | None
    data: Endpoint | None
    instance: InstanceOptions
    pid_file: Path | None = None


async def serve(
    options: DaemonOptions,
    store: Store,
    make_engine: Callable[[StatePort], Engine],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve one TPM until SHUTDOWN or a signal ends it. `store` is locked; it is closed at the end, whatever happens.

    Raises OperatorError when the start fails.
    """
    with ExitStack() as cleanup:
        cleanup.callback(store.close)
        instance = Instance(make_engine, store, options.instance)
        instance.check()
        ctrl = cleanup.enter_context(opened(options.ctrl, "--ctrl")) if options.ctrl else None
        data = cleanup.enter_context(opened(options.data, "--data")) if options.data else None
        cleanup.callback(instance.close)
        try:
            instance.begin()
        except (EngineError, StoreError) as error:
            raise EngineFailedError(str(error), "the state was not changed; see the messages above") from error
        if options.pid_file is not None:
            cleanup.enter_context(pid_file(options.pid_file))
        with trio.open_signal_receiver(*END_SIGNALS) as signals:
            async with trio.open_nursery() as watching:
                watching.start_soon(_end_at_signal, signals, watching.cancel_scope)
                # Ends by itself only where every client was handed over connected and the last one is gone.
                async with trio.open_nursery() as serving:
                    _start_serving(serving, instance, ctrl, data)
                    log.info(
                        "serving the TPM in %s%s", store.name, "".join(f" at {e.endpoint}" for e in (ctrl, data) if e)
                    )
                    task_status.started()
                watching.cancel_scope.cancel()
    log.info("ended")


def _start_serving(
    nursery: trio.Nursery, instance: Instance, ctrl: OpenEndpoint | None, data: OpenEndpoint | None
) -> None:
    data_channel = DataChannel(instance, instance.buffer_size(0).maximum, nursery)
    control_channel = ControlChannel(ControlService(instance), data_channel.attach, nursery.cancel_scope.cancel)
    if data is not None:
        if data.listening:
            nursery.start_soon(data_channel.serve_listener, data.socket)
        else:
            nursery.start_soon(data_channel.serve_connected, data.socket)
    if ctrl is not None:
        if ctrl.listening:
            nursery.start_soon(control_channel.serve_listener, ctrl.socket)
        else:
            nursery.start_soon(control_channel.serve_connected, trio.socket.from_stdlib_socket(ctrl.socket))


async def _end_at_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        log.info("ending at %s", signal.Signals(number).name)
        scope.cancel()
