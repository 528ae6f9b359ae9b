"""The control channel over real sockets: QEMU's sequences, descriptors, clients that stall, go away or come second."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from crbd.server.control import MAX_CLIENTS
from crbd.service.options import InstanceOptions
from tests.engine import commands as c

from .daemons import PATIENCE, Client, Daemon, running

OK = bytes(4)
GET_CAPABILITY = bytes.fromhex("00000001")
INIT = bytes.fromhex("0000000200000000")
SHUTDOWN = bytes.fromhex("00000003")
GET_TPMESTABLISHED = bytes.fromhex("00000004")
CANCEL = bytes.fromhex("00000009")
STORE_VOLATILE = bytes.fromhex("0000000a")
STOP = bytes.fromhex("0000000e")
GET_CONFIG = bytes.fromhex("0000000f")
SET_DATAFD = bytes.fromhex("00000010")
READ_CLOCK = bytes.fromhex("80010000000a00000181")
FAILURE_RESPONSE = bytes.fromhex("80010000000a00000101")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_what_qemu_does_from_start_to_quit(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        ours, theirs = trio.socket.socketpair()
        assert await control.ask(SET_DATAFD, 4, (theirs.fileno(),)) == OK
        theirs.close()
        data = Client(ours)
        assert await data.ask(READ_CLOCK, 10) == FAILURE_RESPONSE, "the version probe before INIT"
        assert await control.ask(GET_CAPABILITY, 8) == bytes.fromhex("000000000001ffff")
        assert await control.ask(STOP, 4) == OK
        assert await control.ask(bytes.fromhex("0000001100000000"), 16) == OK + bytes.fromhex(
            "0000100000000af800001000"
        )
        assert await control.ask(STOP, 4) == OK
        assert await control.ask(bytes.fromhex("0000001100000f80"), 16) == OK + bytes.fromhex(
            "00000f8000000af800001000"
        )
        assert await control.ask(INIT, 4) == OK
        assert await control.ask(GET_TPMESTABLISHED, 8) == OK + bytes(4)
        assert await control.ask(bytes.fromhex("00000005 03aabbcc"), 4) == OK, (
            "the union of QEMU 7: the first byte counts"
        )
        assert (await data.ask(c.STARTUP_CLEAR, 10))[6:] == OK
        assert daemon.engine.log[-1].locality == 3
        # Migration: permanent, volatile and the savestate that a TPM 2.0 has not.
        for kind, result in ((1, 0), (2, 0), (3, 0x800)):
            head = await control.ask(bytes.fromhex("0000000c00000001") + kind.to_bytes(4, "big") + bytes(4), 16)
            total, length = int.from_bytes(head[8:12], "big"), int.from_bytes(head[12:16], "big")
            assert int.from_bytes(head[:4], "big") == result
            assert total == length
            assert len(await control.receive(length)) == length
            assert (length > 0) == (result == 0)
        assert await control.ask(bytes.fromhex("000000130000012c"), 4) == OK
        # A guest reset.
        for _ in range(3):
            assert await control.ask(STOP, 4) == OK
            assert await control.ask(INIT, 4) == OK
        assert await control.ask(SHUTDOWN, 4) == OK
        with trio.fail_after(PATIENCE):
            await daemon.ended.wait()
        assert not daemon.ctrl.exists()
        assert not daemon.data.exists()


async def test_restore_as_qemu_does_it(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    blobs: dict[int, bytes] = {}
    async with running(tmp_path / "1") as daemon:
        control, data = await daemon.control(), await daemon.data_client()
        await control.ask(INIT, 4)
        await data.ask(c.STARTUP_CLEAR, 10)
        await data.run(c.pcr_extend(16, b"\x22" * 32))
        for kind in (1, 2):
            head = await control.ask(bytes.fromhex("0000000c00000001") + kind.to_bytes(4, "big") + bytes(4), 16)
            blobs[kind] = await control.receive(int.from_bytes(head[12:16], "big"))
        value = c.pcr_value(await data.run(c.pcr_read(16)))
    async with running(tmp_path / "2") as daemon:
        control, data = await daemon.control(), await daemon.data_client()
        await control.ask(STOP, 4)
        for kind, blob in blobs.items():
            head = bytes.fromhex("0000000d00000000") + kind.to_bytes(4, "big") + len(blob).to_bytes(4, "big")
            await control.send(head)
            assert await control.ask(blob, 4) == OK
        assert await control.ask(bytes.fromhex("0000000200000001"), 4) == OK
        assert c.pcr_value(await data.run(c.pcr_read(16))) == value


async def test_errors_are_four_bytes(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        for request in (GET_TPMESTABLISHED, CANCEL, STORE_VOLATILE, bytes.fromhex("00000006")):
            assert await control.ask(request, 4) == bytes.fromhex("0000000a"), "needs a running TPM"
        assert await control.ask(bytes.fromhex("00000005 05"), 4) == bytes.fromhex("0000003d")
        assert await control.ask(bytes.fromhex("000000ff"), 4) == bytes.fromhex("0000000a")
        assert await control.ask(SET_DATAFD, 4) == bytes.fromhex("00000003")
        assert await control.ask(bytes.fromhex("00000012 0000000000000001 ffffffff 00000000"), 4) == bytes.fromhex(
            "00000003"
        )
        assert await control.ask(INIT, 4) == OK
        assert await control.ask(bytes.fromhex("0000001100000f80"), 4) == bytes.fromhex("0000000a"), (
            "needs a stopped TPM"
        )
        assert await control.ask(bytes.fromhex("0000000d 00000000 00000001 00000000"), 4) == bytes.fromhex("0000000a")
        assert await control.ask(GET_CONFIG, 8) == bytes(8)


async def test_requests_in_pieces_and_several_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        for byte in INIT:
            await control.send(bytes([byte]))
        assert await control.receive(4) == OK
        assert await control.ask(GET_CAPABILITY + GET_CONFIG + STOP, 20) == bytes.fromhex("000000000001ffff") + bytes(
            12
        )


async def test_capability_and_cancel_are_answered_while_a_command_computes(tmp_path: Path) -> None:
    async with running(tmp_path, InstanceOptions(may_manufacture=True)) as daemon:
        control, data = await daemon.control(), await daemon.data_client()
        await control.ask(INIT, 4)
        await data.ask(c.STARTUP_CLEAR, 10)
        daemon.engine.gate.close()
        await data.send(c.GET_RANDOM)
        await trio.to_thread.run_sync(daemon.engine.gate.wait_held)
        assert await control.ask(GET_CAPABILITY, 8) == bytes.fromhex("000000000001ffff")
        assert await control.ask(CANCEL, 4) == OK
        assert await data.receive(10) == bytes.fromhex("80010000000a00000909")
        daemon.engine.gate.open()


async def test_an_unreadable_state_fails_init_and_the_daemon_stays(tmp_path: Path) -> None:
    async with running(tmp_path, InstanceOptions(may_manufacture=True)) as daemon:
        control = await daemon.control()
        assert await control.ask(INIT, 4) == OK
        assert await control.ask(STOP, 4) == OK
        garbage = b"\x02\x01\x00\x0a" + bytes(20)
        head = bytes.fromhex("0000000d0000000000000001") + len(garbage).to_bytes(4, "big")
        assert await control.ask(head + garbage, 4) == bytes.fromhex("00000003")
        assert await control.ask(INIT, 4) == OK


async def test_a_client_that_stalls_is_dropped_and_nothing_has_happened(
    tmp_path: Path, patient_clock: MockClock
) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        await control.send(INIT[:-1])
        started = trio.current_time()
        assert await control.at_end()
        assert trio.current_time() - started < 1.0
        assert not daemon.engine.running
        another = await daemon.control()
        assert await another.ask(GET_CAPABILITY, 8) == bytes.fromhex("000000000001ffff")


async def trickle(client: Client, data: bytes) -> None:
    for byte in data:
        await client.send(bytes([byte]))
        await trio.sleep(0.2)


async def test_a_client_that_trickles_is_dropped_all_the_same(tmp_path: Path, patient_clock: MockClock) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        with pytest.raises(BrokenPipeError):
            await trickle(control, bytes.fromhex("0000000d00000000000000010000ffff") + bytes(64))


async def dropped(client: Client) -> bool:
    try:
        await client.socket.send(GET_CAPABILITY * 1024)
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path, patient_clock: MockClock) -> None:
    async with running(tmp_path) as daemon:
        deaf = await daemon.control()
        with trio.fail_after(60):
            while not await dropped(deaf):
                pass
        another = await daemon.control()
        assert await another.ask(GET_CAPABILITY, 8) == bytes.fromhex("000000000001ffff")


async def test_a_second_client_waits_for_the_first(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        first, second = await daemon.control(), await daemon.control()
        await second.send(GET_CAPABILITY)
        assert await first.ask(GET_CONFIG, 8) == bytes(8)
        first.close()
        assert await second.receive(8) == bytes.fromhex("000000000001ffff")


async def test_the_end_of_a_client_that_waits_is_no_trouble(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        first, second, third = await daemon.control(), await daemon.control(), await daemon.control()
        assert await first.ask(GET_CONFIG, 8) == bytes(8)
        await second.send(GET_CONFIG)
        second.close()
        await third.send(GET_CAPABILITY)
        assert await first.ask(GET_CONFIG, 8) == bytes(8)
        first.close()
        assert await third.receive(8) == bytes.fromhex("000000000001ffff")


async def test_more_clients_than_are_connected_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        clients = [await daemon.control() for _ in range(MAX_CLIENTS + 4)]
        for client in clients:
            assert await client.ask(GET_CAPABILITY, 8) == bytes.fromhex("000000000001ffff")
            client.close()


async def test_padding_is_no_stall(tmp_path: Path, patient_clock: MockClock) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        assert await control.ask(bytes.fromhex("0000000500aabbcc"), 4) == OK
        await trio.sleep(10)
        assert await control.ask(GET_CAPABILITY, 8) == bytes.fromhex("000000000001ffff")


async def attach(control: Client) -> tuple[bytes, Client]:
    ours, theirs = trio.socket.socketpair()
    reply = await control.ask(SET_DATAFD, 4, (theirs.fileno(),))
    theirs.close()
    return reply, Client(ours)


async def test_descriptors_are_never_leaked(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        await control.ask(GET_CAPABILITY, 8)
        reading, writing = os.pipe()
        before = open_descriptors()
        await control.ask(GET_CAPABILITY, 8, (reading,))
        await control.ask(SET_DATAFD, 4, (reading, writing))
        await control.ask(bytes.fromhex("000000ff"), 4, (reading,) * 5)
        assert open_descriptors() == before
        await control.send(SET_DATAFD[:2], (reading,))
        control.close()
        another = await daemon.control()
        await another.ask(GET_CAPABILITY, 8)
        assert open_descriptors() == before
        os.close(reading)
        os.close(writing)


async def test_a_pipe_is_no_data_channel(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        reading, writing = os.pipe()
        assert await control.ask(SET_DATAFD, 4, (reading,)) == bytes.fromhex("0000001f")
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        assert await control.ask(SET_DATAFD, 4, (datagram.fileno(),)) == bytes.fromhex("0000001f")
        datagram.close()
        os.close(reading)
        os.close(writing)


async def test_a_second_data_descriptor_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control = await daemon.control()
        reply, first = await attach(control)
        assert reply == OK
        reply, second = await attach(control)
        assert reply == bytes.fromhex("0000001f")
        assert await second.at_end()
        assert await first.ask(READ_CLOCK, 10) == FAILURE_RESPONSE
        first.close()
        reply, third = await attach(control)
        assert reply == OK
        assert await third.ask(READ_CLOCK, 10) == FAILURE_RESPONSE


async def test_the_tpm_stays_for_the_next_client(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        for _ in range(3):
            control = await daemon.control()
            reply, data = await attach(control)
            assert reply == OK
            assert await control.ask(INIT, 4) == OK
            assert (await data.ask(c.STARTUP_CLEAR, 10))[6:] == OK
            control.close()
            data.close()


async def shut_down(daemon: Daemon) -> None:
    control = await daemon.control()
    assert await control.ask(SHUTDOWN, 4) == OK
    with trio.fail_after(PATIENCE):
        await daemon.ended.wait()


async def test_shutdown_while_a_command_computes(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        control, data = await daemon.control(), await daemon.data_client()
        await control.ask(INIT, 4)
        await data.ask(c.STARTUP_CLEAR, 10)
        control.close()
        daemon.engine.gate.close()
        await data.send(c.GET_RANDOM)
        await trio.to_thread.run_sync(daemon.engine.gate.wait_held)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_down, daemon)
            assert await data.receive(10) == bytes.fromhex("80010000000a00000909")
            daemon.engine.gate.open()
