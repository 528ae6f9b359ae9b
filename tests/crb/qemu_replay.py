"""Carries out a recorded trace's accesses on a QEMU once more, and tells where it now does something else."""

from __future__ import annotations

from collections.abc import Sequence

from .qemu_machine import CTRL_START, ScriptedOracle
from .qemu_trace import Completed, Established, Failed, Read, Reset, Step, Trace, Write


def differences(oracle: ScriptedOracle, trace: Trace) -> list[str]:
    """What a fresh QEMU did otherwise than `trace` says, one line for each step concerned; the TPM answers as recorded.

    Of a trace that was recorded with a real TPM, nobody knows what that TPM saw, so that is not compared.
    """
    found = []
    for number, step in enumerate(trace.steps):
        did = _carry_out(oracle, step, trace.config.scripted)
        if did != step:
            found.append(f"step {number} was {step}, and is now {did}")
        if isinstance(step, Write) and step.offset <= CTRL_START < step.offset + len(step.value) and oracle.executing():
            # What the trace does next to the buffer must not overtake QEMU's sending of it.
            oracle.tpm.await_bytes(_bytes_in_execution(trace.steps[number + 1 :]))
    return found


def _carry_out(oracle: ScriptedOracle, step: Step, scripted: bool) -> Step:
    """Do what `step` says; the step as it is now."""
    match step:
        case Write(offset, value):
            before = oracle.tpm.cancels
            oracle.write(offset, value)
            return Write(offset, value, cancel=scripted and oracle.tpm.cancels != before)
        case Read(offset, value):
            return Read(offset, oracle.read(offset, len(value)))
        case Completed(response, command):
            now = oracle.complete(response)
            return Completed(response, None if command is None else now)
        case Failed():
            oracle.fail()
        case Reset():
            oracle.reset()
        case Established(flag):
            oracle.tpm.established = flag
    return step


def _bytes_in_execution(coming: Sequence[Step]) -> int:
    """How many bytes of the command in execution the TPM had got, where that was recorded; else 0."""
    for step in coming:
        if isinstance(step, Completed | Failed | Reset):
            return len(step.command or b"") if isinstance(step, Completed) else 0
    return 0
