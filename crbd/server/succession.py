"""One process for the next: how a daemon becomes the program that is installed now, without letting go of anything.

    old    trial: the new program is started beside the old one with a copy of the frozen TPM, brings it to life in its
           own memory, and ends. What it says on stderr is why there is no upgrade.
    old    frost falls: no client is in the middle of a command any more
    old    freezes the TPM, writes the handover into memory (memfd), and executes the new program in its own place:
           same process id, same sockets, same lock, same parent
    new    takes the handover, thaws, goes on

Until the last of these steps the old program can go on, and does so where anything is in the way. The variable
CRBD_HANDOVER tells the new program what it was given: the descriptor of the memory and, by name, the others:
`7:store.lock=4,listener.ctrl=5,link.0=9`; in a trial `trial:7`. Where a stand-in serves the data client until the new
program has started (crbd.server.standin), it is the socket to call it by and its process id:
`stand-in:8:4711:store.lock=4,…`.

Signals that arrive between the two are kept by the kernel: they are blocked from before the exec until the new program
listens for them. (SIGHUP, for one, would end a process that has not yet said what to do at it.)
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NoReturn

from crbd.engine.declarations import load
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, HandoverError, StateError, StoreError
from crbd.server.standin import StandIn, leave
from crbd.service.frozen import frozen_of
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.handover import MAX_HANDOVER, Handover, decode, encode
from crbd.state.handover import NAME as HANDOVER
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.lockfile import inherit as inherit_lock
from crbd.store.memory import MemoryStore

log = logging.getLogger(__name__)

VARIABLE = "CRBD_HANDOVER"
TRIAL_TIMEOUT = 30.0
"""Seconds that the new program may take to see whether it can go on."""
MAX_REASON = 2000
"""Characters of what it says, in the answer to UPGRADE."""
LOCK = "store.lock"
"""The name of the descriptor that holds the store's lock."""
_TRIAL = "trial"
_STAND_IN = "stand-in"
KEPT_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True, slots=True)
class Program:
    """A command line that starts the program that is installed now, with the options of this process."""

    arguments: tuple[str, ...]
    """The first is the executable's path."""

    @classmethod
    def of_this_process(cls) -> Program:
        """The one that this process was started with.

        A script is executed as such, so that its first line counts, which may name another interpreter by now.
        """
        given = tuple(sys.orig_argv)
        script = sys.argv[0]
        if os.access(script, os.X_OK) and script in given:
            return cls((os.path.abspath(script), *given[given.index(script) + 1 :]))
        return cls((sys.executable, *given[1:]))

    def try_out(self, handover: Handover) -> str | None:
        """Let the new program see whether it can go on from here; why not, if it cannot. Changes nothing. Blocks."""
        # The listeners are only named: what is not on the command line is served if it has one.
        trial = replace(handover, links=(), pid_file="", descriptors={})
        memory = in_memory(encode(trial))
        environment = os.environ | {VARIABLE: f"{_TRIAL}:{memory}"}
        environment.pop("NOTIFY_SOCKET", None)  # what it finds is said in the answer
        try:
            ended = subprocess.run(
                self.arguments,
                env=environment,
                pass_fds=(memory,),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=TRIAL_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return f"the installed program did not say within {TRIAL_TIMEOUT:.0f} s whether it can go on"
        except OSError as error:
            return f"{self.arguments[0]} cannot be started: {error.strerror}"
        finally:
            os.close(memory)
        if ended.returncode == 0:
            return None
        said = ended.stderr.decode(errors="replace").strip()
        why = said[-MAX_REASON:] or f"it ended with {ended.returncode}"
        return f"the installed program cannot go on: {why}"

    def become(self, handover: Handover, serve: Callable[[int], bytes] | None = None) -> NoReturn:
        """Execute it in the place of this process. Raises OSError: then nothing has changed.

        With `serve` a copy of this process serves the data client by it until the program has started, and returns the
        handover that counts.
        """
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_SIGNALS)
        with ExitStack() as undo:
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, blocked)
            if serve is None:
                given = in_memory(encode(handover))
                undo.callback(os.close, given)
                said = f"{given}"
            else:
                departure = leave(serve)
                undo.callback(departure.call_off)
                given = departure.stand_in.call
                said = f"{_STAND_IN}:{given}:{departure.stand_in.pid}"
            named = ",".join(f"{name}={number}" for name, number in handover.descriptors.items())
            for number in (given, *handover.descriptors.values()):
                os.set_inheritable(number, True)
                undo.callback(os.set_inheritable, number, False)
            os.execve(self.arguments[0], self.arguments, os.environ | {VARIABLE: f"{said}:{named}"})
        raise AssertionError("an exec that succeeds does not return")


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What this process was given by the one before it."""

    handover: Handover
    trial: bool
    """Only to see whether it could go on: nothing is to be opened, changed or served."""

    def swtpm_key(self, name: str) -> SwtpmKey | None:
        """The key `file` or `migration`, if there is one."""
        secret = self.handover.secrets.get(name)
        return None if secret is None else SwtpmKey(secret)


def inheritance(library: str | None = None) -> Inheritance | None:
    """What the environment says that this process was given; None at an ordinary start. To be asked once, and when
    everything else has been made ready: from then on clients wait. `library` is the libtpms that will be wanted.

    Raises HandoverError, EngineMissingError.
    """
    said = os.environ.pop(VARIABLE, None)
    if said is None:
        return None
    load(library)
    try:
        *source, named = said.split(":")
        trial = source == [_TRIAL]
        descriptors = {} if trial or not named else dict(_named(pair) for pair in named.split(","))
        for number in descriptors.values():
            os.set_inheritable(number, False)
        handover = decode(_read([named] if trial else source), descriptors)
    except (ValueError, OSError) as error:
        raise HandoverError(f"{VARIABLE}={said!r} is not from a crbd: {error}", "unset it") from error
    except StateError as error:
        raise HandoverError(error.what, error.remedy) from error
    if not trial and handover.pid != os.getpid():
        raise HandoverError(f"{VARIABLE} is for process {handover.pid}, not for {os.getpid()}", "unset it")
    if LOCK in descriptors:
        inherit_lock(descriptors[LOCK])
    return Inheritance(handover, trial)


def rehearse(inherited: Inheritance, options: InstanceOptions, make_engine: Callable[[StatePort], Engine]) -> None:
    """Bring a copy of the TPM to life in memory, and let it go. Raises OperatorError where that is not possible."""
    store = MemoryStore(inherited.handover.held, inherited.handover.held_side)
    instance = Instance(make_engine, store, replace(options, auto_shutdown=False))
    try:
        instance.thaw(frozen_of(inherited.handover), HANDOVER)
    except (EngineError, StoreError) as error:
        raise HandoverError(str(error), "go on with the release that wrote it") from error
    finally:
        instance.close()


def is_successor() -> bool:
    """Whether another process waits for this one to take its place. False once `inheritance` was asked."""
    return VARIABLE in os.environ


def keep_signals() -> None:
    """Let the kernel keep the signals that end a daemon or upgrade it until `listen_to_kept_signals`.

    Those too that the parent had ignored (nohup, a shell's background job): the kernel keeps no ignored signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_SIGNALS)
    for number in KEPT_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def listen_to_kept_signals() -> None:
    """To be called when this process has said what to do at each: what came in between is heard now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KEPT_SIGNALS)


def _read(source: list[str]) -> bytes:
    """From memory, or from the stand-in, which stops serving then. Raises OSError, ValueError."""
    if source[0] == _STAND_IN:
        _, call, pid = source
        return StandIn(int(pid), int(call)).take_over()
    (memory,) = source
    with open(int(memory), "rb") as file:
        return file.read(MAX_HANDOVER + 1)


def _named(pair: str) -> tuple[str, int]:
    name, _, number = pair.partition("=")
    return name, int(number)


def in_memory(data: bytes) -> int:
    """A descriptor of memory that holds the bytes, to be read from the beginning. Raises OSError."""
    memory = os.memfd_create("crbd-handover", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(memory, 0, os.SEEK_SET)
    except OSError:
        os.close(memory)
        raise
    return memory
