"""A guest under QEMU (x86, TCG) with a TPM, whose shell the tests command over the serial console.

The guest is the image of `scripts/guest-image`; the protocol on the console is that of guest/init.
"""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from .console import Console, GuestGoneError, Monitor
from .daemon import dies_with_us
from .waiting import Deadline, DeadlineError

_READY = re.compile(rb"crbd-guest: ready\r?\n")
_PIECE = 2000
"""Characters of a script in one console line; a terminal holds 4095."""


class TpmDevice(Enum):
    """QEMU's TPM frontends for a PC."""

    CRB = "tpm-crb"
    TIS = "tpm-tis"


class Firmware(Enum):
    """What runs before the kernel."""

    SEABIOS = "seabios"
    OVMF = "ovmf"

    @property
    def boot_seconds(self) -> float:
        """The deadline for power-on to shell: several times what it takes where it was tried (4.5 s and 18 s)."""
        return {Firmware.SEABIOS: 60.0, Firmware.OVMF: 120.0}[self]


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What is booted."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True, slots=True)
class Output:
    """What a command in the guest ended with and said (both streams, in the guest's order)."""

    status: int
    text: str


class Guest:
    """A running guest. Made by `guest` and `started`."""

    def __init__(
        self, process: subprocess.Popen[bytes], console: Console, monitor: Monitor, boot_seconds: float
    ) -> None:
        self.console = console
        self.monitor = monitor
        self._process = process
        self._boot_seconds = boot_seconds
        self._numbers = itertools.count()

    def await_shell(self) -> None:
        """Until the guest has booted."""
        self.console.read_until(_READY, Deadline(self._boot_seconds))
        # A line break is sent as one byte from now on, and what we type does not come back.
        self.console.send("stty -echo -onlcr\n")

    def run(self, script: str, seconds: float = 60) -> Output:
        """Run a /bin/sh script in the guest to its end. DeadlineError if it has none within `seconds`."""
        deadline = Deadline(seconds)
        name = f"s{next(self._numbers)}"
        encoded = base64.b64encode(script.encode()).decode()
        for start in range(0, len(encoded), _PIECE):
            self.console.send(f"put {name} {encoded[start : start + _PIECE]}\n")
            self.console.read_until(re.compile(rb"crbd-guest: more %s\r?\n" % name.encode()), deadline)
        self.console.send(f"run {name}\n")
        self.console.read_until(re.compile(rb"crbd-guest: begin %s\r?\n" % name.encode()), deadline)
        end = re.compile(rb"\ncrbd-guest: end %s (\d+)\r?\n" % name.encode())
        said, match = self.console.read_until(end, deadline)
        return Output(int(match[1]), said.decode(errors="replace"))

    def read(self, script: str, seconds: float = 60) -> str:
        """What a script says that must succeed, without the last line break."""
        output = self.run(script, seconds)
        assert output.status == 0, f"status {output.status} from the guest's\n{script}\n{output.text}"
        return output.text.removesuffix("\n")

    def reset(self) -> None:
        """Push the reset button, and wait for the shell."""
        # The event RESET may come before the answer: what shows that it took place is the console's next welcome.
        self.monitor.execute("system_reset")
        self.await_shell()

    def kill(self) -> None:
        """Kill QEMU."""
        self._process.kill()
        self._process.wait()

    def wait_ended(self, seconds: float = 20) -> int:
        """QEMU's exit status, once it ends by itself."""
        return self._process.wait(timeout=seconds)

    def power_off(self) -> None:
        """Have the guest switch itself off, and wait for QEMU's end."""
        self.console.send("poweroff -f\n")
        try:
            status = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired as error:
            raise DeadlineError(f"QEMU runs on after power-off\n{self.console.tail()}") from error
        assert status == 0, f"QEMU ended with status {status}"


def _ovmf_options(directory: Path) -> list[str]:
    """The firmware's code, and its variables in a copy of their own."""
    variables = directory / "OVMF_VARS.fd"
    if not variables.exists():
        shutil.copyfile("/usr/share/OVMF/OVMF_VARS_4M.fd", variables)
    return [
        *("-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
    ]


def _command(image: GuestImage, tpm: Path, device: TpmDevice, console_fd: int, monitor_fd: int) -> list[str]:
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "512", "-display", "none"),
        *("-nodefaults", "-no-user-config"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", "console=ttyS0,115200 quiet"),
        *("-chardev", f"socket,id=chrtpm,path={tpm}", "-tpmdev", "emulator,id=tpm0,chardev=chrtpm"),
        *("-device", f"{device.value},tpmdev=tpm0"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=monitor,fd={monitor_fd}", "-mon", "chardev=monitor,mode=control"),
    ]


@contextmanager
def guest(
    image: GuestImage,
    directory: Path,
    tpm: Path,
    device: TpmDevice,
    firmware: Firmware = Firmware.SEABIOS,
    *,
    options: Sequence[str] = (),
    booted: bool = True,
) -> Iterator[Guest]:
    """A booted guest whose TPM is the daemon with the control socket `tpm`; QEMU is killed at the end if it still runs.

    `directory` keeps QEMU's own words (`qemu.log`) and OVMF's variables; a second guest in it finds the latter again.
    `options` come last on QEMU's command line. Without `booted` only QEMU's monitor is waited for.
    """

    def command(console_fd: int, monitor_fd: int) -> list[str]:
        firmware_options = _ovmf_options(directory) if firmware is Firmware.OVMF else []
        return [*_command(image, tpm, device, console_fd, monitor_fd), *firmware_options, *options]

    with started(command, directory, firmware.boot_seconds, booted=booted) as running:
        yield running


@contextmanager
def started(
    command: Callable[[int, int], list[str]], directory: Path, boot_seconds: float, *, booted: bool = True
) -> Iterator[Guest]:
    """A guest that `command` starts: it is told the descriptors of the sockets for console and monitor.

    It has `boot_seconds` from power-on to shell. `directory` and `booted` are as in `guest`.
    """
    log = directory / "qemu.log"
    with ExitStack() as stack:
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        for end in (*ours, *theirs):
            stack.enter_context(end)
        fds = [end.fileno() for end in theirs]
        with log.open("ab") as out:
            process = subprocess.Popen(
                dies_with_us(command(*fds)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
            )
        stack.callback(process.wait)
        stack.callback(process.kill)
        for end in theirs:
            end.close()
        running = Guest(process, Console(ours[0]), Monitor(ours[1]), boot_seconds)
        try:
            running.monitor.greet()
            if booted:
                running.await_shell()
        except GuestGoneError as error:
            raise GuestGoneError(f"{error}\nQEMU said: {log.read_text(errors='replace')[-2000:]}") from error
        yield running
