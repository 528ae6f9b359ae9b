"""crbd with an intruder in it: `python -m tests.server.intruder serve …` or `… socket …` (the swtpm command).

Its engine takes one TPM command more (`attempt`), which does what somebody would do who has taken the process over, in
the thread that runs TPM commands, and answers with what came of it. Nothing of it is in the product.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import crbd.cli.main
import crbd.cli.serve
import crbd.compat.swtpm
from crbd.engine.libtpms import LibtpmsEngine

COMMAND = 0x2000CA11
_HEAD = bytes.fromhex("8001")


def attempt(text: str) -> bytes:
    """The TPM command that makes the intruder try `text`: the name of an attempt and its arguments, by blanks."""
    return _HEAD + (10 + len(text)).to_bytes(4, "big") + COMMAND.to_bytes(4, "big") + text.encode()


def outcome(answer: bytes) -> str:
    """What came of it: `done`, with what there is to tell, or the name of the error."""
    return answer[10:].decode()


def _call(*arguments: str) -> str:
    """A system call by its number."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(*(ctypes.c_long(int(each, 0)) for each in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return str(result)


def _connect(port: str) -> str:
    with socket.create_connection(("127.0.0.1", int(port))):
        return "connected"


def _kill(pid: str) -> str:
    os.kill(int(pid), signal.SIGCONT)
    return "sent"


ATTEMPTS: dict[str, Callable[..., str]] = {
    "call": _call,
    "read": lambda path: str(len(Path(path).read_bytes())),
    "write": lambda path: str(Path(path).write_bytes(b"intruded")),
    "rename": lambda path, new: str(Path(path).rename(new)),
    "list": lambda path: str(len(os.listdir(path))),
    "execute": lambda *command: str(subprocess.run(command, check=False).returncode),
    "connect": _connect,
    "kill": _kill,
}


class IntrudedLibtpms(LibtpmsEngine):
    """libtpms, and the intruder's command."""

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        if int.from_bytes(command[6:10], "big") != COMMAND:
            return super().execute(command)
        name, *arguments = bytes(command[10:]).decode().split()
        try:
            said = f"done {ATTEMPTS[name](*arguments)}"
        except OSError as error:
            said = errno.errorcode.get(error.errno or 0, str(error))
        return _HEAD + (10 + len(said)).to_bytes(4, "big") + bytes(4) + said.encode()


def main() -> int:
    """Run the command."""
    with (
        mock.patch.object(crbd.cli.serve, "LibtpmsEngine", IntrudedLibtpms),
        mock.patch.object(crbd.compat.swtpm, "LibtpmsEngine", IntrudedLibtpms),
    ):
        if sys.argv[1] == "socket":
            return crbd.compat.swtpm.main(sys.argv[1:])
        return crbd.cli.main.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
