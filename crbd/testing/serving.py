"""An ephemeral TPM, as the process that it is: served from a private directory for as long as its leash is held."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import EndpointError, OperatorError
from crbd.server.daemon import serve
from crbd.server.endpoint import UNIX_PATH_MAX, UnixEndpoint
from crbd.server.options import DaemonOptions
from crbd.service.faults import FaultPlan, parse_faults
from crbd.service.injection import FaultyStore, StartedEngine
from crbd.service.options import InstanceOptions, Startup
from crbd.store.memory import MemoryStore
from crbd.testing import leash as leashes
from crbd.testing.places import CONTROL, DATA

SOURCE = "faults"
"""What errors call the text of faults."""


def be_a_tpm(place: Path, leash: socket.socket, library: str | None) -> int:
    """Serve until the leash is let go, and remove `place`; the exit status. For a process that was made for it.

    The process leaves its session, so that signals from a terminal end what uses the TPM and not the TPM.
    """
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    logging.basicConfig(stream=sys.stderr, level="WARNING", format="crbd: %(levelname)s: %(message)s")
    try:
        _check_length(place)
        trio.run(partial(_serve_on, leash, place, library))
    except OperatorError as error:
        return _refused(leash, error)
    except BaseExceptionGroup as errors:
        ours, others = errors.split(OperatorError)
        if ours is None or others is not None:
            raise
        return _refused(leash, _first(ours))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return 0


def _refused(leash: socket.socket, error: OperatorError) -> int:
    leash.setblocking(True)
    leash.send(leashes.refusal(error))
    return error.exit_code


def _first(errors: BaseExceptionGroup[OperatorError]) -> OperatorError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _check_length(place: Path) -> None:
    path = place / CONTROL
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise EndpointError(f"{path} is too long for a UNIX socket", "set TMPDIR to a directory with a shorter path")


async def _serve_on(leash: socket.socket, place: Path, library: str | None) -> None:
    plan = FaultPlan()

    def make_engine(port: StatePort) -> Engine:
        return StartedEngine(LibtpmsEngine(port, library), port, plan)

    options = DaemonOptions(
        ctrl=UnixEndpoint(place / CONTROL),
        data=UnixEndpoint(place / DATA),
        instance=InstanceOptions(startup=Startup.POWER_ON, may_manufacture=True),
        upgrade_at_hangup=False,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, options, FaultyStore(MemoryStore(), plan), make_engine)
        await _hold(leash, plan)
        nursery.cancel_scope.cancel()


async def _hold(leash: socket.socket, plan: FaultPlan) -> None:
    """Answer the keeper until it lets go."""
    # A keeper that was killed takes no answer.
    with trio.socket.from_stdlib_socket(leash.dup()) as held, suppress(BrokenPipeError, ConnectionResetError):
        await held.send(leashes.packet(ready=True))
        while data := await held.recv(leashes.MAX_PACKET):
            await held.send(_answer(leashes.content_of(data), plan))


def _answer(request: dict[str, object], plan: FaultPlan) -> bytes:
    text = request.get("faults")
    if text is None:
        return leashes.packet(struck=plan.struck)
    try:
        plan.replace(parse_faults(str(text), SOURCE))
    except OperatorError as error:
        return leashes.refusal(error)
    return leashes.packet(struck=0)
