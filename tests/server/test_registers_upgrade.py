"""The upgrade of a daemon under a guest that works its registers: the guest's VMM, which cannot reconnect, stays."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.process import crbd, end, serving, wait_until
from tests.engine import commands as c
from tests.vfiouser import client
from tests.vfiouser import vmm as v
from tests.vfiouser.vmm import Vmm


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = ["--ephemeral", "--ctrl", f"unix:{tmp_path / 'ctrl'}"]
    arguments += ["--registers", f"vfio-user:{tmp_path / 'registers'},mode=0660", "--log-level", "info"]
    with serving(tmp_path, *arguments) as running:
        yield running


def upgrade(place: Path) -> None:
    done = crbd("reload", "--ctrl", f"unix:{place / 'ctrl'}")
    assert done.returncode == 0, done.stderr


def registers(place: Path) -> dict[str, int]:
    shown = crbd("registers", "--ctrl", f"unix:{place / 'ctrl'}", "--json")
    assert shown.returncode == 0, shown.stderr
    (locality,) = json.loads(shown.stdout)["localities"]
    return {name: register["value"] for name, register in locality["registers"].items()}


def test_a_guest_between_two_bytes_notices_nothing(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    with Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        assert vmm.memory is not None
        assert c.code(vmm.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
        before = vmm.run(c.pcr_read(16))
        vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
        vmm.put(v.CTRL_REQ, v.CMD_READY)
        command = c.pcr_read(16)
        vmm.memory[:10] = command[:10]
        start = client.write(99, client.BAR0, v.CTRL_START, b"\1\0\0\0")
        vmm.socket.sendall(start[:21])
        upgrade(tmp_path)
        vmm.memory[10 : len(command)] = command[10:]
        vmm.socket.sendall(start[21:])
        assert vmm.answer() == client.Answer(99, client.WRITE, start[16:32])
        vmm.wait()
        assert vmm.finish() == before
        assert vmm.get(v.CMD_LADDR) == v.BASE + v.BUFFER
        config = vmm.ask(client.read(1, client.CONFIG, 0x10, 4)).body[16:]
        assert int.from_bytes(config, "little") == v.BASE
    # Who comes next finds a listener, and memory that is the TPM's.
    with Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        assert len(vmm.run(c.GET_RANDOM)) == 28
    assert (tmp_path / "registers").stat().st_mode & 0o777 == 0o660
    status, errors = end(process)
    assert status == 0, errors
    assert not (tmp_path / "registers").exists()


@pytest.mark.slow
def test_what_a_guest_writes_meanwhile_is_not_lost(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    """The buffer is memory: nobody can keep a guest from writing there while the process is another one."""
    over = threading.Event()
    with Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        memory = vmm.memory
        assert memory is not None
        vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
        vmm.put(v.CTRL_REQ, v.CMD_READY)

        def guest() -> None:
            """Write every place once, one after the other, as long as the upgrade takes."""
            for place in range(4096):
                memory[place] = 0xA5
                written.append(place)
                if over.wait(0.0005):
                    return

        written: list[int] = []
        thread = threading.Thread(target=guest)
        thread.start()
        try:
            upgrade(tmp_path)
        finally:
            over.set()
            thread.join()
        assert memory[: len(written)] == b"\xa5" * len(written)
        assert vmm.read(v.BUFFER, 4096) == memory[:], "the new process looks at the same memory"


@pytest.mark.slow
def test_registers_are_answered_while_an_upgrade_waits_for_a_command(
    tmp_path: Path, process: subprocess.Popen[str]
) -> None:
    """No reply may take 5 seconds, however long a key takes."""
    longest = 0.0
    with Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        upgrading = threading.Thread(target=upgrade, args=(tmp_path,))
        upgrading.start()
        number = 0
        while upgrading.is_alive():
            number += 1
            vmm.begin(c.create_primary(c.rsa_3072(number.to_bytes(16, "big"))))
            busy = True
            while busy:
                began = time.monotonic()
                busy = vmm.get(v.CTRL_START) != 0
                longest = max(longest, time.monotonic() - began)
            assert c.code(vmm.finish()) == c.SUCCESS
            assert c.code(vmm.run(c.command(0x165, (0x80000000).to_bytes(4, "big")))) == c.SUCCESS, "FlushContext"
        upgrading.join()
    status, errors = end(process)
    assert status == 0
    assert "goes on for crbd" in errors, "there was no upgrade"
    assert number > 1
    assert longest < 3.0


def test_what_crbd_registers_shows(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    with Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
        vmm.put(v.CTRL_REQ, v.CMD_READY)
        shown = registers(tmp_path)
        assert shown["LOC_STATE"] & 2
        assert shown["CTRL_STS"] == 0
        assert shown["CMD_LADDR"] == v.BASE + v.BUFFER
        upgrade(tmp_path)
        assert registers(tmp_path) == shown


@pytest.mark.slow
def test_no_descriptor_is_left_behind_by_upgrades(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    place = Path(f"/proc/{process.pid}/fd")
    with Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        upgrade(tmp_path)
        before = sorted(os.readlink(each) for each in place.iterdir())
        upgrade(tmp_path)
        wait_until(lambda: len(list(place.iterdir())) <= len(before), "as few descriptors as before")
        assert len(vmm.run(c.GET_RANDOM)) == 28
