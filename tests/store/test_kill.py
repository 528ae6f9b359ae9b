"""For real: `crbd serve` killed with SIGKILL at random moments under load. No acknowledged write is ever missing.

A killed process is not a power cut: what it wrote and did not sync survives it. The power cuts are played in
test_slot_crashes.py, test_linear.py and test_directory_crashes.py; here it is the whole daemon that is interrupted.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.process import CRBD, PATIENCE, wait_until
from tests.engine import commands

LOAD_SECONDS = 0.060
"""The longest time under load before the kill."""

START_SECONDS = 0.300
"""The longest time before a kill that is to hit the start."""

STORES: dict[str, Callable[[Path], list[str]]] = {
    "crbd": lambda place: ["--state", str(place / "state")],
    "swtpm": lambda place: ["--state", str(place / "state"), "--layout", "swtpm"],
    "linear": lambda place: ["--state", str(place / "state"), "--layout", "linear"],
}

KILLS = -(-200 // len(STORES))
"""Of each store: 200 in all, which take a minute or two."""

COUNTER_INDEX = commands.NV_INDEX + 1
COUNTER_ATTRIBUTES = 0x02060016
"""TPMA_NV: owner and its password may read and increment, no dictionary attack protection, TPM_NT_COUNTER."""


def define_counter() -> bytes:
    public = COUNTER_INDEX.to_bytes(4, "big") + commands.SHA256.to_bytes(2, "big")
    public += COUNTER_ATTRIBUTES.to_bytes(4, "big") + commands.sized(b"") + (8).to_bytes(2, "big")
    return commands.authorized(0x12A, (commands.OWNER,), commands.sized(b"") + commands.sized(public))


def increment() -> bytes:
    return commands.authorized(0x134, (commands.OWNER, COUNTER_INDEX), b"")


class GoneError(Exception):
    """The daemon was killed before it answered."""


@dataclass(slots=True)
class Client:
    """A data connection to a daemon that may die at any moment."""

    connection: socket.socket

    def run(self, command: bytes) -> bytes:
        """A command's answer, which must be a success. Raises GoneError."""
        try:
            self.connection.sendall(command)
            answer = self.connection.recv(4096)
            while 0 < len(answer) < 10 or len(answer) < int.from_bytes(answer[2:6], "big"):
                piece = self.connection.recv(4096)
                if not piece:
                    raise GoneError
                answer += piece
        except (ConnectionError, BrokenPipeError) as error:
            raise GoneError from error
        if not answer:
            raise GoneError
        assert commands.code(answer) == commands.SUCCESS, answer.hex()
        return answer


@dataclass(slots=True)
class Experiment:
    """One TPM over many lives. `written` and `counted` are what it acknowledged last; `asked_*` what it was asked."""

    place: Path
    state: list[str]
    chance: random.Random
    written: int = 0
    counted: int = 0
    asked_write: int = 0
    asked_count: int = 0
    answers: int = 0
    interrupted_starts: int = 0
    in_flight: int = field(default=0)
    """Lives after which a change that was not acknowledged was there."""

    @contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        """From its exec; killed at the end at the latest."""
        (self.place / "pid").unlink(missing_ok=True)
        options = [
            "--data",
            f"unix:{self.place / 'data'}",
            "--flags",
            "startup-clear",
            "--pid",
            str(self.place / "pid"),
        ]
        command = [*CRBD, "serve", "--create", *self.state, *options]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def client(self, process: subprocess.Popen[bytes]) -> Iterator[Client]:
        """Connected once the daemon serves."""
        wait_until(lambda: (self.place / "pid").exists() or process.poll() is not None, "the daemon's start")
        assert process.poll() is None, "the daemon refused the state that its predecessor left"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.place / "data"))
            yield Client(connection)

    def prepare(self) -> None:
        """A TPM with an index to write and one to count; a counter's first increment sets it to the TPM's choice."""
        with self.daemon() as process, self.client(process) as client:
            for command in (commands.nv_define(8), define_counter(), commands.nv_write(bytes(8)), increment()):
                client.run(command)
            self.counted = self.asked_count = self._count(client)

    def check(self, client: Client) -> None:
        """What was acknowledged is there, or the one change after it that was on its way."""
        found = int.from_bytes(commands.nv_value(client.run(commands.nv_read(8))), "big")
        count = self._count(client)
        assert found in (self.written, self.asked_write), f"{found} was read, {self.written} acknowledged"
        assert count in (self.counted, self.asked_count), f"{count} was read, {self.counted} acknowledged"
        self.in_flight += (found, count) != (self.written, self.counted)
        self.written = self.asked_write = found
        self.counted = self.asked_count = count

    def load(self, client: Client) -> None:
        """Writes and increments, until the daemon is gone."""
        try:
            while True:
                self.asked_write = self.written + 1
                client.run(commands.nv_write(self.asked_write.to_bytes(8, "big")))
                self.written = self.asked_write
                self.asked_count = self.counted + 1
                client.run(increment())
                self.counted = self.asked_count
                self.answers += 2
        except GoneError:
            return

    def live_and_die(self) -> None:
        """One life of the daemon."""
        with self.daemon() as process:
            if self.chance.random() < 0.1:
                self.interrupted_starts += 1
                with killing(process, self.chance.uniform(0, START_SECONDS)):
                    process.wait(PATIENCE)
                return
            with self.client(process) as client:
                self.check(client)
                with killing(process, self.chance.uniform(0, LOAD_SECONDS)):
                    self.load(client)

    @staticmethod
    def _count(client: Client) -> int:
        return int.from_bytes(commands.nv_value(client.run(commands.nv_read(8, COUNTER_INDEX))), "big")


@contextmanager
def killing(process: subprocess.Popen[bytes], delay: float) -> Iterator[None]:
    """SIGKILL after `delay` seconds, whatever the block is doing then."""
    killer = threading.Timer(delay, process.kill)
    killer.start()
    try:
        yield
    finally:
        killer.join()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("store", STORES)
def test_killed_under_load(tmp_path: Path, store: str) -> None:
    seed = int(os.environ.get("KILL_SEED", str(random.randrange(1 << 32))))
    print(f"KILL_SEED={seed}")
    experiment = Experiment(tmp_path, STORES[store](tmp_path), random.Random(seed))
    experiment.prepare()
    for _ in range(KILLS):
        experiment.live_and_die()
    with experiment.daemon() as process:
        with experiment.client(process) as client:
            experiment.check(client)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    print(
        f"{KILLS} kills, {experiment.interrupted_starts} of them at the start: {experiment.answers} changes "
        f"acknowledged, none missing; {experiment.in_flight} times one more was there"
    )
    assert experiment.answers > KILLS
