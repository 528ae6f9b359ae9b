"""`swtpm` as a process, and what its clients send."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 20.0
"""Seconds after which something that should have happened is a failure."""

CHECKOUT = Path(__file__).parents[2]
LAUNCHERS = CHECKOUT / "libexec/crbd"
SWTPM = (sys.executable, "-m", "crbd.compat.launch", "swtpm")

INIT = bytes.fromhex("00000002 00000000")
SHUTDOWN = bytes.fromhex("00000003")
GET_CAPABILITY = bytes.fromhex("00000001")
DONE = bytes(4)
GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0010")
STARTUP_CLEAR = bytes.fromhex("8001 0000000c 00000144 0000")
SUCCESS_HEAD = bytes.fromhex("8001 0000000a 00000000")


def swtpm(
    *arguments: str, environment: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        [*SWTPM, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | dict(environment or {}),
        pass_fds=pass_fds,
    )


def wait_until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Return when the condition holds; fail, saying `what` did not happen, after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {patience} s"
        time.sleep(0.002)


def has_pid(path: Path) -> bool:
    """Whether there is a pid in the file."""
    return path.exists() and path.stat().st_size > 0


@contextmanager
def running(
    place: Path,
    *arguments: str,
    state: bool = True,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[str]]:
    """`swtpm socket --tpm2` with state in `place/state` and a pid file `place/pid`, from the moment that it serves."""
    own = ["--tpm2", "--pid", f"file={place / 'pid'}"]
    if state:
        (place / "state").mkdir(exist_ok=True)
        own += ["--tpmstate", f"dir={place / 'state'}"]
    with subprocess.Popen(
        [*SWTPM, "socket", *own, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(environment or {}),
        pass_fds=pass_fds,
    ) as process:
        try:
            wait_until(lambda: has_pid(place / "pid") or process.poll() is not None, "the pid file")
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            yield process
        finally:
            process.kill()


@contextmanager
def killed(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    """At the end of the block, if it still runs: a test that fails must not wait for it."""
    try:
        yield
    finally:
        process.kill()


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> int:
    """Send the signal; the exit status."""
    process.send_signal(number)
    return process.wait(PATIENCE)


@contextmanager
def connected(where: Path | int) -> Iterator[socket.socket]:
    """A client at a UNIX socket, or a TCP port of 127.0.0.1."""
    with socket.socket(socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        client.connect(str(where) if isinstance(where, Path) else ("127.0.0.1", where))
        yield client


def receive(client: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, fewer at the end of the stream."""
    received = b""
    while len(received) < size and (piece := client.recv(size - len(received))):
        received += piece
    return received


def run_command(client: socket.socket, command: bytes) -> bytes:
    """A TPM command's whole response; what there is of it at the end of the stream."""
    client.sendall(command)
    head = receive(client, 10)
    return head + receive(client, int.from_bytes(head[2:6], "big") - 10) if len(head) == 10 else head


def ask(where: Path, request: bytes, size: int = 4) -> bytes:
    """A control request on a connection of its own."""
    with connected(where) as client:
        client.sendall(request)
        return receive(client, size)


def is_at_end(client: socket.socket) -> bool:
    """Whether the daemon closes the connection without saying more."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def mode_of(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.lstat().st_mode)
