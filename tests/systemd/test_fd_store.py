"""A restart that keeps its clients, and everything that can be in its way. (tests/e2e/test_systemd.py has systemd.)"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.cli.process import PATIENCE, crbd, end, serving
from tests.cli.test_reload import CAPABILITIES, GET_CAPABILITY, LAYOUTS, Client, sockets
from tests.engine import commands as c
from tests.vfiouser import client, vmm
from tests.vfiouser.vmm import Vmm

from .service_manager import service_manager

pytestmark = pytest.mark.slow

SHUTDOWN = bytes.fromhex("00000003")
HELD = ("link.0", "link.1", "listener.ctrl", "listener.data", "handover")


def options(place: Path, *more: str | Path) -> list[str | Path]:
    return ["--fd-store", "--log-level", "info", "--state", place / "state", "--create", *sockets(place), *more]


WHY = {
    "handover": "the handover itself is not there",
    "link.0": "the descriptor link.0 did not come along",
    "listener.ctrl": "the descriptor listener.ctrl did not come along",
}


def orderly(place: Path) -> bool:
    """Whether a daemon that starts on the state now finds a TPM that was shut down."""
    copy = place / "copy"
    shutil.copytree(place / "state", copy)
    with service_manager(copy) as manager:
        arguments: list[str | Path] = ["--state", copy, "--ctrl", f"unix:{copy / 'ctrl'}", "--flags", "not-need-init"]
        with manager.service(*arguments) as process:
            _, said = end(process)
    shutil.rmtree(copy)
    return "was not shut down" not in said


def leave(process: subprocess.Popen[str]) -> str:
    status, errors = end(process)
    assert status == 0, errors
    return errors


def prepare(data: Client) -> bytes:
    """Something that a restart must not lose; the answer to reading PCR 16."""
    assert c.code(data.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
    assert c.code(data.run(c.nv_define(8))) == c.SUCCESS
    assert c.code(data.run(c.nv_write(b"12345678"))) == c.SUCCESS
    return data.run(c.pcr_read(16))


def test_no_client_notices_a_restart(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path, "--pid", tmp_path / "pid")) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            ctrl = clients.enter_context(Client(tmp_path / "ctrl"))
            before = prepare(data)
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
            data.socket.sendall(c.pcr_read(16)[:7])
            leave(process)
        assert "STOPPING=1" in manager.heard
        assert set(manager.kept) == {*HELD, "store.lock"}
        assert crbd("serve", "--state", tmp_path / "state", *sockets(tmp_path)).returncode == 15, "its lock is held"
        assert orderly(tmp_path), "in case that it was a stop"
        with manager.service(*options(tmp_path, "--pid", tmp_path / "pid")) as process:
            assert not orderly(tmp_path), "it runs: a crash from here on is a crash, whatever was asked of it since"
            assert not manager.kept
            assert int((tmp_path / "pid").read_text()) == process.pid
            data.socket.sendall(c.pcr_read(16)[7:])
            assert data.response() == before
            assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
            with Client(tmp_path / "ctrl") as another:
                done, said = another.upgrade()
                assert done, said
            assert data.run(c.pcr_read(16)) == before
            leave(process)
        with manager.service(*options(tmp_path)) as process:
            assert data.run(c.pcr_read(16)) == before
            assert ctrl.ask(SHUTDOWN, 4) == bytes(4)
            assert process.wait(PATIENCE) == 0
        assert not manager.kept, "what a client asks for is an end"


@pytest.mark.slow
def test_a_stop_is_an_end(tmp_path: Path) -> None:
    """The manager lets go: clients see it, and the next start is one from a TPM that was shut down."""
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            leave(process)
        manager.let_go()
        assert data.receive(1) == b""
        with manager.service(*options(tmp_path)) as process, Client(tmp_path / "data") as data:
            assert data.run(c.pcr_read(16)) != before
            assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
            assert "was not shut down" not in leave(process)


def test_the_tpm_ran_elsewhere_meanwhile(tmp_path: Path) -> None:
    """What was kept is stale then: it is let go, and nothing that the TPM did meanwhile is taken back."""
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            leave(process)
        os.close(manager.kept.pop("store.lock"))
        for name in ("ctrl", "data"):
            (tmp_path / name).unlink()
        with serving(tmp_path, "--state", tmp_path / "state", *sockets(tmp_path)) as other:
            with Client(tmp_path / "data") as elsewhere:
                assert c.code(elsewhere.run(c.nv_write(b"87654321"))) == c.SUCCESS
            end(other)
        with manager.service(*options(tmp_path)) as process:
            assert not manager.kept
            assert data.receive(1) == b"", "its TPM is gone"
            with Client(tmp_path / "data") as data:
                assert data.run(c.pcr_read(16)) != before
                assert c.nv_value(data.run(c.nv_read(8))) == b"87654321"
            assert "does not hold what the daemon before this one left there" in leave(process)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["handover", "link.0", "listener.ctrl"])
def test_what_is_not_whole_is_let_go(tmp_path: Path, missing: str) -> None:
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            prepare(data)
            leave(process)
        os.close(manager.kept.pop(missing))
        with manager.service(*options(tmp_path)) as process:
            assert not manager.kept
            assert data.receive(1) == b""
            with Client(tmp_path / "data") as data:
                assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
            assert f"clients of the daemon before this one are lost: {WHY[missing]}" in leave(process)


@pytest.mark.slow
def test_another_directory_and_other_sockets(tmp_path: Path) -> None:
    """The unit was changed: the lock of the directory that was is let go."""
    with service_manager(tmp_path) as manager:
        with manager.service(*options(tmp_path)) as process:
            leave(process)
        other = tmp_path / "other"
        other.mkdir()
        with manager.service(*options(other)) as process:
            assert not manager.kept
            with serving(tmp_path, "--state", tmp_path / "state", *sockets(tmp_path)):
                pass
            leave(process)


@pytest.mark.slow
def test_a_listener_that_is_wanted_elsewhere_is_made_anew(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            leave(process)
        (tmp_path / "data").unlink()
        with manager.service(*options(tmp_path, "--ctrl", f"unix:{tmp_path / 'elsewhere'}")) as process:
            assert data.run(c.pcr_read(16)) == before
            data.socket.close()
            with Client(tmp_path / "data") as another, Client(tmp_path / "elsewhere") as ctrl:
                assert another.run(c.pcr_read(16)) == before
                assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
            leave(process)


@pytest.mark.slow
@pytest.mark.parametrize("room", [None, "4"])
def test_a_manager_that_keeps_nothing(tmp_path: Path, room: str | None) -> None:
    """Without room for all, none of it is left: an ordinary end, and sockets are removed where crbd knows."""
    with service_manager(tmp_path, takes=False) as manager, ExitStack() as clients:
        environment = {} if room is None else {"FDSTORE": room}
        with manager.service(*options(tmp_path), environment=environment) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            prepare(data)
            errors = leave(process)
            assert data.receive(1) == b""
        assert ("raise FileDescriptorStoreMax=" in errors) == (room is not None)
        assert (tmp_path / "data").exists() == (room is None)
        assert orderly(tmp_path)
        with manager.service(*options(tmp_path)) as process, Client(tmp_path / "data") as data:
            assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"


@pytest.mark.slow
def test_sigint_is_an_end(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager:
        with manager.service(*options(tmp_path)) as process:
            assert end(process, signal.SIGINT)[0] == 0
        assert not manager.kept
        assert orderly(tmp_path)


def test_killed_after_it_went_on(tmp_path: Path) -> None:
    """The handover is used up: the next start is that of a TPM that crashed."""
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            leave(process)
        with manager.service(*options(tmp_path)) as process:
            assert data.run(c.pcr_read(16)) == before
            assert c.code(data.run(c.nv_write(b"87654321"))) == c.SUCCESS
            process.kill()
        with manager.service(*options(tmp_path)) as process, Client(tmp_path / "data") as data:
            assert c.nv_value(data.run(c.nv_read(8))) == b"87654321"
            assert data.run(c.pcr_read(16)) != before
            assert "was not shut down" in leave(process)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["link.0", "handover"])
def test_killed_while_it_leaves(tmp_path: Path, name: str) -> None:
    """At the first and at the last descriptor: the TPM was shut down, and what is kept is whole or let go."""
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            manager.before = partial(kill_at, name, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == -signal.SIGKILL
            manager.catch_up()
            whole = "handover" in manager.kept
        manager.before = None
        assert orderly(tmp_path)
        with manager.service(*options(tmp_path)) as process, Client(tmp_path / "data") as another:
            assert not manager.kept
            if whole:
                assert data.run(c.pcr_read(16)) == before
                data.socket.close()
            assert c.nv_value(another.run(c.nv_read(8))) == b"12345678"


@pytest.mark.slow
def test_killed_while_it_comes_back(tmp_path: Path) -> None:
    """It is gone on from once or never."""
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*options(tmp_path)) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            prepare(data)
            leave(process)
        manager.before = lambda _: os.kill(manager.pid, signal.SIGKILL)
        with pytest.raises(AssertionError), manager.service(*options(tmp_path)):
            pass
        manager.before = None
        assert orderly(tmp_path)
        with manager.service(*options(tmp_path)) as process:
            assert data.receive(1) == b""
            with Client(tmp_path / "data") as another:
                assert c.nv_value(another.run(c.nv_read(8))) == b"12345678"
            assert "the handover itself is not there" in leave(process)


def kill_at(name: str, process: subprocess.Popen[str], kept: str) -> None:
    if kept == name:
        process.kill()
        process.wait(PATIENCE)


@pytest.mark.parametrize("layout", ["swtpm", "linear", "ephemeral"])
@pytest.mark.slow
def test_other_layouts(tmp_path: Path, layout: str) -> None:
    arguments = ["--fd-store", *LAYOUTS[layout](tmp_path), *sockets(tmp_path)]
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*arguments) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            leave(process)
        with manager.service(*arguments):
            assert data.run(c.pcr_read(16)) == before
            assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"


@pytest.mark.slow
def test_sealed_state_and_no_key_in_what_is_kept(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    arguments = options(tmp_path, "--key", f"file:{key}")
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*arguments) as process:
            data = clients.enter_context(Client(tmp_path / "data"))
            before = prepare(data)
            leave(process)
        document = os.pread(manager.kept["handover"], 1 << 20, 0)
        assert b"secret." not in document
        with manager.service(*arguments):
            assert data.run(c.pcr_read(16)) == before


@pytest.mark.slow
def test_a_guest_at_its_registers(tmp_path: Path) -> None:
    """Half a command in the memory that it maps, and half a message: both are completed after the restart."""
    registers = tmp_path / "registers"
    arguments: list[str | Path] = ["--fd-store", "--state", tmp_path / "state", "--create"]
    arguments += ["--registers", f"vfio-user:{registers}"]
    with service_manager(tmp_path) as manager, ExitStack() as clients:
        with manager.service(*arguments) as process:
            guest = clients.enter_context(Vmm(registers)).boot()
            assert guest.memory is not None
            assert c.code(guest.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
            before = guest.run(c.pcr_read(16))
            guest.put(vmm.LOC_CTRL, vmm.REQUEST_ACCESS)
            guest.put(vmm.CTRL_REQ, vmm.CMD_READY)
            command = c.pcr_read(16)
            guest.memory[:10] = command[:10]
            start = client.write(99, client.BAR0, vmm.CTRL_START, b"\1\0\0\0")
            guest.socket.sendall(start[:21])
            leave(process)
            assert guest.memory[:10] == command[:10], "the shutdown is not in a guest's sight"
        assert "registers.buffer" in manager.kept
        with manager.service(*arguments) as process:
            guest.memory[10 : len(command)] = command[10:]
            guest.socket.sendall(start[21:])
            assert guest.answer() == client.Answer(99, client.WRITE, start[16:32])
            guest.wait()
            assert guest.finish() == before
            leave(process)
        with manager.service("--fd-store", "--state", tmp_path / "state", *sockets(tmp_path)) as process:
            assert not manager.kept
            assert "registers were served and are not now" in leave(process)
