"""One register pump after another, in the moments that a daemon hardly ever meets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trio

from crbd.engine.fake import FakeEngine
from crbd.server.register_buffer import RegisterBuffer, made
from crbd.server.register_pump import RegisterPump
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.service.served import ServedRegisters
from crbd.state.handover import RegistersLink
from crbd.store.memory import MemoryStore
from tests.engine import commands as c
from tests.vfiouser import client
from tests.vfiouser import vmm as v

from .register_daemons import in_thread

STARTED = (
    (v.LOC_CTRL, b"\1\0\0\0"),
    (v.CTRL_REQ, b"\1\0\0\0"),
    (v.BUFFER, c.GET_RANDOM),
    (v.CTRL_START, b"\1\0\0\0"),
)


@dataclass
class Served:
    """An instance with registers, and the two ends of a client's connection."""

    instance: Instance
    registers: ServedRegisters
    buffer: RegisterBuffer
    client: socket.socket
    server: socket.socket

    def pump(self, link: RegistersLink | None = None) -> RegisterPump:
        link, descriptor = link or RegistersLink(), self.buffer.descriptor
        return RegisterPump(self.server, self.instance, self.registers, link, descriptor, mappable=True)

    def await_execution(self) -> None:
        """Until no command is under way."""
        deadline = time.monotonic() + v.PATIENCE
        while self.registers.executing:
            assert time.monotonic() < deadline, "nobody executes it"


@pytest.fixture
def served() -> Iterator[Served]:
    options = InstanceOptions(startup=Startup.CLEAR, may_manufacture=True, serves_registers=True)
    ours, theirs = socket.socketpair()
    with made() as buffer, ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(v.PATIENCE)
        instance = Instance(FakeEngine, MemoryStore(), options, buffer.memory)
        assert instance.served is not None
        instance.begin()
        yield Served(instance, instance.served, buffer, theirs, ours)
        instance.close()


async def test_what_was_started_before_is_executed(served: Served) -> None:
    """A command that was started while its client was being frozen is left to the successor."""

    assert served.registers.write(STARTED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.pump().run)
        await in_thread(served.await_execution)
        nursery.cancel_scope.cancel()
    assert served.registers.read(v.BUFFER, 6) == bytes.fromhex("80010000001c")


async def test_nothing_is_started_any_more_while_freezing(served: Served) -> None:
    served.client.sendall(client.version(1))
    for offset, data in STARTED:
        served.client.sendall(client.write(2, client.BAR0, offset, data))
    pump = served.pump()
    pump.freeze()
    link = await pump.run()
    assert link is not None
    # Whether the messages were still taken or not: between the two they are answered once, and executed once.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.pump(link).run)
        answers = await in_thread(lambda: receive(served.client, 5))
        # The answer to what starts a command goes before the command.
        await in_thread(served.await_execution)
        nursery.cancel_scope.cancel()
    assert [answer.command for answer in answers] == [client.VERSION] + [client.WRITE] * 4
    assert served.registers.read(v.BUFFER, 6) == bytes.fromhex("80010000001c")


async def test_answers_that_were_not_read_are_not_lost(served: Served) -> None:
    """A client that asks and does not read is frozen in the middle of an answer."""
    served.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    asked = 40
    served.client.sendall(client.version(0))
    for number in range(1, asked):
        served.client.sendall(client.read(number, client.BAR0, 0, 0x2000))
    served.client.sendall(client.region_info(asked, client.BAR0, 64))
    link: RegistersLink | None = None
    for _ in range(3):
        pump = served.pump(link)
        async with trio.open_nursery() as nursery:

            async def freeze(stuck: RegisterPump = pump) -> None:
                await in_thread(lambda: until_stuck(served.client))
                stuck.freeze()

            nursery.start_soon(freeze)
            link = await pump.run()
        assert link is not None
        assert link.unsent, "it was not stuck"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.pump(link).run)
        answers = await in_thread(lambda: receive(served.client, asked + 1))
        nursery.cancel_scope.cancel()
    assert [answer.ident for answer in answers] == list(range(asked + 1))


def until_stuck(reading: socket.socket) -> None:
    """Return when more waits to be read than the least that a full socket holds."""
    deadline = time.monotonic() + v.PATIENCE
    while len(reading.recv(1 << 20, socket.MSG_PEEK)) < 4096:
        assert time.monotonic() < deadline, "nobody sends"


def receive(reading: socket.socket, count: int) -> list[client.Answer]:
    """So many whole replies; a descriptor that comes along is closed."""
    received = b""
    answers: list[client.Answer] = []
    while len(answers) < count:
        data, descriptors, _, _ = socket.recv_fds(reading, 1 << 16, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        assert data
        received += data
        while len(received) >= 16 and len(received) >= (size := int.from_bytes(received[4:8], "little")):
            answers.append(client.answer(received[:size]))
            received = received[size:]
    assert not received
    return answers
