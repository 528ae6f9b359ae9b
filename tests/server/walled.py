"""Daemons with an intruder inside, and what the kernel says of a process."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cli.process import PATIENCE, wait_until

from .intruder import attempt, outcome

INTRUDED = (sys.executable, "-m", "tests.server.intruder")
UPGRADE = bytes.fromhex("000000c1")
CHECKOUT = Path(__file__).parents[2]


class Walled:
    """A running daemon."""

    def __init__(self, process: subprocess.Popen[str], place: Path) -> None:
        self.process = process
        self._place = place

    def attempt(self, text: str) -> str:
        """What came of the intruder's attempt; `dead` where the daemon did not live to tell."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self._place / "data"))
            client.sendall(attempt(text))
            try:
                return outcome(_received(client)) or "dead"
            except ConnectionResetError:
                return "dead"

    def upgrade(self) -> tuple[bool, str]:
        """Ask for it; whether it was done, and what was said."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self._place / "ctrl"))
            client.sendall(UPGRADE)
            head = client.recv(12, socket.MSG_WAITALL)
            said = client.recv(int.from_bytes(head[8:], "big"), socket.MSG_WAITALL)
            return head[7] == 1, said.decode()

    def status(self, name: str) -> list[str]:
        """What /proc says under this name of each thread."""
        tasks = Path("/proc", str(self.process.pid), "task").glob("*/status")
        lines = [line for task in tasks for line in task.read_text().splitlines()]
        return [line.split()[1] for line in lines if line.startswith(f"{name}:")]


def _received(client: socket.socket) -> bytes:
    received = b""
    while len(received) < 6 or len(received) < int.from_bytes(received[2:6], "big"):
        piece = client.recv(4096)
        if not piece:
            return b""
        received += piece
    return received


@contextmanager
def serving(
    place: Path, *options: str, state: bool = True, program: Sequence[str] = INTRUDED, intruded: bool = True
) -> Iterator[Walled]:
    """`crbd serve` with state in `place/state`, from the moment that it serves; `program` is what it is started by."""
    where = ["--state", str(place / "state"), "--create"] if state else ["--ephemeral"]
    sockets = ["--data", f"unix:{place / 'data'}", "--ctrl", f"unix:{place / 'ctrl'}"]
    arguments = ["serve", *where, *sockets, "--flags", "startup-clear", "--pid", str(place / "pid"), *options]
    yield from _running(place, program, arguments, intruded=intruded)


@contextmanager
def swtpm(place: Path, *options: str) -> Iterator[Walled]:
    """`swtpm socket`, likewise."""
    (place / "state").mkdir(exist_ok=True)
    where = ["--tpm2", "--tpmstate", f"dir={place / 'state'}", "--pid", f"file={place / 'pid'}"]
    sockets = ["--server", f"type=unixio,path={place / 'data'}", "--ctrl", f"type=unixio,path={place / 'ctrl'}"]
    arguments = ["socket", *where, *sockets, "--flags", "startup-clear", *options]
    yield from _running(place, INTRUDED, arguments, intruded=True)


def _running(place: Path, program: Sequence[str], arguments: Sequence[str], *, intruded: bool) -> Iterator[Walled]:
    pid = place / "pid"
    pid.unlink(missing_ok=True)
    with subprocess.Popen([*program, *arguments], stderr=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        try:
            wait_until(lambda: (pid.exists() and pid.stat().st_size > 0) or process.poll() is not None, "the pid file")
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            daemon = Walled(process, place)
            # The pid file comes before the walls: whoever is answered is behind them.
            assert not intruded or daemon.attempt("list /dev/null") == "ENOTDIR"
            yield daemon
        finally:
            process.kill()
