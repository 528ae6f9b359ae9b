"""The daemon: one TPM, its endpoints, and how they begin and end.

Order at the start: state is locked and looked at, sockets are opened, the TPM is powered on if the options say so,
then clients are served. What fails on the way takes back what came before it: a start that fails leaves no socket and
no lock behind. At the end: the pump is told to finish (its command is cancelled), the sockets are removed, the TPM is
shut down, the lock is released, the pid file is removed.
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
from crbd.errors import EngineError, EngineFailedError, StateWriteError, StoreError
from crbd.server.control import ControlChannel
from crbd.server.data import DataChannel
from crbd.server.endpoint import Endpoint, OpenEndpoint, opened
from crbd.server.pidfile import PidFile
from crbd.service.control import ControlService
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.store.port import Store

log = logging.getLogger(__name__)

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """Where the daemon is reached, and how long it lives. At least one of the two endpoints is given."""

    ctrl: Endpoint | None
    data: Endpoint | None
    instance: InstanceOptions
    pid_file: Path | int | None = None
    """A path, or the descriptor of an open file."""
    disconnect: bool = False
    """Close each data connection after its first answer."""
    end_with_data_client: bool = False
    """End when a data client is gone, whichever way it had come (swtpm's `--terminate`)."""
    end_with_ctrl_client: bool = False
    """End when the control client is gone (swtpm's `--ctrl …,terminate`)."""


async def serve(
    options: DaemonOptions,
    store: Store,
    make_engine: Callable[[StatePort], Engine],
    *,
    ready: Callable[[], None] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve one TPM until SHUTDOWN or a signal ends it. `store` is locked; it is closed at the end, whatever happens.

    `ready` is called once, when clients are served: the sockets listen, the pid file is written.

    Raises OperatorError when the start fails.
    """
    # Signals count from the first moment: one that comes during the start ends the daemon when that is done.
    with trio.open_signal_receiver(*END_SIGNALS) as signals, ExitStack() as cleanup:
        instance, ctrl, data = _start(options, store, make_engine, cleanup)
        async with trio.open_nursery() as watching:
            ended = trio.CancelScope()
            watching.start_soon(_end_at_signal, signals, ended)
            with ended:
                # Ends by itself only where every client was handed over connected and the last one is gone.
                async with trio.open_nursery() as serving:
                    _start_serving(serving, options, instance, ctrl, data)
                    where = "".join(f" at {opened.endpoint}" for opened in (ctrl, data) if opened)
                    log.info("serving the TPM in %s%s", store.name, where)
                    if ready is not None:
                        ready()
                    task_status.started()
            # A second signal is no reason to leave the TPM without its shutdown.
            cleanup.close()
            watching.cancel_scope.cancel()
    log.info("ended")


def _start(
    options: DaemonOptions, store: Store, make_engine: Callable[[StatePort], Engine], cleanup: ExitStack
) -> tuple[Instance, OpenEndpoint | None, OpenEndpoint | None]:
    """Everything up to the moment that clients are served. `cleanup` takes it back, in the opposite order.

    The pid file is written last and removed last: when it is gone another daemon may take over. Raises OperatorError.
    """
    pid_file = cleanup.enter_context(PidFile(options.pid_file)) if options.pid_file is not None else None
    cleanup.callback(store.close)
    instance = Instance(make_engine, store, options.instance)
    cleanup.callback(instance.close)
    instance.check()
    ctrl = cleanup.enter_context(opened(options.ctrl, "--ctrl")) if options.ctrl else None
    data = cleanup.enter_context(opened(options.data, "--data")) if options.data else None
    try:
        instance.begin()
    except StoreError as error:
        raise StateWriteError.of(error) from error
    except EngineError as error:
        raise EngineFailedError(str(error), "the state was not changed; see the messages above") from error
    if pid_file is not None:
        pid_file.write()
    return instance, ctrl, data


def _start_serving(
    nursery: trio.Nursery,
    options: DaemonOptions,
    instance: Instance,
    ctrl: OpenEndpoint | None,
    data: OpenEndpoint | None,
) -> None:
    end = nursery.cancel_scope.cancel
    data_channel = DataChannel(
        instance,
        instance.buffer_size(0).maximum,
        nursery,
        once=options.disconnect,
        gone=end if options.end_with_data_client else None,
    )
    control_channel = ControlChannel(
        ControlService(instance),
        data_channel.attach,
        end,
        gone=end if options.end_with_ctrl_client else None,
    )
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
