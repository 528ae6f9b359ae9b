"""QEMU's tpm-crb device in a machine whose CPU never runs, reached over qtest and QMP.

`Oracle` is the device together with whatever TPM stands behind it, in the terms of a trace (`qemu_trace`): it carries
out each step and says what came of it. The recorder and the live test both drive it.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.e2e.daemon import dies_with_us
from tests.e2e.waiting import Deadline

from .qemu_backend import ScriptedBackend
from .qemu_qtest import WIDTHS, QtestClient

BASE: Final = 0xFED40000
"""Guest-physical address of locality 0's page."""
CTRL_START: Final = 0x4C
BUFFER: Final = 0x80
_EXECUTION_SECONDS: Final = 60.0
"""The deadline for a command's end; RSA keys take a second or two."""
_RESET_SECONDS: Final = 20.0
"""The deadline for what is waited for on the monitor."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """Which QEMU: the program, and the chroot it lives in, if any (that needs root)."""

    program: str = "qemu-system-x86_64"
    chroot: Path | None = None

    def command(self, *arguments: str) -> list[str]:
        """The command that runs it."""
        inside = ["chroot", str(self.chroot)] if self.chroot else []
        return [*inside, self.program, *arguments]

    def version(self) -> str:
        """The first line of --version. Raises OSError or CalledProcessError where there is no such QEMU."""
        done = subprocess.run(self.command("--version"), check=True, capture_output=True, text=True)
        return done.stdout.splitlines()[0]

    def device(self) -> str:
        """Which of the two devices it has: chunked transfers came with 11.1. Raises as `version` does."""
        match = re.search(r"version (\d+)\.(\d+)", self.version())
        assert match is not None, f"no version in {self.version()!r}"
        return "qemu-11" if (int(match[1]), int(match[2])) >= (11, 1) else "qemu-7.2"


def machine_arguments(machine: str, accelerator: str = "tcg") -> list[str]:
    """QEMU's arguments, but for the descriptors of its three channels.

    Debian 12 builds QEMU without the accelerator called qtest. In a machine that is never started (-S) it makes no
    difference: the qtest protocol is there with every accelerator, all but its clock.
    """
    return [
        *("-machine", f"{machine},accel={accelerator}", "-S", "-display", "none", "-nodefaults", "-no-user-config"),
        *("-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0"),
    ]


class ResetButton:
    """Of QMP (QEMU's docs/interop/qmp-spec: one JSON object a line) just the command system_reset.

    Its answer and the event that tells the reset's end come in either order; with a command in execution, both come
    only after that command's end, because QEMU waits for it.
    """

    def __init__(self, line: socket.socket) -> None:
        """Take QEMU's greeting on `line` and leave the negotiation mode."""
        line.settimeout(_RESET_SECONDS)
        self._lines = line.makefile("rw", encoding="utf-8")
        self._greetings = self._returns = self._resets = 0
        self._read_until(lambda: self._greetings == 1)
        self._execute("qmp_capabilities")
        self._read_until(lambda: self._returns == 1)

    def close(self) -> None:
        """Let go of the socket."""
        self._lines.close()

    def push(self) -> None:
        """Ask for a reset. QEMU carries it out when it next looks."""
        self._execute("system_reset")

    def await_reset(self) -> None:
        """Until the reset that was asked for is over."""
        self._read_until(lambda: self._returns == self._resets == 1)

    def _execute(self, command: str) -> None:
        self._returns = self._resets = 0
        self._lines.write(json.dumps({"execute": command}) + "\n")
        self._lines.flush()

    def _read_until(self, seen: Callable[[], bool]) -> None:
        while not seen():
            message = json.loads(self._lines.readline() or '{"error": "QEMU is gone"}')
            assert "error" not in message, f"QMP: {message['error']}"
            self._greetings += "QMP" in message
            self._returns += "return" in message
            self._resets += message.get("event") == "RESET"


@dataclass(frozen=True, slots=True)
class Machine:
    """A running QEMU. Made by `machine`."""

    qtest: QtestClient
    reset_button: ResetButton


@contextmanager
def machine(qemu: Qemu, control: socket.socket, kind: str = "q35", accelerator: str = "tcg") -> Iterator[Machine]:
    """A QEMU whose TPM is at the other end of `control`, which is closed here once QEMU has it.

    QEMU is killed at the end. Its own words go to standard error.
    """
    with ExitStack() as stack:
        qtest, qtest_theirs = socket.socketpair()
        monitor, monitor_theirs = socket.socketpair()
        given = {"chrtpm": control, "qtest": qtest_theirs, "monitor": monitor_theirs}
        for end in (qtest, monitor, *given.values()):
            stack.enter_context(end)
        arguments = machine_arguments(kind, accelerator)
        for name, end in given.items():
            arguments += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
        arguments += ["-qtest", "chardev:qtest", "-qmp", "chardev:monitor"]
        # An unconnected standard input, and no log of every qtest line on standard error.
        process = subprocess.Popen(
            dies_with_us(qemu.command(*arguments, "-qtest-log", "none")),
            stdin=subprocess.DEVNULL,
            pass_fds=[end.fileno() for end in given.values()],
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        for end in given.values():
            end.close()
        button = ResetButton(monitor)
        stack.callback(button.close)
        yield Machine(QtestClient(qtest), button)


class Oracle:
    """The device, step by step, whatever TPM stands behind it. All offsets are bytes from `BASE`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def write(self, offset: int, data: bytes) -> None:
        """One access of len(data) bytes, in ascending order of address.

        Other lengths than 1, 2, 4 and 8 are for plain memory: QEMU chooses the accesses.
        """
        if len(data) in WIDTHS:
            self.machine.qtest.write(BASE + offset, len(data), int.from_bytes(data, "little"))
        else:
            self.machine.qtest.write_memory(BASE + offset, data)

    def read(self, offset: int, size: int) -> bytes:
        """One access of `size` bytes; other sizes than 1, 2, 4 and 8 are as many accesses as QEMU chooses."""
        if size in WIDTHS:
            return self.machine.qtest.read(BASE + offset, size).to_bytes(size, "little")
        return self.machine.qtest.read_memory(BASE + offset, size)

    def executing(self) -> bool:
        """Whether START is set."""
        return bool(self.machine.qtest.readl(BASE + CTRL_START) & 1)

    def await_end(self) -> None:
        """Until START is clear."""
        deadline = Deadline(_EXECUTION_SECONDS)
        while self.executing():
            assert not deadline.passed, f"START is still set after {deadline.seconds} s"

    def reset(self) -> None:
        """System reset, with no command in execution."""
        self.machine.reset_button.push()
        self.machine.reset_button.await_reset()


class ScriptedOracle(Oracle):
    """The device with a scripted TPM behind it."""

    def __init__(self, machine: Machine, tpm: ScriptedBackend) -> None:
        super().__init__(machine)
        self.tpm = tpm

    def complete(self, response: bytes) -> bytes:
        """Answer the command in execution and wait for its end. The bytes of it that QEMU had sent to the TPM."""
        self.tpm.respond(response)
        self.await_end()
        return self.tpm.take()

    def complete_in_reset(self, response: bytes) -> bytes:
        """System reset with a command in execution, which is answered only once the reset was asked for."""
        self.machine.reset_button.push()
        self.tpm.respond(response)
        self.machine.reset_button.await_reset()
        return self.tpm.take()

    def fail(self) -> None:
        """Break the TPM for good, and wait for the end of the command in execution."""
        self.tpm.fail()
        self.await_end()


class DaemonOracle(Oracle):
    """The device with a real TPM daemon behind it, in the process `daemon`."""

    def __init__(self, machine: Machine, daemon: subprocess.Popen[bytes]) -> None:
        super().__init__(machine)
        self._daemon = daemon

    def finish(self) -> bytes:
        """Wait for the end of the command in execution. The response, from the buffer; no chunked ones."""
        self.await_end()
        size = int.from_bytes(self.machine.qtest.read_memory(BASE + BUFFER + 2, 4), "big")
        return self.machine.qtest.read_memory(BASE + BUFFER, size)

    def kill(self) -> None:
        """Kill the daemon. Every later command fails."""
        self._daemon.kill()
        self._daemon.wait()
