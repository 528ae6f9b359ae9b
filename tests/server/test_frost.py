"""Frost at every step of every exchange: a daemon that is frozen all the time serves as one that never is.

The program that it should become is never there, so that the daemon serves on; the handover is written and read each
time. (tests/cli/test_reload.py has the real thing.)
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing

from crbd.control import messages as m
from crbd.server.control import _Conversation
from crbd.server.frost import Frost
from crbd.server.succession import Program
from crbd.service.options import InstanceOptions, Startup
from crbd.state.handover import ControlLink, DataLink, Handover, Link, decode, encode
from tests.engine import commands as c

from .daemons import PATIENCE, Client, Daemon, running

STARTED = InstanceOptions(startup=Startup.CLEAR, may_manufacture=True)
UPGRADE = bytes.fromhex("000000c1")
SET_DATAFD = bytes.fromhex("00000010")
GET_REGISTERS = bytes.fromhex("000000c0")
REGISTERS_SIZE = 4 + 4 + 4 + 5 * 4096
CONTROL = {
    "GET_CAPABILITY": ("00000001", 8),
    "INIT": ("00000002 00000000", 4),
    "GET_TPMESTABLISHED": ("00000004", 8),
    "SET_LOCALITY, padded": ("00000005 00 000000", 4),
    "SET_LOCALITY": ("00000005 01", 4),
    "HASH_START": ("00000006", 4),
    "HASH_DATA": ("00000007 00000005 68656c6c6f", 4),
    "HASH_END": ("00000008", 4),
    "established": ("00000004", 8),
    "RESET_TPMESTABLISHED": ("0000000b 03", 4),
    "STORE_VOLATILE": ("0000000a", 4),
    "GET_CONFIG": ("0000000f", 8),
    "GET_STATEBLOB of nothing": ("0000000c 00000000 00000003 00000000", 16),
    "an unknown command": ("000000ff", 4),
    "STOP": ("0000000e", 4),
    "SET_BUFFERSIZE": ("00000011 00000f80", 16),
    "SET_STATEBLOB that is none": ("0000000d 00000000 00000001 00000003 0b10b0", 4),
    "INIT again": ("00000002 00000001", 4),
    "LOCK_STORAGE": ("00000013 00000000", 4),
}


class NeverThere(Program):
    """A program that would go on, and is gone when it should. Keeps what it was to be given."""

    handovers: list[Handover]

    @classmethod
    def new(cls) -> NeverThere:
        program = cls(("/nonexistent",))
        object.__setattr__(program, "handovers", [])
        return program

    def try_out(self, handover: Handover) -> str | None:
        return None

    def become(self, handover: Handover, serve: Callable[[int], bytes] | None = None) -> NoReturn:
        assert decode(encode(handover), handover.descriptors) == handover
        for number in handover.descriptors.values():
            os.fstat(number)
        self.handovers.append(handover)
        raise OSError("there is no such program")


def fresh(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


async def freeze(daemon: Daemon) -> None:
    """Have the daemon frozen once; the answer comes when it serves on."""
    client = await daemon.control()
    head = await client.ask(UPGRADE, 12)
    assert head[:8] == bytes(8)
    assert await client.receive(int.from_bytes(head[8:], "big")) == b"there is no such program"
    client.close()


async def control_life(place: Path, *, frozen: bool) -> list[bytes]:
    """The replies to all requests; with `frozen` the daemon is frozen after every byte."""
    program = NeverThere.new()
    replies: list[bytes] = []
    async with running(place, program=program) as daemon:
        client = await daemon.control()
        for text, size in CONTROL.values():
            request = bytes.fromhex(text)
            if not frozen:
                await client.send(request)
            else:
                for at in range(len(request)):
                    await client.send(request[at : at + 1])
                    await freeze(daemon)
            replies.append(await client.receive(size))
        client.close()
    if frozen:
        assert any(link.connection.received for handover in program.handovers for link in controls(handover))
    return replies


def controls(handover: Handover) -> list[ControlLink]:
    return [link for link in handover.links if isinstance(link, ControlLink)]


async def test_control_requests(tmp_path: Path) -> None:
    frozen = await control_life(fresh(tmp_path, "a"), frozen=True)
    assert frozen == await control_life(fresh(tmp_path, "b"), frozen=False)


async def data_life(place: Path, *, frozen: bool) -> list[bytes]:
    program = NeverThere.new()
    responses: list[bytes] = []
    header = bytes.fromhex("0000000800") + len(c.pcr_read(16)).to_bytes(4, "big")
    async with running(place, STARTED, program=program) as daemon:
        client = await daemon.data_client()
        for command, size in (
            (c.pcr_extend(16, b"\x16" * 32), 19),
            (c.pcr_read(16), 62),
            (header + c.pcr_read(16), 4 + 62 + 4),
            (bytes.fromhex("8001 00000005 00000000"), 10),
            (c.nv_define(8), 19),
        ):
            for at in range(len(command)):
                await client.send(command[at : at + 1])
                if frozen:
                    await freeze(daemon)
            responses.append(await client.receive(size))
        executed = [entry.command for entry in daemon.engine.log]
    if frozen:
        assert any(isinstance(link, DataLink) and link.received for each in program.handovers for link in each.links)
    return [*responses, *executed]


async def test_data_commands(tmp_path: Path) -> None:
    assert await data_life(fresh(tmp_path, "a"), frozen=True) == await data_life(fresh(tmp_path, "b"), frozen=False)


async def test_a_descriptor_with_half_a_request(tmp_path: Path) -> None:
    program = NeverThere.new()
    ours, theirs = socket.socketpair()
    async with running(tmp_path, STARTED, program=program) as daemon:
        client = await daemon.control()
        await client.send(SET_DATAFD[:1], (theirs.fileno(),))
        theirs.close()
        for byte in SET_DATAFD[1:]:
            await freeze(daemon)
            await client.send(bytes([byte]))
        assert await client.receive(4) == bytes(4)
        await freeze(daemon)
        data = Client(trio.socket.from_stdlib_socket(ours))
        data.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        ours.setblocking(False)
        assert len(await data.run(c.GET_RANDOM)) == 28
    assert any("with" in name for handover in program.handovers for name in handover.descriptors)


async def test_requests_and_clients_that_wait_for_the_channel(tmp_path: Path) -> None:
    program = NeverThere.new()
    ours, theirs = socket.socketpair()
    async with running(tmp_path, STARTED, program=program) as daemon:
        first, second = await daemon.control(), await daemon.control()
        assert len(await first.ask(bytes.fromhex("00000001"), 8)) == 8
        # Three requests that wait, one of them unknown, one with a descriptor.
        await second.send(bytes.fromhex("00000001 0000000f"))
        await freeze(daemon)
        await second.send(SET_DATAFD, (theirs.fileno(),))
        theirs.close()
        await freeze(daemon)
        assert len(await first.ask(bytes.fromhex("00000001"), 8)) == 8, "the first one has its turn still"
        first.close()
        assert await second.receive(8 + 8 + 4) == bytes.fromhex("00000000 0001ffff 00000000 00000000 00000000")
        ours.close()


@pytest.mark.parametrize("count", [3000])
async def test_a_client_that_does_not_read_its_responses(tmp_path: Path, count: int) -> None:
    """Responses pile up until the pump cannot send: what is left goes along, and none is lost or sent twice."""
    program = NeverThere.new()
    async with running(tmp_path, STARTED, program=program) as daemon:
        client = await daemon.data_client()
        command = c.pcr_read(16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, command * count)
            with trio.fail_after(PATIENCE):
                while not any(isinstance(link, DataLink) and link.unsent for link in latest(program)):
                    await freeze(daemon)
            response = await client.receive(62)
            for _ in range(count - 1):
                assert await client.receive(62) == response
            await freeze(daemon)
        assert sum(entry.command == command for entry in daemon.engine.log) == count


async def test_a_client_that_does_not_read_its_replies(tmp_path: Path) -> None:
    program = NeverThere.new()
    count = 60
    async with running(tmp_path, STARTED, program=program) as daemon:
        client = await daemon.control()
        await client.send(GET_REGISTERS * count)
        with trio.fail_after(PATIENCE):
            while not any(isinstance(link, ControlLink) and link.unsent for link in latest(program)):
                await freeze(daemon)
        reply = await client.receive(REGISTERS_SIZE)
        for _ in range(count - 1):
            assert await client.receive(REGISTERS_SIZE) == reply


def latest(program: NeverThere) -> tuple[Link, ...]:
    return program.handovers[-1].links if program.handovers else ()


async def test_the_end_wins_over_frost(tmp_path: Path) -> None:
    """SHUTDOWN comes with the request for an upgrade: it ends the daemon, which does not become another."""
    async with running(tmp_path, STARTED, program=NeverThere.new()) as daemon:
        client = await daemon.control()
        await client.send(bytes.fromhex("00000003") + UPGRADE)
        assert await client.receive(4) == bytes(4)
        with trio.fail_after(PATIENCE):
            await daemon.ended.wait()


async def test_a_command_that_takes_too_long_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crbd.server.daemon.COMMAND_PATIENCE", 0.05)
    async with running(tmp_path, STARTED, program=NeverThere.new()) as daemon:
        client = await daemon.data_client()
        daemon.engine.gate.close()
        await client.send(c.GET_RANDOM)
        await trio.to_thread.run_sync(daemon.engine.gate.wait_held)
        await freeze(daemon)
        assert await client.receive(10) == bytes.fromhex("80010000000a00000909")
        daemon.engine.gate.open()
        assert len(await client.run(c.GET_RANDOM)) == 28


async def test_not_in_the_middle_of_a_migration(tmp_path: Path) -> None:
    options = InstanceOptions(startup=Startup.CLEAR, may_manufacture=True, release_lock_outgoing=True)
    async with running(tmp_path, options, program=NeverThere.new()) as daemon:
        client = await daemon.control()
        await client.ask(bytes.fromhex("0000000c 00000000 00000003 00000000"), 16)
        head = await client.ask(UPGRADE, 12)
        assert head[:8] == bytes(8)
        assert b"a migration is under way" in await client.receive(int.from_bytes(head[8:], "big"))
        assert len(await client.ask(bytes.fromhex("00000001"), 8)) == 8


async def test_no_program_no_upgrade(tmp_path: Path) -> None:
    async with running(tmp_path, STARTED) as daemon:
        client = await daemon.control()
        head = await client.ask(UPGRADE, 12)
        assert head[:8] == bytes(8)
        assert b"does not know what to start" in await client.receive(int.from_bytes(head[8:], "big"))
        assert len(await client.ask(bytes.fromhex("00000001"), 8)) == 8


async def test_two_that_both_claim_the_turn_get_it_one_after_the_other() -> None:
    """No daemon hands over so; and a daemon that is taken over to has no way back."""
    answered: list[m.Request] = []
    release = trio.Event()

    async def reply(request: m.Request) -> m.Reply:
        answered.append(request)
        await release.wait()
        return m.Done()

    async def to_its_end(
        conversation: _Conversation, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        conversation.take_up(ControlLink(has_turn=True), None)
        task_status.started()
        await conversation.run()
        conversation.close()

    turn, frost = trio.Lock(), Frost()
    pairs = [trio.socket.socketpair() for _ in range(2)]
    conversations = [_Conversation(ours, turn, reply, frost) for ours, _ in pairs]
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for conversation, (_, client) in zip(conversations, pairs, strict=True):
                await nursery.start(to_its_end, conversation)
                await client.send(bytes.fromhex(CONTROL["GET_CONFIG"][0]))
            await trio.testing.wait_all_tasks_blocked()
            assert len(answered) == 1
            release.set()
            assert await pairs[0][1].recv(4) == bytes(4)
            pairs[0][1].close()
            assert await pairs[1][1].recv(4) == bytes(4)
            pairs[1][1].close()
    assert len(answered) == 2
