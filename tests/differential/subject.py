"""The two programs that are compared, and how each is run: the same arguments, the same place, the same stimuli."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATIENCE = 20.0
"""Seconds after which something that should have happened is a failure."""
QUIET = 0.2
"""Seconds without a further byte that make an answer whole whose size is not known."""
SILENCE = 1.0
"""Seconds after which no answer is taken for none."""


RUNS = 1000
"""The status that stands for a program that serves."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One of the two: the directory that holds its `swtpm`, `swtpm_ioctl` and `swtpm_bios`."""

    name: str
    directory: Path

    def program(self, name: str) -> str:
        """The path of one of its programs."""
        return str(self.directory / name)


DEBIAN = Subject("swtpm", Path("/usr/bin"))


@cache
def crbd() -> Subject:
    """This checkout's crbd in swtpm's place."""
    # In a checkout that is not installed the launchers need to be told which Python has what crbd needs.
    os.environ.setdefault("CRBD_PYTHON", sys.executable)
    done = subprocess.run(
        [sys.executable, "-m", "crbd", "compat-path"], check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    return Subject("crbd", Path(done.stdout.strip()))


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that ran to its end."""

    status: int
    out: str
    errors: str


def run(
    subject: Subject, name: str, *arguments: str, environment: Mapping[str, str] | None = None, stdin: bytes = b""
) -> Ended:
    """Run one of the subject's programs to its end."""
    done = subprocess.run(
        [subject.program(name), *arguments],
        check=False,
        capture_output=True,
        input=stdin,
        env=os.environ | dict(environment or {}),
        timeout=PATIENCE,
    )
    return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def start(subject: Subject, place: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
    """Run `swtpm` with these arguments until it ends or serves, which its pid file shows; then it is killed (RUNS)."""
    pid = place / "started"
    pid.unlink(missing_ok=True)
    option = [] if "--pid" in arguments else ["--pid", f"file={pid}"]
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [subject.program("swtpm"), *arguments, *option],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env=os.environ | dict(environment or {}),
        ) as process,
    ):
        try:
            wait_until(lambda: has_text(pid) or process.poll() is not None, "the pid file or the end")
            serves = _stays(process)
        finally:
            process.kill()
        status = RUNS if serves else process.wait()
        out.seek(0)
        errors.seek(0)
        said = "" if serves else errors.read().decode(errors="replace")
        return Ended(status, out.read().decode(errors="replace"), said)


def _stays(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process is there for a while: swtpm powers its TPM on, and may fail, behind its pid file."""
    try:
        process.wait(SILENCE)
    except subprocess.TimeoutExpired:
        return True
    return False


@dataclass(slots=True)
class Daemon:
    """A running `swtpm socket` whose files are in `place`: ctrl, data, pid, state/, errors."""

    process: subprocess.Popen[bytes]
    place: Path

    def control(self) -> Channel:
        """A new connection to the control socket."""
        return Channel(self.place / "ctrl")

    def data(self) -> Channel:
        """A new connection to the data socket."""
        return Channel(self.place / "data")

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Send the signal; how the process ended."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self, seconds: float = 5.0) -> str:
        """How the process ended, once it did: `status 0`, `signal SIGHUP`; `running` if it does not end."""
        try:
            return status_text(self.process.wait(seconds))
        except subprocess.TimeoutExpired:
            return "running"


def status_text(status: int) -> str:
    """A process's end as an observation."""
    if status == RUNS:
        return "serves"
    return f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


class Channel:
    """One client connection to a UNIX socket."""

    def __init__(self, path: Path | socket.socket) -> None:
        if isinstance(path, socket.socket):
            self.socket = path
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(path))

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, text: str) -> None:
        """Send bytes, given as hexadecimal digits."""
        self.socket.sendall(bytes.fromhex(text))

    def ask(self, text: str, size: int = 0, wait: float = PATIENCE) -> str:
        """Send, and what comes back."""
        try:
            self.send(text)
        except (BrokenPipeError, ConnectionResetError):
            return "closed"
        return self.answer(size, wait)

    def answer(self, size: int = 0, wait: float = PATIENCE) -> str:
        """The bytes that arrive, in hexadecimal: `size` of them, or until QUIET. `wait` is for the first of them.

        `closed` stands for the end of the stream, `nothing` for silence.
        """
        received = b""
        while not size or len(received) < size:
            # A refusal is shorter than the success that `size` is about: it is whole when nothing follows.
            patient = size and (not received or not any(received[:4]))
            self.socket.settimeout(QUIET if received and not patient else wait)
            try:
                piece = self.socket.recv(1 << 16)
            except TimeoutError:
                return received.hex() or "nothing"
            except ConnectionResetError:
                piece = b""
            if not piece:
                return f"{received.hex()} closed".strip()
            received += piece
        return received.hex()

    def response(self, text: str, wait: float = PATIENCE) -> str:
        """Send a TPM command and read its response, as long as its head says."""
        try:
            self.send(text)
        except (BrokenPipeError, ConnectionResetError):
            return "closed"
        return self.whole_response(wait)

    def whole_response(self, wait: float = PATIENCE) -> str:
        """A TPM response, as long as its head says."""
        head = self.answer(10, wait)
        if len(head) != 20:
            return head
        rest = int(head[4:12], 16) - 10
        return head + (self.answer(rest, wait) if rest > 0 else "")


@contextmanager
def running(
    subject: Subject,
    place: Path,
    *options: str,
    sockets: str = "ctrl data",
    fds: tuple[int, ...] = (),
    mask: int = 0o22,
) -> Iterator[Daemon]:
    """`swtpm socket --tpm2` with its state in place/state, from the moment that its pid file is there.

    `sockets` names the UNIX sockets it is told to open; `fds` are descriptors that it inherits.
    """
    state = place / "state"
    state.mkdir(exist_ok=True)
    command = [subject.program("swtpm"), "socket", "--tpm2", "--pid", f"file={place / 'pid'}"]
    if not any(option.startswith("--tpmstate") for option in options):
        command += ["--tpmstate", f"dir={state}"]
    if "ctrl" in sockets.split():
        command += ["--ctrl", f"type=unixio,path={place / 'ctrl'}"]
    if "data" in sockets.split():
        command += ["--server", f"type=unixio,path={place / 'data'}"]
    with (
        (place / "errors").open("wb") as errors,
        subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=fds, umask=mask
        ) as process,
    ):
        try:
            wait_until(lambda: has_text(place / "pid") or process.poll() is not None, "the pid file")
            assert process.poll() is None, (place / "errors").read_text()
            yield Daemon(process, place)
        finally:
            process.kill()


def has_text(path: Path) -> bool:
    """Whether the file is there and not empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return when the condition holds; fail, saying `what` did not happen, after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        time.sleep(0.005)


def told(ended: Ended, place: Path) -> str:
    """What a program that ended said: its status and first lines, without what differs from run to run."""
    return f"{status_text(ended.status)}: {first_line(ended.errors, place) or first_line(ended.out, place)}"


def first_line(text: str, place: Path) -> str:
    """The first line of `text` with the place, the pid and the program's path taken out."""
    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    line = line.replace(str(place), "PLACE")
    line = re.sub(r"(^|\s)/\S*/(swtpm\w*)", r"\1\2", line)
    return re.sub(r"\b(pid|PID|process)[ =:]*\d+", r"\1 N", line)


REGISTERS = "crbd.registers"
"""What crbd keeps beside swtpm's files (docs/state-directory.md). Lists leave it out; one scenario looks at it."""


def modes(place: Path) -> str:
    """The files under a directory, their kinds and modes: `data socket 0770, state/tpm2-00.permall file 0640`."""
    kinds = {0o140000: "socket", 0o100000: "file", 0o040000: "directory"}
    found = []
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        if path.name != REGISTERS:
            found.append(f"{path.relative_to(place)} {kinds.get(mode & 0o170000, '?')} {mode & 0o7777:04o}")
    return ", ".join(found)


def names(directory: Path) -> str:
    """The files in a directory."""
    return ", ".join(sorted(path.name for path in directory.iterdir() if path.name != REGISTERS)) or "none"
