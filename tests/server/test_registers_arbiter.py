"""One TPM for a guest at its registers and for the other channels: who waits for whom, and what nobody gets to see.

The rules: docs/decisions/0004-two-register-files.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from crbd.control import messages as m
from crbd.control.messages import encode_request
from crbd.engine.libtpms import LibtpmsEngine
from tests.engine import commands as c
from tests.vfiouser import vmm as v
from tests.vfiouser.vmm import Vmm

from .daemons import Daemon
from .register_daemons import Blocking, in_thread, serving

SECRET = c.command(0x17D, b"a secret of the data channel")
ANSWER = c.command(0, b"another one, in its answer")[:2] + (36).to_bytes(4, "big") + bytes(4) + b"s" * 26
Scene = Callable[[Daemon, Vmm, Blocking], None]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + v.PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Do that in another thread; it is over when the block is left."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except AssertionError as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join(v.PATIENCE)
    assert not failures, failures
    assert not thread.is_alive()


async def play(place: Path, scene: Scene) -> None:
    def scenery(daemon: Daemon) -> None:
        with Vmm(place / "registers") as vmm, Blocking(daemon.data) as data:
            vmm.boot()
            scene(daemon, vmm, data)

    async with serving(place) as daemon:
        await in_thread(partial(scenery, daemon))


async def test_the_data_channel_waits_for_the_guests_command(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        daemon.engine.gate.close()
        vmm.begin(c.GET_RANDOM)
        daemon.engine.gate.wait_held()
        data.socket.sendall(c.pcr_read(16))
        data.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            data.socket.recv(1)
        data.socket.settimeout(v.PATIENCE)
        assert vmm.get(v.CTRL_START) == 1
        daemon.engine.gate.open()
        assert c.code(data.response()) == c.SUCCESS
        vmm.wait()
        assert len(vmm.finish()) == 28
        assert [entry.command for entry in daemon.engine.log[-2:]] == [c.GET_RANDOM, c.pcr_read(16)]

    await play(tmp_path, scene)


async def test_the_guest_waits_for_the_data_channels_command(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        daemon.engine.gate.close()
        data.socket.sendall(c.pcr_read(16))
        daemon.engine.gate.wait_held()
        vmm.begin(c.GET_RANDOM)
        assert vmm.get(v.CTRL_START) == 1
        assert vmm.get(v.CTRL_STS) == 0
        daemon.engine.gate.open()
        vmm.wait()
        assert len(vmm.finish()) == 28
        assert c.code(data.response()) == c.SUCCESS

    await play(tmp_path, scene)


async def test_a_guest_cannot_cancel_what_is_not_its_own(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        cancels = daemon.engine.cancels
        daemon.engine.gate.close()
        data.socket.sendall(c.pcr_read(16))
        daemon.engine.gate.wait_held()
        vmm.put(v.CTRL_CANCEL, 1)
        vmm.begin(c.GET_RANDOM)
        vmm.put(v.CTRL_CANCEL, 1)
        assert daemon.engine.cancels == cancels
        daemon.engine.gate.open()
        assert c.code(data.response()) == c.SUCCESS
        vmm.wait()
        assert c.code(vmm.finish()) == c.CANCELED
        assert daemon.engine.log[-1].command == c.pcr_read(16), "what was cancelled while it waited did not execute"
        assert len(vmm.run(c.GET_RANDOM)) == 28

    await play(tmp_path, scene)


async def test_neither_sees_the_others_bytes(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        assert vmm.memory is not None
        vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
        vmm.put(v.CTRL_REQ, v.CMD_READY)
        vmm.memory[: len(c.GET_RANDOM)] = c.GET_RANDOM
        registers, buffer = vmm.read(0, 0x1000), vmm.memory[:]
        daemon.engine.gate.close()
        daemon.engine.script.append(ANSWER)
        data.socket.sendall(SECRET)
        daemon.engine.gate.wait_held()
        assert (vmm.read(0, 0x1000), vmm.memory[:]) == (registers, buffer)
        daemon.engine.gate.open()
        assert data.response() == ANSWER
        assert (vmm.read(0, 0x1000), vmm.memory[:]) == (registers, buffer)
        vmm.put(v.CTRL_START, 1)
        vmm.wait()
        assert len(vmm.finish()) == 28, "the command that the guest had put there"

    await play(tmp_path, scene)


async def test_each_channel_has_its_locality(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        with Blocking(daemon.ctrl) as control:
            assert control.ask(encode_request(m.SetLocality(3)), 4) == bytes(4)
        data.run(c.GET_RANDOM)
        vmm.run(c.GET_RANDOM)
        data.run(c.GET_RANDOM)
        assert [entry.locality for entry in daemon.engine.log[-3:]] == [3, 0, 3]
        vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
        assert c.code(data.run(c.GET_RANDOM)) == c.SUCCESS, "a guest that holds its locality is in nobody's way"
        assert vmm.get(v.LOC_STATE) & 2, "and keeps it"

    await play(tmp_path, scene)


async def test_the_control_channel_switches_the_tpm_off_and_on(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        with Blocking(daemon.ctrl) as control:
            vmm.put(v.LOC_CTRL, v.REQUEST_ACCESS)
            assert control.ask(encode_request(m.Stop()), 4) == bytes(4)
            assert vmm.get(v.LOC_STATE) & 2 == 0, "a platform reset is one for the guest's registers"
            assert c.code(vmm.run(c.GET_RANDOM)) == c.FAILURE
            assert control.ask(encode_request(m.Init(m.InitFlag(0))), 4) == bytes(4)
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS
            assert control.ask(encode_request(m.Stop()), 4) == bytes(4)
            vmm.reset()
            vmm.move(v.BASE)
            assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS, "the guest's VMM switches it on as well"

    await play(tmp_path, scene)


async def test_the_guest_sees_that_the_flag_of_a_measured_launch_is_set(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        assert vmm.get(v.LOC_STATE) & 1
        with Blocking(daemon.ctrl) as control:
            for request in (m.HashStart(), m.HashData(b"measured"), m.HashEnd()):
                assert control.ask(encode_request(request), 4) == bytes(4)
            assert vmm.get(v.LOC_STATE) & 1 == 0
            assert control.ask(encode_request(m.ResetTpmEstablished(3)), 4) == bytes(4)
            assert vmm.get(v.LOC_STATE) & 1

    await play(tmp_path, scene)


async def test_two_that_never_pause_both_get_on(tmp_path: Path) -> None:
    """With the real TPM: neither starves, and every answer is the answer to its own command."""
    rounds = 200

    def scene(daemon: Daemon) -> None:
        with Vmm(tmp_path / "registers") as vmm, Blocking(daemon.data) as data:
            vmm.boot()

            def host() -> None:
                for number in range(rounds):
                    size = 1 + number % 32
                    assert len(data.run(c.command(0x17B, size.to_bytes(2, "big")))) == 12 + size

            with beside(host):
                for number in range(rounds):
                    size = 32 - number % 32
                    assert len(vmm.run(c.command(0x17B, size.to_bytes(2, "big")))) == 12 + size

    async with serving(tmp_path, make_engine=LibtpmsEngine) as daemon:
        await in_thread(partial(scene, daemon))


async def test_a_reset_while_the_data_channel_computes(tmp_path: Path) -> None:
    def scene(daemon: Daemon, vmm: Vmm, data: Blocking) -> None:
        daemon.engine.gate.close()
        data.socket.sendall(c.pcr_read(16))
        daemon.engine.gate.wait_held()
        vmm.begin(c.GET_RANDOM)
        cancels = daemon.engine.cancels

        def open_when_cancelled() -> None:
            until(lambda: daemon.engine.cancels > cancels, "the machine is reset, and its TPM computes on")
            daemon.engine.gate.open()

        with beside(open_when_cancelled):
            vmm.reset()
        assert c.code(data.response()) == c.CANCELED
        assert vmm.get(v.CTRL_START) == 0
        assert c.GET_RANDOM not in [entry.command for entry in daemon.engine.log], "a command from before the reset"
        assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS

    await play(tmp_path, scene)
