"""Carries out accesses on QEMU's device and writes down what it does: one `Step` for each."""

from __future__ import annotations

from typing import Final

from .qemu_machine import BUFFER, CTRL_START, DaemonOracle, Oracle, ScriptedOracle
from .qemu_trace import Completed, Established, Failed, Read, Reset, Step, Write

LOC_STATE: Final = 0x00
LOC_CTRL: Final = 0x08
LOC_STS: Final = 0x0C
CTRL_REQ: Final = 0x40
CTRL_STS: Final = 0x44
CTRL_CANCEL: Final = 0x48
CONTROL_AREA: Final = 0x80
"""Bytes of the control area, which begins at 0."""
BUFFER_SIZE: Final = 0xF80
"""Bytes of the data buffer, which begins behind the control area."""

REQUEST_ACCESS: Final = 1
RELINQUISH: Final = 2
CMD_READY: Final = 1
GO_IDLE: Final = 2
START: Final = 1
RSP_RETRY: Final = 2
NEXT_CHUNK: Final = 4


def tpm_bytes(size: int, code: int, seed: int = 0, declared: int | None = None) -> bytes:
    """`size` bytes: a TPM head (tag 8001, big-endian `declared` or else `size`, `code`) and a recognisable pattern."""
    head = b"\x80\x01" + (size if declared is None else declared).to_bytes(4, "big") + code.to_bytes(4, "big")
    return (head + bytes((seed + 7 * index + (index >> 8)) & 0xFF for index in range(size)))[:size]


class Recorder:
    """What every trace is made of. Each method carries its step out; those that read return what came."""

    def __init__(self, oracle: Oracle) -> None:
        """Begin a trace, with power-on: `oracle`'s QEMU must be fresh, its TPM's tpmEstablished flag clear."""
        self._oracle = oracle
        self.steps: list[Step] = [Established(False)]
        self.reset()

    def reset(self) -> None:
        """System reset, with no command in execution."""
        self._oracle.reset()
        self.steps.append(Reset())

    def write(self, offset: int, value: int, width: int = 4) -> None:
        """One write access of `width` bytes."""
        self.write_bytes(offset, value.to_bytes(width, "little"))

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write bytes: one access, where `data` is as long as one can be."""
        self._oracle.write(offset, data)
        self.steps.append(Write(offset, data))

    def read(self, offset: int, width: int = 4) -> bytes:
        """One read access of `width` bytes; or memory, for other widths than 1, 2, 4 and 8."""
        value = self._oracle.read(offset, width)
        self.steps.append(Read(offset, value))
        return value

    def look(self, buffer: int = 0) -> None:
        """Read the whole control area, and `buffer` bytes of the data buffer."""
        self.read(0, CONTROL_AREA)
        if buffer:
            self.read(BUFFER, buffer)

    def make_ready(self) -> None:
        """Request access and cmdReady."""
        self.write(LOC_CTRL, REQUEST_ACCESS)
        self.write(CTRL_REQ, CMD_READY)

    @property
    def executing(self) -> bool:
        """Whether START is set. Not recorded."""
        return self._oracle.executing()


class ScriptedRecorder(Recorder):
    """With the scripted TPM, whose view of the device goes into the steps too."""

    def __init__(self, oracle: ScriptedOracle) -> None:
        super().__init__(oracle)
        self._scripted = oracle

    def write_bytes(self, offset: int, data: bytes) -> None:
        """As `Recorder`, with the cancel it caused."""
        before = self._scripted.tpm.cancels
        self._scripted.write(offset, data)
        self.steps.append(Write(offset, data, cancel=self._scripted.tpm.cancels != before))

    def start(self, command: bytes, expected: int | None = None) -> None:
        """Put a command into the buffer and start it. It stays in execution; `complete` or `fail` ends it.

        Returns when QEMU has sent `expected` bytes (all of the command) to the TPM.
        """
        self.write_bytes(BUFFER, command)
        self.write(CTRL_START, START)
        self.await_bytes(len(command) if expected is None else expected)

    def await_bytes(self, count: int) -> None:
        """Until QEMU has sent so many bytes of the command in execution. Not recorded."""
        self._scripted.tpm.await_bytes(count)

    def complete(self, response: bytes) -> None:
        """The TPM answers; the command's end."""
        command = self._scripted.complete(response)
        self.steps.append(Completed(response, command))

    def complete_in_reset(self, response: bytes) -> None:
        """System reset in the middle of a command: QEMU waits for the TPM's answer first."""
        command = self._scripted.complete_in_reset(response)
        self.steps += [Completed(response, command), Reset()]

    def fail(self) -> None:
        """The TPM breaks; the command's end, and that of all later ones."""
        self._scripted.fail()
        self.steps.append(Failed())

    def establish(self, flag: bool) -> None:
        """The TPM's tpmEstablished flag changes."""
        self._scripted.tpm.established = flag
        self.steps.append(Established(flag))


class DaemonRecorder(Recorder):
    """With a real TPM."""

    def __init__(self, oracle: DaemonOracle) -> None:
        super().__init__(oracle)
        self._daemon = oracle

    def finish(self) -> bytes:
        """Wait for the end of the command in execution; its response."""
        response = self._daemon.finish()
        self.steps.append(Completed(response))
        return response

    def run(self, command: bytes) -> bytes:
        """A whole command as a driver sends it, from cmdReady to goIdle; its response."""
        self.write(CTRL_REQ, CMD_READY)
        self.write_bytes(BUFFER, command)
        self.write(CTRL_START, START)
        response = self.finish()
        self.look(buffer=BUFFER_SIZE)
        self.write(CTRL_REQ, GO_IDLE)
        return response

    def kill_tpm(self) -> None:
        """The TPM's process ends. No step: nothing of it shows before the next command."""
        self._daemon.kill()

    def await_failure(self) -> None:
        """Wait until the command in execution has failed."""
        self._daemon.await_end()
        self.steps.append(Failed())
