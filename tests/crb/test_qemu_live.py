"""The oracle itself: the QEMUs at hand do what the recorded traces say.

The QEMU of this machine and, where scripts/qemu11-chroot has made it, the one in the chroot are each held to the traces
of their device (before QEMU 11.1, or from it on). So the vectors stay true, and a later QEMU that behaves otherwise is
noticed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from .qemu_backend import ScriptedBackend
from .qemu_machine import BASE, BUFFER, Qemu, machine
from .qemu_record import scripted_oracle
from .qemu_replay import differences
from .qemu_trace import Write, load

VECTORS = Path(__file__).parent / "vectors"
CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.e2e


@cache
def qemus() -> dict[str, Qemu]:
    """The QEMUs at hand, by device; the machine's own comes before the chroot's."""
    chroot = Path(os.environ.get("CRBD_CACHE", CHECKOUT / ".cache")) / "trixie"
    candidates = []
    if (chroot / "crbd-stamp").exists() and os.geteuid() == 0:
        candidates.append(Qemu(chroot=chroot))
    if shutil.which(Qemu().program):
        candidates.append(Qemu())
    return {qemu.device(): qemu for qemu in candidates}


def qemu_for(device: str) -> Qemu:
    """The one at hand that has this device; skips the test where there is none."""
    if device not in qemus():
        pytest.skip(f"no QEMU with the device of {device} here; root makes one with scripts/qemu11-chroot")
    return qemus()[device]


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_qemu_does_what_the_trace_says(path: Path) -> None:
    trace = load(path)
    with scripted_oracle(qemu_for(trace.config.device), trace.config) as oracle:
        assert differences(oracle, trace) == []


def test_qtest_accesses_of_every_width() -> None:
    with ScriptedBackend() as tpm, machine(next(iter(qemus().values())), tpm.qemu_end) as running:
        qtest, address = running.qtest, BASE + BUFFER
        qtest.writeq(address, 0x8877665544332211)
        qtest.writel(address + 8, 0xCCBBAA99)
        qtest.writew(address + 12, 0xEEDD)
        qtest.writeb(address + 14, 0xFF)
        assert qtest.read_memory(address, 16).hex(" ", 8) == "1122334455667788 99aabbccddeeff00"
        qtest.write_memory(address + 3, b"\1\2\3")
        assert qtest.readq(address) == 0x8877030201332211
        assert qtest.readl(address + 2) == 0x03020133
        assert qtest.readw(address + 6) == 0x8877
        assert qtest.readb(address + 14) == 0xFF


def test_qtest_clock() -> None:
    # Debian's QEMU 7.2 is built without that accelerator.
    qemu = qemu_for("qemu-11")
    with ScriptedBackend() as tpm, machine(qemu, tpm.qemu_end, accelerator="qtest") as running:
        before = running.qtest.clock_step(1000)
        assert running.qtest.clock_step(500) == before + 500


@pytest.mark.parametrize("device", ["qemu-7.2", "qemu-11"])
def test_a_trace_that_qemu_does_not_follow_is_noticed(device: str) -> None:
    trace = load(VECTORS / f"{device}-start-in-idle.json")
    request = trace.steps.index(Write(0x08, b"\x01\0\0\0"))
    # Without it, START does nothing.
    steps = trace.steps[:request] + trace.steps[request + 1 :]
    with scripted_oracle(qemu_for(device), trace.config) as oracle:
        found = differences(oracle, replace(trace, steps=steps))
    assert any("Read(offset=0" in line for line in found)
    assert any("Completed" in line for line in found)
