"""The measurements behind roundtrip.py: batches in turn, start after start in turn. Nothing is printed here.

Theory. On a machine that is shared (a virtual machine always is) a program measured now and another measured later are
measured on two machines. So all contenders run at once and take turns in small batches: whatever the machine does, it
does to all of them. Waking an idle virtual CPU takes longer than a quick TPM command, and where the scheduler puts two
processes changes from run to run: so client and daemon are bound to CPUs, once to the same one and once to two.
"""

from __future__ import annotations

import gc
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import commands
from daemons import TPMS, Daemon, DidNotRunError, Memory, Programs, bound_to

QUICK = ("GetRandom(16)", "PCR_Read", "PCR_Extend")
"""Operations that take the TPM microseconds: what is measured is the way there and back."""

DURABLE = ("NV_Write(32)",)
"""Operations after which the TPM's state must be stored."""

CRYPTO = ("Sign ECC P-256", "Sign RSA-2048")
"""Operations that the TPM computes at."""

OPERATIONS = QUICK + DURABLE + CRYPTO

WARM_UP = 5
"""Commands at the start of each batch that are not counted: the caches are still another contender's."""

NV_INDEX = 0x01800100
NV_SIZE = 32
MEASURED_PCR = 10


@dataclass(frozen=True, slots=True)
class Layout:
    """Where client and daemon are bound."""

    name: str
    client: int
    daemon: int


@dataclass(slots=True)
class Contender:
    """A connection and, by operation, the commands to send on it in turn."""

    subject: str
    connection: socket.socket
    commands: dict[str, tuple[bytes, ...]]


@dataclass(slots=True)
class RoundTrips:
    """`batches[operation][subject]` are the round trip times in ns, one list a batch.

    Batch n of all subjects was taken in the same round.
    """

    layout: Layout
    batches: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    libtpms: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Failures:
    """Why a subject dropped out, by subject."""

    reasons: dict[str, str] = field(default_factory=dict)

    def still_in(self, subjects: Sequence[str]) -> list[str]:
        """The subjects that did not drop out."""
        return [subject for subject in subjects if subject not in self.reasons]

    @contextmanager
    def noting(self, subject: str) -> Iterator[None]:
        """Whatever did not run in this block puts `subject` out."""
        try:
            yield
        except (DidNotRunError, OSError) as error:
            self.reasons[subject] = str(error)


def run_batch(connection: socket.socket, batch: tuple[bytes, ...], count: int, echo: bool) -> list[int]:
    """Send `count` commands, each after the answer to the one before; returns the round trip times in ns.

    Raises DidNotRunError for an unexpected answer.
    """
    send, receive, clock = connection.send, connection.recv, time.perf_counter_ns
    samples: list[int] = []
    for number in range(count + WARM_UP):
        command = batch[number % len(batch)]
        begin = clock()
        send(command)
        response = receive(4096)
        samples.append(clock() - begin)
        if len(response) != int.from_bytes(response[2:6], "big") or (response[6:10] != b"\0\0\0\0") != echo:
            raise DidNotRunError(f"unexpected answer {response[:10].hex() or '(closed)'} to {command[:10].hex()}")
    return samples[WARM_UP:]


def exchange(connection: socket.socket, command: bytes) -> bytes:
    """One command whose response must be a success. Raises DidNotRunError."""
    connection.sendall(command)
    response = connection.recv(4096)
    if len(response) < commands.HEAD.size or commands.response_code(response) != commands.RC_SUCCESS:
        raise DidNotRunError(
            f"setting up, the TPM answered {response[:10].hex() or '(closed)'} to {command[:10].hex()}"
        )
    return response


def quick_commands() -> dict[str, tuple[bytes, ...]]:
    """The operations that need no preparation: all that an echo can take part in."""
    digests = (bytes([value]) * commands.SHA256_SIZE for value in (0x11, 0x22))
    return {
        "GetRandom(16)": (commands.get_random(16),),
        "PCR_Read": (commands.pcr_read(MEASURED_PCR),),
        "PCR_Extend": tuple(commands.pcr_extend(MEASURED_PCR, digest) for digest in digests),
    }


def prepare_tpm(connection: socket.socket) -> dict[str, tuple[bytes, ...]]:
    """Define an NV index (where it is not there yet), make two keys, and return the commands of all operations.

    Raises DidNotRunError.
    """
    connection.sendall(commands.nv_define(NV_INDEX, NV_SIZE))
    connection.recv(4096)
    ecc = commands.first_handle(exchange(connection, commands.create_primary_ecc()))
    rsa = commands.first_handle(exchange(connection, commands.create_primary_rsa(2048)))
    digest = bytes(range(commands.SHA256_SIZE))
    # Two values in turn: a TPM does not store what it has stored already.
    values = (struct.pack(">I", value) * (NV_SIZE // 4) for value in (1, 2))
    return quick_commands() | {
        "NV_Write(32)": tuple(commands.nv_write(NV_INDEX, value) for value in values),
        "Sign ECC P-256": (commands.sign(ecc, commands.ALG_ECDSA, digest),),
        "Sign RSA-2048": (commands.sign(rsa, commands.ALG_RSASSA, digest),),
    }


@dataclass(slots=True)
class Bench:
    """How much is measured, and where: `rounds` rounds of batches of `count` commands, and `runs` starts a daemon.

    The daemons' states live in `scratch`; `progress` is told what is going on.
    """

    programs: Programs
    scratch: Path
    rounds: int
    count: int
    runs: int
    progress: Callable[[str], None]
    failures: Failures = field(default_factory=Failures)

    def round_trips(self, layout: Layout, subjects: Sequence[str]) -> RoundTrips:
        """Start every subject that did not drop out on the layout's CPU, and let them take turns."""
        trips = RoundTrips(layout)
        with ExitStack() as running, bound_to({layout.client}):
            contenders = []
            for subject in self.failures.still_in(subjects):
                with self.failures.noting(subject):
                    daemon = running.enter_context(self._start(subject, layout))
                    contenders.append(_enter(daemon, trips))
                    running.enter_context(contenders[-1].connection)
            gc.disable()
            try:
                for number in range(self.rounds):
                    self.progress(f"{layout.name}: round {number + 1} of {self.rounds}")
                    turn = number % max(1, len(contenders))
                    self._run_round(trips, contenders[turn:] + contenders[:turn])
            finally:
                gc.enable()
        return trips

    def _start(self, subject: str, layout: Layout) -> Daemon:
        return Daemon(subject, self.scratch / subject, self.programs, {layout.daemon})

    def _run_round(self, trips: RoundTrips, contenders: list[Contender]) -> None:
        for operation in OPERATIONS:
            for contender in contenders:
                subject = contender.subject
                if operation not in contender.commands or subject in self.failures.reasons:
                    continue
                with self.failures.noting(subject):
                    echo = subject not in TPMS
                    samples = run_batch(contender.connection, contender.commands[operation], self.count, echo)
                    trips.batches.setdefault(operation, {}).setdefault(subject, []).append(samples)

    def starts(self, layout: Layout, subjects: Sequence[str]) -> dict[str, list[int]]:
        """Nanoseconds from exec to the first answered command, by subject, each with state that is there already.

        The subjects take turns.
        """
        times: dict[str, list[int]] = {}
        with bound_to({layout.client}):
            for number in range(self.runs + 1):
                self.progress(f"start {number} of {self.runs}")
                for subject in self.failures.still_in(subjects):
                    with self.failures.noting(subject), self._start(subject, layout) as daemon:
                        connection = daemon.first_reply()
                        elapsed = time.perf_counter_ns() - daemon.started_at
                        connection.close()
                        # The first run only makes sure that the TPM's state and Python's bytecode files are there.
                        if number > 0:
                            times.setdefault(subject, []).append(elapsed)
        return times


def _enter(daemon: Daemon, trips: RoundTrips) -> Contender:
    subject = daemon.subject
    if subject not in TPMS:
        connection = daemon.connect_data()
        run_batch(connection, (commands.get_capability(),), 1, echo=True)
        trips.memory[subject] = daemon.memory()
        return Contender(subject, connection, quick_commands())
    connection = daemon.first_reply()
    trips.memory[subject] = daemon.memory()
    trips.libtpms[subject] = daemon.libtpms()
    return Contender(subject, connection, prepare_tpm(connection))
