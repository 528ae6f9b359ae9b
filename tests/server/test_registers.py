"""Registers over vfio-user: a guest's commands and their messages, cancel, reset, clients that come and go."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from functools import partial
from pathlib import Path

import pytest

from crbd.control.messages import GetRegisters, encode_request
from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError
from crbd.server.register_pump import GRACE
from crbd.service.options import Startup
from tests.engine import commands as c
from tests.vfiouser import client
from tests.vfiouser import vmm as v
from tests.vfiouser.vmm import Vmm

from .daemons import Daemon
from .register_daemons import in_thread, serving

LINUX = 12
"""Messages per command of an unmodified Linux guest, none of them for the command's bytes."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registers"


async def test_a_guest_of_the_real_tpm(tmp_path: Path, path: Path) -> None:
    def guest() -> None:
        with Vmm(path) as vmm:
            vmm.start()
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS
            assert c.code(vmm.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
            assert c.pcr_value(vmm.run(c.pcr_read(16))) != bytes(32)
            vmm.reset()
            assert c.code(vmm.run(c.GET_RANDOM)) == c.INITIALIZE, "the TPM was not reset"
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS
            assert c.pcr_value(vmm.run(c.pcr_read(16))) == bytes(32)

    async with serving(tmp_path, make_engine=LibtpmsEngine, startup=Startup.POWER_ON):
        await in_thread(guest)


async def test_a_command_is_twelve_messages_whatever_its_size(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            for size in (10, 11, 100, 1000, 4095, 4096):
                command = struct.pack(">HII", 0x8001, size, 0x17D) + bytes(range(256)) * 16
                response = struct.pack(">HII", 0x8001, 4106 - size, 0) + bytes(reversed(range(256))) * 16
                daemon.engine.script.append(response[: 4106 - size])
                vmm.messages = 0
                assert vmm.run(command[:size]) == response[: 4106 - size]
                assert vmm.messages == LINUX
                assert daemon.engine.log[-1].command == command[:size]
                assert daemon.engine.log[-1].locality == 0

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_a_client_that_maps_nothing(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.boot(mapping=False)
            assert len(vmm.run(c.GET_RANDOM)) == 28
            assert daemon.engine.log[-1].command == c.GET_RANDOM
            together = [(0, v.LOC_CTRL, b"\1\0\0\0"), (0, v.CTRL_REQ, b"\1\0\0\0"), (0, v.BUFFER, c.GET_RANDOM[:8])]
            vmm.send(client.write_multi(1, together, client.NO_REPLY))
            last = [(0, v.BUFFER + 8, c.GET_RANDOM[8:]), (0, v.CTRL_START, b"\1\0\0\0")]
            assert vmm.ask(client.write_multi(2, last)).body == struct.pack("<Q", 2)
            vmm.wait()
            assert len(vmm.finish()) == 28

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_the_registers_say_where_the_buffer_is(tmp_path: Path, path: Path) -> None:
    def guest() -> None:
        with Vmm(path) as vmm:
            vmm.start()
            assert vmm.get(v.CMD_SIZE) == 0x1000
            assert vmm.get(v.CMD_LADDR) == v.BASE + v.BUFFER
            assert vmm.get(v.CMD_HADDR) == 0
            assert vmm.get(v.RSP_ADDR, 8) == v.BASE + v.BUFFER
            vmm.move(0x80000000)
            assert vmm.get(v.RSP_ADDR, 8) == 0x80001000
            assert vmm.get(0x30) & 0x1FF == 0x11, "CRB, version 1, locality 0 only"
            vmm.reset()
            assert vmm.get(v.CMD_LADDR) == v.BUFFER

    async with serving(tmp_path):
        await in_thread(guest)


async def test_start_is_acknowledged_and_registers_are_read_while_the_tpm_computes(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            executed = len(daemon.engine.log)
            daemon.engine.gate.close()
            began = time.monotonic()
            vmm.begin(c.GET_RANDOM)
            daemon.engine.gate.wait_held()
            assert vmm.get(v.CTRL_START) == 1
            assert vmm.get(v.CTRL_STS) == 0
            assert vmm.ask(client.read(1, client.CONFIG, 0, 4)).errno is None
            assert time.monotonic() - began < 100 * GRACE, "a reply waited for the command"
            vmm.put(v.CTRL_START, 1)
            daemon.engine.gate.open()
            vmm.wait()
            assert len(vmm.finish()) == 28
            assert len(daemon.engine.log) == executed + 1, "START while START is set"

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_a_quick_command_is_over_before_the_guest_looks(tmp_path: Path, path: Path) -> None:
    def guest() -> int:
        with Vmm(path) as vmm:
            vmm.boot()
            waited = 0
            for _ in range(50):
                vmm.begin(c.GET_RANDOM)
                waited += vmm.get(v.CTRL_START)
                vmm.wait()
                vmm.finish()
            return waited

    async with serving(tmp_path):
        assert await in_thread(guest) <= 5, "a guest would sleep a millisecond for each"


async def test_cancel(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            daemon.engine.gate.close()
            vmm.begin(c.GET_RANDOM)
            daemon.engine.gate.wait_held()
            vmm.put(v.CTRL_CANCEL, 1)
            vmm.wait()
            assert c.code(vmm.finish()) == c.CANCELED
            daemon.engine.gate.open()
            assert c.code(vmm.run(c.GET_RANDOM)) == c.SUCCESS, "the next one is not cancelled"

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_reset_is_idempotent_and_of_everything(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.start()
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS
            after_one = None
            for _ in range(3):
                vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
                vmm.put(v.CTRL_REQ, v.CMD_READY)
                vmm.write(v.BUFFER, b"secret")
                vmm.reset()
                state = vmm.read(0, 0x80), vmm.read(v.BUFFER, 6), vmm.ask(client.read(1, 7, 0, 256)).body
                assert state[1] == bytes(6)
                assert after_one in (None, state)
                after_one = state
                vmm.reset()
            assert daemon.engine.running
            vmm.move(v.BASE)
            assert c.code(vmm.run(c.GET_RANDOM)) == c.INITIALIZE

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_reset_takes_a_command_away(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.start()
            daemon.engine.gate.close()
            vmm.begin(c.GET_RANDOM)
            daemon.engine.gate.wait_held()
            vmm.send(client.message(3, client.RESET))
            deadline = time.monotonic() + v.PATIENCE
            while not daemon.engine.cancels:
                assert time.monotonic() < deadline, "not cancelled"
            daemon.engine.gate.open()
            assert vmm.answer().errno is None
            assert vmm.get(v.CTRL_START) == 0
            assert vmm.get(v.CTRL_STS) == 2, "not idle"
            assert vmm.read(v.BUFFER, 16) == bytes(16), "what the command left"
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


class Fragile(FakeEngine):
    """A TPM that may not start."""

    starts = True

    def start(self) -> None:
        if not self.starts:
            raise EngineError("TPMLIB_MainInit", 9)
        super().start()


async def test_reset_that_fails_is_an_error_reply(tmp_path: Path, path: Path) -> None:
    engines: list[Fragile] = []

    def make(port: StatePort) -> Engine:
        engines.append(Fragile(port))
        return engines[0]

    def guest() -> None:
        with Vmm(path) as vmm:
            vmm.start()
            engines[0].starts = False
            assert vmm.ask(client.message(3, client.RESET)).errno == client.EIO
            assert c.code(vmm.run(c.GET_RANDOM)) == c.FAILURE, "off, and says so"
            engines[0].starts = True
            vmm.reset()
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS

    async with serving(tmp_path, make_engine=make):
        await in_thread(guest)


async def test_the_tpm_fails_and_the_registers_say_so_until_a_reset(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            daemon.engine.script.append(EngineError("TPMLIB_Process", 9))
            vmm.begin(c.GET_RANDOM)
            vmm.wait()
            assert vmm.get(v.CTRL_STS) & 1
            vmm.reset()
            assert vmm.get(v.CTRL_STS) == 2
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_a_client_that_comes_back_finds_everything(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as first:
            first.boot()
            daemon.engine.gate.close()
            first.begin(c.GET_RANDOM)
            daemon.engine.gate.wait_held()
        daemon.engine.gate.open()
        with Vmm(path) as second:
            assert second.ask(client.version(1)).errno is None
            assert second.get(v.CMD_LADDR) == v.BASE + v.BUFFER
            assert int.from_bytes(second.ask(client.read(1, 7, 0x10, 4)).body[16:], "little") == v.BASE
            second.wait()
            assert second.get(v.LOC_STATE) & 2, "the locality is as it was"
            second.memory = None
            assert len(second.finish()) == 28

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_a_second_client_waits_for_the_first_to_go(tmp_path: Path, path: Path) -> None:
    def guest() -> None:
        with Vmm(path) as first, Vmm(path) as second:
            first.boot()
            second.send(client.version(1))
            second.socket.settimeout(0.05)
            with pytest.raises(TimeoutError):
                second.answer()
            assert len(first.run(c.GET_RANDOM)) == 28
            first.close()
            second.socket.settimeout(v.PATIENCE)
            assert second.answer().errno is None

    async with serving(tmp_path):
        await in_thread(guest)


async def test_the_memory_cannot_be_made_shorter_by_who_maps_it(tmp_path: Path, path: Path) -> None:
    def guest() -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            for size in (0, 0x1000, 0x3000):
                with pytest.raises(PermissionError):
                    os.ftruncate(vmm.descriptors[0], size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(vmm.descriptors[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            with mmap.mmap(vmm.descriptors[0], 0x1000) as unused:
                unused[:] = b"\xff" * 0x1000
            assert len(vmm.run(c.GET_RANDOM)) == 28

    async with serving(tmp_path):
        await in_thread(guest)


async def test_the_guest_writes_on_while_its_command_executes(tmp_path: Path, path: Path) -> None:
    def guest(daemon: Daemon) -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            daemon.engine.gate.close()
            vmm.begin(c.GET_RANDOM)
            assert vmm.memory is not None
            vmm.memory[:] = b"\xff" * 0x1000
            daemon.engine.gate.wait_held()
            assert daemon.engine.log[-1].command == c.GET_RANDOM
            daemon.engine.gate.open()
            vmm.wait()
            assert len(vmm.finish()) == 28

    async with serving(tmp_path) as daemon:
        await in_thread(partial(guest, daemon))


async def test_the_control_channel_shows_the_guests_registers(tmp_path: Path, path: Path) -> None:
    def guest() -> None:
        with Vmm(path) as vmm:
            vmm.boot()
            vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
            vmm.put(v.CTRL_REQ, v.CMD_READY)
            pages.append(vmm.read(0, 0x1000))

    pages: list[bytes] = []
    async with serving(tmp_path) as daemon:
        await in_thread(guest)
        control = await daemon.control()
        answer = await control.ask(encode_request(GetRegisters()), 12 + 0x1000)
        assert answer.endswith(pages[0])
        assert pages[0][0] & 2
