"""The TPM daemon under test: crbd, or swtpm as an oracle (CRBD_E2E_DAEMON=swtpm).

Everything that distinguishes the two on their command lines is in `_command`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .waiting import Deadline, DeadlineError


class DaemonKind(Enum):
    """Whose command line is used."""

    CRBD = "crbd"
    SWTPM = "swtpm"

    @classmethod
    def chosen(cls) -> DaemonKind:
        """What CRBD_E2E_DAEMON asks for; crbd by default."""
        return cls(os.environ.get("CRBD_E2E_DAEMON", cls.CRBD.value))


@contextmanager
def fresh_directory() -> Iterator[Path]:
    """A place for one TPM's state and sockets.

    Not pytest's tmp_path: a UNIX socket's path must fit 107 bytes, and pytest's directories are named after the tests.
    """
    with tempfile.TemporaryDirectory(prefix="crbd-e2e-") as directory:
        yield Path(directory)


def dies_with_us(command: list[str]) -> list[str]:
    """`command` such that the kernel kills it when the test process is gone (setpriv is in util-linux)."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command]


@dataclass(frozen=True, slots=True)
class TpmDaemon:
    """A running daemon: its sockets (`data` only where it was asked for), and in `log` all that it printed."""

    process: subprocess.Popen[bytes]
    control: Path
    data: Path | None
    log: Path

    def wait_ended(self, seconds: float = 10) -> int:
        """The exit status, once it ends by itself."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise DeadlineError(f"the TPM daemon still runs after {seconds} s; its log:\n{self.said()}") from error

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-1000:]


CRBD = (sys.executable, "-m", "crbd")


def _command(
    kind: DaemonKind, state: Path, control: Path, data: Path | None, *, create: bool, program: Sequence[str]
) -> list[str]:
    if kind is DaemonKind.SWTPM:
        # swtpm cannot be told not to make a new TPM, so `create` has no counterpart.
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
        if data is not None:
            command += ["--server", f"type=unixio,path={data}", "--flags", "not-need-init,startup-clear"]
        return command
    command = [*program, "serve", "--state", str(state), "--ctrl", f"unix:{control}"]
    if create:
        command.append("--create")
    if data is not None:
        command += ["--data", f"unix:{data}", "--flags", "not-need-init,startup-clear"]
    return command


def _await_listening(daemon: TpmDaemon, path: Path) -> None:
    """Until `path` accepts connections. A client that connects and closes is harmless."""
    deadline = Deadline(15)
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError) as error:
                reason = error
            else:
                return
        if deadline.passed:
            raise DeadlineError(f"{path} does not accept connections: {reason}; log:\n{daemon.said()}")
        try:
            # The pause between two tries is spent watching for the daemon's death.
            status = daemon.process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the TPM daemon ended with status {status}; log:\n{daemon.said()}")


@contextmanager
def tpm_daemon(
    directory: Path,
    *,
    create: bool = True,
    tools: bool = False,
    kind: DaemonKind | None = None,
    state: Path | None = None,
    options: Sequence[str] = (),
    program: Sequence[str] = CRBD,
) -> Iterator[TpmDaemon]:
    """A daemon whose state and sockets live in `directory`, in foreground, killed at the end if it still runs.

    For QEMU it has a control socket alone, `DIRECTORY/tpm.ctrl`. With `tools` it is powered on and also has the data
    socket `DIRECTORY/tpm`: that pair of names is what libtss2-tcti-swtpm derives from `path=DIRECTORY/tpm`. Without
    `create` the state must exist already. `kind`: another one than the chosen; `state`: another directory for it;
    `options` come last on the command line; `program` is what crbd is started by.
    """
    state = state or directory / "state"
    state.mkdir(exist_ok=True)
    control = directory / "tpm.ctrl"
    data = directory / "tpm" if tools else None
    command = dies_with_us(
        [*_command(kind or DaemonKind.chosen(), state, control, data, create=create, program=program), *options]
    )
    log = directory / "daemon.log"
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    daemon = TpmDaemon(process, control, data, log)
    try:
        _await_listening(daemon, data if data is not None else control)
        yield daemon
    finally:
        process.kill()
        process.wait()
