"""A VMM and its guest on a real socket: what QEMU and Linux's tpm_crb do together, in one object. It blocks."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from pathlib import Path

from . import client as c

PATIENCE = 20.0
"""Seconds after which something that should have happened is a failure."""
LOC_STATE, LOC_CTRL, LOC_STS = 0x00, 0x08, 0x0C
CTRL_REQ, CTRL_STS, CTRL_CANCEL, CTRL_START = 0x40, 0x44, 0x48, 0x4C
CMD_SIZE, CMD_LADDR, CMD_HADDR, RSP_ADDR = 0x58, 0x5C, 0x60, 0x68
REQUEST_ACCESS, RELINQUISH = 1, 2
CMD_READY, GO_IDLE = 1, 2
BUFFER = 0x1000
BASE = 0xFEBFE000


class Vmm:
    """One connection. `descriptors` are those that came with replies; whoever uses one takes it off the list."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.descriptors: list[int] = []
        self.memory: mmap.mmap | None = None
        """The data buffer, where it has been mapped."""
        self.messages = 0
        self._received = b""

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())

    # -- messages

    def send(self, message: bytes) -> None:
        self.messages += 1
        self.socket.sendall(message)

    def answer(self) -> c.Answer:
        while len(self._received) < 16 or len(self._received) < int.from_bytes(self._received[4:8], "little"):
            data, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 8)
            self.descriptors += descriptors
            if not data:
                raise EOFError("the server has closed the connection")
            self._received += data
        size = int.from_bytes(self._received[4:8], "little")
        whole, self._received = self._received[:size], self._received[size:]
        return c.answer(whole)

    def ask(self, message: bytes) -> c.Answer:
        self.send(message)
        answer = self.answer()
        assert message[:4] == struct.pack("<HH", answer.ident, answer.command)
        return answer

    def start(self, *, mapping: bool = True) -> Vmm:
        """What QEMU does from its start to a guest that has found the device."""
        for message in c.HANDSHAKE:
            assert self.ask(message).errno is None
        if mapping:
            self.memory = mmap.mmap(self.descriptors[0], 0x1000, offset=BUFFER)
        self.move(BASE)
        return self

    def boot(self, *, mapping: bool = True) -> Vmm:
        """The same, and the firmware's or the kernel's TPM2_Startup(CLEAR)."""
        self.start(mapping=mapping)
        assert self.run(bytes.fromhex("80010000000c000001440000"))[6:] == bytes(4)
        return self

    def move(self, base: int) -> None:
        assert self.ask(c.write(1, c.CONFIG, 0x10, base.to_bytes(4, "little"))).errno is None

    def reset(self) -> None:
        assert self.ask(c.message(3, c.RESET)).errno is None

    # -- registers

    def get(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.read(offset, size), "little")

    def put(self, offset: int, value: int, *, posted: bool = False) -> None:
        self.write(offset, value.to_bytes(4, "little"), posted=posted)

    def read(self, offset: int, size: int) -> bytes:
        answer = self.ask(c.read(7, c.BAR0, offset, size))
        assert answer.errno is None
        return answer.body[16:]

    def write(self, offset: int, data: bytes, *, posted: bool = False) -> None:
        if posted:
            self.send(c.write(8, c.BAR0, offset, data, c.NO_REPLY))
        else:
            assert self.ask(c.write(8, c.BAR0, offset, data)).errno is None

    # -- commands, as Linux's tpm_crb runs them

    def begin(self, command: bytes) -> None:
        """All up to and with START."""
        self.put(LOC_CTRL, REQUEST_ACCESS)
        assert self.get(LOC_STATE) & 0x82 == 0x82, "not granted"
        self.put(CTRL_REQ, CMD_READY)
        assert self.get(CTRL_REQ) == 0
        self.put(CTRL_CANCEL, 0)
        if self.memory is not None:
            self.memory[: len(command)] = command
        else:
            for at in range(0, len(command), 8):
                self.write(BUFFER + at, command[at : at + 8], posted=True)
        self.put(CTRL_START, 1)

    def wait(self) -> None:
        """Until START is clear."""
        deadline = time.monotonic() + PATIENCE
        while self.get(CTRL_START):
            assert time.monotonic() < deadline, "START stays set"
            time.sleep(0.001)

    def finish(self) -> bytes:
        """The response, when START is clear, and all that comes after it."""
        assert self.get(CTRL_STS) == 0, "a fatal error"
        size = int.from_bytes(self.taken(6)[2:], "big")
        response = self.taken(size)
        self.put(CTRL_REQ, GO_IDLE)
        assert self.get(CTRL_REQ) == 0
        self.put(LOC_CTRL, RELINQUISH)
        assert self.get(LOC_STATE) & 2 == 0
        return response

    def taken(self, size: int) -> bytes:
        """The first bytes of the buffer."""
        if self.memory is not None:
            return self.memory[:size]
        return b"".join(self.read(BUFFER + at, min(8, size - at)) for at in range(0, size, 8))

    def run(self, command: bytes) -> bytes:
        self.begin(command)
        self.wait()
        return self.finish()
