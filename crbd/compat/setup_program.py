"""Another TPM program than crbd (`swtpm_setup --tpm`): started, provisioned over its sockets and ended.

It is driven as swtpm's own swtpm_setup does it: one socket pair is its control channel, another its data channel. It
writes its state itself, so what was there goes first, and what a failure left goes too.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crbd.compat.ioctl_connection import ControlClient, carry_out
from crbd.compat.setup_log import Log
from crbd.control.replies import Done, Info
from crbd.control.requests import GetInfo, Shutdown
from crbd.errors import DaemonError, UsageError
from crbd.provision.signing import TpmDescription
from crbd.tpm.head import HEAD_SIZE

ANSWER_PATIENCE: Final = 300.0
"""Seconds for the answer to a TPM command: an RSA-4096 key can take minutes on a slow machine."""
END_PATIENCE: Final = 5.0
"""Seconds for the program to end when it was told to."""
MAX_RESPONSE: Final = 65_536
"""Bytes of a TPM response at most."""
STATE_SUFFIXES: Final = ("permall", "volatilestate", "savestate")
_LINEAR_MAGIC_SIZE: Final = 8
"""Bytes at the beginning of a linear state file that say what it is."""


@dataclass(frozen=True, slots=True)
class TpmProgram:
    """The program and the arguments it is always given, as `swtpm socket`."""

    command: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> TpmProgram:
        """Of --tpm's value. Raises UsageError where it is not executable."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--tpm {text}: {error}") from error
        if not words or shutil.which(words[0]) is None:
            raise UsageError(f"swtpm at {words[0] if words else text} is not an executable.")
        return cls(tuple(words))

    def capabilities(self) -> list[str]:
        """What it says it can do. Raises DaemonError."""
        found = self._printed("--print-capabilities", "--tpm2")
        features = found.get("features")
        return [str(feature) for feature in features] if isinstance(features, list) else []

    def profiles(self) -> list[str]:
        """The names of its profiles. Raises DaemonError."""
        found = self._printed("--print-capabilities", "--tpm2").get("profiles")
        names = found.get("names") if isinstance(found, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    def _printed(self, *arguments: str) -> dict[str, object]:
        try:
            done = subprocess.run([*self.command, *arguments], check=False, capture_output=True, timeout=END_PATIENCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DaemonError(f"Could not start swtpm '{self.command[0]}': {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise DaemonError(f"Failed to run swtpm '{self.command[0]}': {said}")
        try:
            found = json.loads(done.stdout)
        except ValueError as error:
            raise DaemonError(f"What '{self.command[0]}' prints of its capabilities is no JSON.") from error
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """How the program is started. `descriptors` are those it reads a key or a profile from."""

    state: str
    """swtpm's backend URI."""
    key: str = ""
    profile: str = ""
    descriptors: tuple[int, ...] = ()


@contextlib.contextmanager
def running(
    program: TpmProgram, options: ProgramOptions, log: Log
) -> Iterator[tuple[Callable[[bytes], bytes], TpmDescription]]:
    """The program's TPM, started with TPM2_Startup(CLEAR): what runs a command on it, and how it describes itself.

    Raises DaemonError.
    """
    control, its_control = socket.socketpair()
    data, its_data = socket.socketpair()
    with control, data, its_control, its_data:
        command = [*program.command, *_arguments(program, options, log)]
        command += ["--server", f"type=tcp,fd={its_data.fileno()}"]
        command += ["--ctrl", f"type=unixio,clientfd={its_control.fileno()}"]
        output = subprocess.DEVNULL if log.path else None
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(its_control.fileno(), its_data.fileno(), *options.descriptors),
            )
        except OSError as error:
            raise DaemonError(f"Could not start swtpm '{program.command[0]}': {error.strerror}") from error
        # With the program's ends closed here, its end is the end of the streams.
        its_control.close()
        its_data.close()
        client = ControlClient(control)
        try:
            info = carry_out(client, GetInfo(TpmDescription.INFO_FLAGS), Info, "CMD_GET_INFO")
            description = TpmDescription.parse(info.text.rstrip(b"\0").decode(errors="replace"))
            yield lambda command: _execute(data, command), description
            carry_out(client, Shutdown(), Done, "CMD_SHUTDOWN")
        except BaseException:
            process.terminate()
            raise
        finally:
            _end(process)


def remove_state(uri: str) -> None:
    """Make the place of the state empty for a new TPM. Raises UsageError."""
    path = Path(uri.partition("://")[2])
    try:
        if path.is_block_device():
            with path.open("r+b") as device:
                device.write(bytes(_LINEAR_MAGIC_SIZE))
            return
        if uri.startswith("file://"):
            path.unlink(missing_ok=True)
            return
        for entry in path.iterdir():
            if entry.name.endswith(STATE_SUFFIXES):
                entry.unlink()
    except OSError as error:
        raise UsageError(f"Could not remove the state in {path}: {error.strerror}") from error


def _arguments(program: TpmProgram, options: ProgramOptions, log: Log) -> Sequence[str]:
    lock = ",lock" if "tpmstate-opt-lock" in program.capabilities() else ""
    arguments = ["--flags", "not-need-init,startup-clear", "--tpmstate", f"backend-uri={options.state}{lock}", "--tpm2"]
    if options.key:
        arguments += ["--key", options.key]
    if options.profile:
        arguments += ["--profile", f"profile={options.profile}"]
    if log.path:
        arguments += ["--log", f"file={log.path}"]
    return arguments


def _execute(connected: socket.socket, command: bytes) -> bytes:
    """One TPM command over a data channel. Raises DaemonError."""
    connected.settimeout(ANSWER_PATIENCE)
    try:
        connected.sendall(command)
        response = _exactly(connected, HEAD_SIZE)
        size = int.from_bytes(response[2:6], "big")
        if not HEAD_SIZE <= size <= MAX_RESPONSE:
            raise DaemonError(f"The TPM answers with a response of {size} bytes.")
        return response + _exactly(connected, size - HEAD_SIZE)
    except OSError as error:
        raise DaemonError(f"The TPM does not answer: {error}") from error


def _exactly(connected: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = connected.recv(size - len(received))
        if not piece:
            raise DaemonError("The TPM closed its data channel.")
        received += piece
    return received


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the program, which was told to end; what does not is killed."""
    try:
        process.wait(END_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
