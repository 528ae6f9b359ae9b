"""Another TPM program than crbd (`swtpm_setup --tpm`): started, provisioned over its sockets and ended.

It is driven as swtpm's own swtpm_setup does it: one socket pair is its control channel, another its data channel. It
writes its state itself, so what was there goes first, and what a failure left goes too.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crbd.compat.ioctl_connection import ControlClient, carry_out
from crbd.compat.setup_log import Log
from crbd.compat.setup_tpm import TpmProgram
from crbd.control.replies import Done, Info
from crbd.control.requests import GetInfo, Shutdown
from crbd.errors import DaemonError, OperatorError, UsageError
from crbd.provision.options import Existing, ProvisionOptions
from crbd.provision.provisioning import provision_tpm
from crbd.provision.report import ProvisionReport
from crbd.provision.signing import CertificateSigner, TpmDescription
from crbd.provision.tpm import Tpm
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


def provision_other(
    program: TpmProgram,
    uri: str,
    options: ProvisionOptions,
    signer: CertificateSigner | None,
    key: str,
    *,
    log: Log,
) -> ProvisionReport:
    """Another program's TPM. Raises OperatorError; there is no state then, or the one that was to be reconfigured."""
    keeps = options.existing is Existing.RECONFIGURE
    if not keeps:
        remove_state(uri)
    source, _, number = key.partition(",")[0].partition("=")
    descriptors = (int(number),) if source in ("fd", "pwdfd") else ()
    started = ProgramOptions(uri, key, options.profile or "", descriptors)
    try:
        with running(program, started, log) as (execute, description), Tpm.of_engine(execute) as tpm:
            return provision_tpm(tpm, options, signer, description)
    except OperatorError:
        if not keeps:
            remove_state(uri)
        raise


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
