"""`crbd` as a process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 20.0
"""Seconds after which something that should have happened is a failure."""

CRBD = [sys.executable, "-m", "crbd"]


def crbd(*arguments: str | Path, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run to the end; `through` is a command that runs it."""
    command = [*through, *CRBD, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return when the condition holds; fail, saying `what` did not happen, after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.005)


@contextmanager
def serving(place: Path, *arguments: str | Path, through: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """`crbd serve` with a pid file `place/pid`, from the moment that it serves; `through` is a command that runs it."""
    command = [*through, *CRBD, "serve", "--pid", str(place / "pid"), *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: (place / "pid").exists() or process.poll() is not None, "the pid file")
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    """Send the signal; the exit status and what stands on stderr."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def ask(path: Path, request: bytes, size: int) -> bytes:
    """A request on a new connection, and exactly `size` bytes of answer (fewer at the end of the stream)."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(request)
        received = b""
        while len(received) < size and (piece := client.recv(size - len(received))):
            received += piece
    return received
