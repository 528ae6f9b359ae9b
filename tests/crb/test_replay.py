"""Both mappings against what QEMU's own tpm-crb did: the recorded traces, access by access.

A trace's completed and failed steps carry what the TPM did; everything else, our device has to do by itself: the value
of every read, the command that reached the TPM, and when a cancel went out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Cancel, Effect, Execute
from crbd.crb.mapping.page import PageMapping
from crbd.crb.mapping.split import SplitMapping

from .qemu_trace import Completed, Config, Established, Failed, Read, Reset, Trace, Write, load

PATHS = sorted((Path(__file__).parent / "vectors").glob("*.json"))


def config_of(recorded: Config) -> CrbConfig:
    """The configuration that stands for the recorded QEMU."""
    if recorded.device == "qemu-7.2":
        return CrbConfig.qemu_7_2(recorded.buffer_size)
    return replace(CrbConfig.qemu_11(recorded.buffer_size), chunking=recorded.chunks)


class Replay:
    """One trace on one mapping. `differences` has a line for each step that went otherwise."""

    def __init__(self, trace: Trace, mapping: type[SplitMapping] | type[PageMapping], *, refreeze: bool) -> None:
        self.trace = trace
        self.config = config_of(trace.config)
        self.make = mapping
        self.refreeze = refreeze
        self.device = CrbDevice(self.config)
        self.mapping = mapping(self.device)
        self.established = self.asked = False
        self.differences: list[str] = []

    def run(self) -> list[str]:
        for number, step in enumerate(self.trace.steps):
            self.number = number
            if self.refreeze:
                self.device = CrbDevice.thaw(self.config, self.device.freeze())
                self.mapping = self.make(self.device)
            match step:
                case Established(flag):
                    self.established = flag
                case Reset():
                    # QEMU waits for the TPM before it resets; what the TPM says then reaches nobody.
                    self.device.reset()
                case Write(offset, value, cancel):
                    self._write(offset, value, cancel=cancel)
                case Read(offset, value):
                    if offset == 0 and not self.asked:
                        # QEMU asks its backend once, at the first read of LOC_STATE.
                        self.device.set_established(self.established)
                        self.asked = True
                    self._compare("read", self.mapping.read(offset, len(value)), value)
                case Completed(response, command):
                    self._end(command, response)
                case Failed():
                    self._end(None, None)
        return self.differences

    def _write(self, offset: int, value: bytes, *, cancel: bool) -> None:
        effects: tuple[Effect, ...] = self.mapping.write(offset, value)
        if self.trace.config.scripted:
            self._compare("cancel", Cancel() in effects, cancel)
        for effect in effects:
            self._compare("effect", type(effect) in (Execute, Cancel), True)

    def _end(self, command: bytes | None, response: bytes | None) -> None:
        executing = self.device.executing
        self._compare("execution", executing is not None, True)
        if command is not None and executing is not None:
            self._compare("command", executing.command, command)
        if response is None:
            self.device.fail()
        else:
            self.device.complete(response)

    def _compare(self, what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            self.differences.append(f"step {self.number}: {what} {ours!r}, QEMU {theirs!r}")


@pytest.mark.parametrize("refreeze", [False, True], ids=["straight", "frozen-between"])
@pytest.mark.parametrize("mapping", [SplitMapping, PageMapping])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_device_does_what_qemus_did(
    path: Path, mapping: type[SplitMapping] | type[PageMapping], refreeze: bool
) -> None:
    assert Replay(load(path), mapping, refreeze=refreeze).run() == []


def test_there_are_traces_of_both_devices() -> None:
    assert {load(path).config.device for path in PATHS} == {"qemu-7.2", "qemu-11"}
