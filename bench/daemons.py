"""Starting what is compared: crbd, swtpm and two echo servers, each in a home directory of its own, on CPUs of choice.

A daemon inherits its affinity: this process takes it on, starts the daemon and goes back. So every thread of the daemon
is bound from its first instruction on.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import commands

HERE = Path(__file__).resolve().parent

CRBD = "crbd"
BARE_CRBD = "crbd-bare"
"""crbd whose commands do not go through the CRB device (bare_crbd.py)."""
SWTPM = "swtpm"
C_ECHO = "c-echo"
PYTHON_ECHO = "python-echo"
SUBJECTS = (SWTPM, CRBD, BARE_CRBD, C_ECHO, PYTHON_ECHO)
TPMS = (SWTPM, CRBD, BARE_CRBD)

START_DEADLINE = 30.0
"""Seconds that a daemon has for its first reply; a new TPM may have to be made first."""

STOP_DEADLINE = 15.0
"""Seconds from SIGTERM to the end."""

FLAGS = "not-need-init,startup-clear"


class DidNotRunError(Exception):
    """A daemon could not be started, or broke off. The text is one line."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What is executed for each subject; `c_echo` is None where there is no C compiler."""

    python: str
    swtpm: str
    swtpm_fsync: bool
    c_echo: Path | None

    def command_line(self, subject: str, home: Path) -> list[str]:
        """The whole command line of `subject` with sockets and state in `home`."""
        data, control, state = home / "data.sock", home / "ctrl.sock", home / "state"
        if subject == SWTPM:
            store = f"dir={state},fsync" if self.swtpm_fsync else f"dir={state}"
            ends = ["--server", f"type=unixio,path={data}", "--ctrl", f"type=unixio,path={control}"]
            return [self.swtpm, "socket", "--tpm2", *ends, "--tpmstate", store, "--flags", FLAGS]
        if subject in (CRBD, BARE_CRBD):
            program = ["-m", "crbd"] if subject == CRBD else [str(HERE / "bare_crbd.py")]
            create = [] if any(state.iterdir()) else ["--create"]
            ends = ["--data", f"unix:{data}", "--ctrl", f"unix:{control}"]
            return [self.python, *program, "serve", "--state", str(state), *ends, "--flags", FLAGS, *create]
        if subject == PYTHON_ECHO:
            return [self.python, str(HERE / "echo.py"), str(data)]
        if subject == C_ECHO and self.c_echo is not None:
            return [str(self.c_echo), str(data)]
        raise DidNotRunError(f"{subject}: no C compiler (cc) here")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process in bytes: resident, and resident with each shared page divided by the number of its users."""

    rss: int
    pss: int


class Daemon:
    """A started daemon. A context manager: at the latest when the block ends, so does the daemon (`stop`)."""

    def __init__(self, subject: str, home: Path, programs: Programs, cpus: set[int]) -> None:
        """Start `subject`; `home` is created, and state that is in it already is used. Raises DidNotRunError."""
        self.subject = subject
        self.home = home
        (home / "state").mkdir(parents=True, exist_ok=True)
        command_line = programs.command_line(subject, home)
        for stale in home.glob("*.sock"):
            stale.unlink()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with (home / "log").open("ab") as log, bound_to(cpus):
            self.started_at = time.perf_counter_ns()
            try:
                self._process = subprocess.Popen(
                    command_line, cwd=HERE.parent, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            except OSError as error:
                raise DidNotRunError(f"{subject}: {command_line[0]}: {error.strerror}") from error

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.stop()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def connect_data(self) -> socket.socket:
        """A blocking connection to the data socket; tries until the daemon listens. Raises DidNotRunError."""
        return self._connect(self.home / "data.sock")

    def connect_control(self) -> socket.socket:
        """A blocking connection to the control socket; tries until the daemon listens. Raises DidNotRunError."""
        return self._connect(self.home / "ctrl.sock")

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + START_DEADLINE
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
            else:
                return connection
            self._check_alive()
            if time.monotonic() > deadline:
                raise DidNotRunError(f"{self.subject}: nobody listens at {path.name} after {START_DEADLINE:.0f} s")
            time.sleep(0.0005)

    def first_reply(self) -> socket.socket:
        """Connect and ask (TPM2_GetCapability) until the TPM answers with success. Returns the connection.

        Raises DidNotRunError.
        """
        connection = self.connect_data()
        connection.settimeout(START_DEADLINE)
        deadline = time.monotonic() + START_DEADLINE
        while time.monotonic() < deadline:
            try:
                connection.sendall(commands.get_capability())
                response = connection.recv(4096)
            except OSError as error:
                self._explain(f"no answer to the first command: {error}")
            if not response:
                self._explain("closed the connection at the first command")
            if commands.response_code(response) == commands.RC_SUCCESS:
                connection.settimeout(None)
                return connection
            time.sleep(0.0005)
        raise DidNotRunError(f"{self.subject}: the TPM does not start: {commands.response_code(response):#x}")

    def _explain(self, what: str) -> NoReturn:
        """Raise DidNotRunError: what the daemon said, if this was its end, else `what`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._check_alive()
        raise DidNotRunError(f"{self.subject}: {what}")

    def _check_alive(self) -> None:
        status = self._process.poll()
        if status is not None:
            said = (self.home / "log").read_text(errors="replace").strip().splitlines() or ["(it said nothing)"]
            raise DidNotRunError(f"{self.subject}: ended with status {status}: {said[-1]}")

    def stop(self) -> int:
        """SIGTERM; returns the exit status (negative: ended by that signal, -9 when it had to be killed)."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def memory(self) -> Memory:
        """What /proc says now."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
        return Memory(sizes["Rss"], sizes["Pss"])

    def open_files(self) -> int:
        """Number of open file descriptors now."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def libtpms(self) -> str:
        """Version of the libtpms that the running daemon has mapped, as its file name has it; `-` for none."""
        found = re.search(r"/libtpms\.so\.([\d.]+)$", Path(f"/proc/{self.pid}/maps").read_text(), re.MULTILINE)
        return found[1] if found else "-"


@contextmanager
def bound_to(cpus: set[int]) -> Iterator[None]:
    """Bind this thread, and whatever it starts meanwhile, to `cpus`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def unwind_at_sigterm() -> None:
    """From now on SIGTERM ends this process as an exception does, so that daemons and states are taken away."""

    def unwind(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)


def load_average() -> str:
    """Processes that wanted a CPU at once: over the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def find_programs(python: str, swtpm: str, swtpm_fsync: bool, scratch: Path) -> Programs:
    """Settle what will be executed; compiles echo.c into `scratch`. Raises DidNotRunError if swtpm lacks the option."""
    if swtpm_fsync and "tpmstate-dir-backend-opt-fsync" not in _output(
        swtpm, "socket", "--tpm2", "--print-capabilities"
    ):
        raise DidNotRunError(f"{swtpm}: this version has no fsync option for its state directory")
    return Programs(python or sys.executable, swtpm, swtpm_fsync, _compile_echo(scratch))


def _compile_echo(scratch: Path) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    program = scratch / "echo"
    done = subprocess.run([compiler, "-O2", "-o", str(program), str(HERE / "echo.c")], check=False)
    return program if done.returncode == 0 else None


def describe_machine(programs: Programs, scratch: Path) -> dict[str, str]:
    """What a reader must know about the machine and the programs to judge the figures."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = found[1] if found else "unknown"
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": f"{model}, {os.cpu_count()} CPUs, allowed here: {sorted(os.sched_getaffinity(0))}",
        "governor": governor.read_text().strip() if governor.exists() else "unknown",
        "kernel": os.uname().release,
        "load before": load_average(),
        "python (client)": sys.version.split()[0],
        "python (crbd)": _output(programs.python, "--version"),
        "swtpm": _output(programs.swtpm, "--version").split(",")[0] + (" with fsync" if programs.swtpm_fsync else ""),
        "state on": _output("stat", "--file-system", "--format=%T", str(scratch)),
    }


def _output(*command_line: str) -> str:
    try:
        done = subprocess.run(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        return f"{command_line[0]}: {error.strerror}"
    return done.stdout.strip()
