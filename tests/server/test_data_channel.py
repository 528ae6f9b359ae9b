"""The data channel over real sockets: framing, clients that lie, stall or go away, and the ways to be reached."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest
import trio

from crbd.server import pump
from crbd.server.endpoint import DescriptorEndpoint, TcpEndpoint
from crbd.service.options import InstanceOptions, Startup
from tests.engine import commands as c

from .daemons import PATIENCE, Client, running

STARTED = InstanceOptions(startup=Startup.CLEAR, may_manufacture=True)
WRONG_SIZE = bytes.fromhex("80010000000a00000142")


async def test_commands_whole_in_pieces_and_several_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.data_client()
        assert len(await client.run(c.GET_RANDOM)) == 28
        for byte in c.GET_RANDOM[:-1]:
            await client.send(bytes([byte]))
        assert len(await client.run(c.GET_RANDOM[-1:])) == 28
        await client.send(c.GET_RANDOM * 3)
        assert len(await client.receive(84)) == 84


async def test_the_send_command_header_is_answered_in_kind(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.data_client()
        header = bytes.fromhex("0000000802") + len(c.GET_RANDOM).to_bytes(4, "big")
        framed = await client.ask(header + c.GET_RANDOM, 4 + 28 + 4)
        assert framed[:4] == (28).to_bytes(4, "big")
        assert framed[-4:] == bytes(4)
        assert daemon.engine.log[-1].locality == 2
        assert len(await client.run(c.GET_RANDOM)) == 28, "a plain one on the same connection"


async def test_clients_come_one_after_the_other(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        first, second = await daemon.data_client(), await daemon.data_client()
        assert len(await first.run(c.GET_RANDOM)) == 28
        await second.send(c.GET_RANDOM)
        first.close()
        assert len(await second.receive(28)) == 28


async def test_half_close_is_answered_then_closed(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.data_client()
        await client.send(c.GET_RANDOM)
        client.finish_sending()
        assert len(await client.receive(28)) == 28
        assert await client.at_end()


async def test_a_lying_size_is_answered_and_the_connection_kept_or_closed(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.data_client()
        assert await client.ask(bytes.fromhex("8001000000090000017b"), 10) == WRONG_SIZE
        assert len(await client.run(c.GET_RANDOM)) == 28
        assert await client.ask(bytes.fromhex("8001ffffffff0000017b") + bytes(5000), 10) == WRONG_SIZE
        assert await client.at_end()
        another = await daemon.data_client()
        assert len(await another.run(c.GET_RANDOM)) == 28


async def test_a_command_that_never_ends_is_answered_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "STALL_TIMEOUT", 0.05)
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.data_client()
        assert await client.ask(c.GET_RANDOM[:-1], 10) == WRONG_SIZE
        assert await client.at_end()
        another = await daemon.data_client()
        assert len(await another.run(c.GET_RANDOM)) == 28


async def test_a_client_that_goes_away_in_the_middle_harms_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        for sent in (c.GET_RANDOM[:4], c.GET_RANDOM, c.GET_RANDOM * 50):
            client = await daemon.data_client()
            await client.send(sent)
            client.close()
        client = await daemon.data_client()
        assert len(await client.run(c.GET_RANDOM)) == 28


async def test_a_client_that_does_not_read_does_not_hold_the_tpm(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        deaf = await daemon.data_client()
        with trio.move_on_after(0.3):
            while True:
                await deaf.socket.send(c.GET_RANDOM * 100)
        control = await daemon.control()
        assert await control.ask(bytes.fromhex("0000000e"), 4) == bytes(4), "STOP needs the engine"
        deaf.close()
        client = await daemon.data_client()
        assert await client.run(c.GET_RANDOM) == bytes.fromhex("80010000000a00000101")


async def test_a_client_that_does_not_read_is_no_obstacle_to_the_end(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with running(tmp_path, STARTED) as daemon:
            deaf = await daemon.data_client()
            with trio.move_on_after(0.3):
                while True:
                    await deaf.socket.send(c.GET_RANDOM * 100)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_tcp(tmp_path: Path, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((host, 0))
        port = reserved.getsockname()[1]
    async with running(tmp_path, STARTED, data=TcpEndpoint(host, port)):
        connected = trio.socket.socket(family)
        await connected.connect((host, port))
        client = Client(connected)
        assert len(await client.run(c.GET_RANDOM)) == 28
        client.close()


async def test_a_listening_descriptor(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "inherited"))
    listener.listen()
    async with running(tmp_path, STARTED, data=DescriptorEndpoint(listener.detach())):
        for _ in range(2):
            client = await Client.connect(tmp_path / "inherited")
            assert len(await client.run(c.GET_RANDOM)) == 28
            client.close()


async def test_connected_descriptors_end_the_daemon_when_both_are_closed(tmp_path: Path) -> None:
    data_ours, data_theirs = trio.socket.socketpair()
    ctrl_ours, ctrl_theirs = trio.socket.socketpair()
    theirs = DescriptorEndpoint(data_theirs.detach()), DescriptorEndpoint(ctrl_theirs.detach())
    async with running(tmp_path, STARTED, data=theirs[0], ctrl=theirs[1]) as daemon:
        data, control = Client(data_ours), Client(ctrl_ours)
        assert len(await data.run(c.GET_RANDOM)) == 28
        assert await control.ask(bytes.fromhex("00000001"), 8) == bytes.fromhex("000000000001ffff")
        data.close()
        assert await control.ask(bytes.fromhex("00000001"), 8) == bytes.fromhex("000000000001ffff")
        control.close()
        with trio.fail_after(PATIENCE):
            await daemon.ended.wait()


async def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.data_client()
        await client.run(c.GET_RANDOM)
        client.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path) == []


async def test_running_out_of_descriptors_makes_clients_wait_and_ends_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        control, waiting = await daemon.control(), Client(trio.socket.socket(socket.AF_UNIX))
        assert len(await control.ask(bytes.fromhex("00000001"), 8)) == 8
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = [os.dup(0)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, limits[1]))
            await waiting.socket.connect(str(daemon.data))
            await waiting.send(c.GET_RANDOM)
            with trio.move_on_after(0.3) as patience:
                await waiting.socket.recv(1)
            assert patience.cancelled_caught, "nobody could accept it"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.close(held[0])
        assert len(await waiting.receive(28)) == 28
