"""Hostile messages to the register channel of a real daemon: it never hangs, never dies, keeps no descriptor, and the
next guest finds a TPM.

CI tries a few thousand; HYPOTHESIS_PROFILE=nightly tries 50 000.
"""

from __future__ import annotations

import array
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.process import end, serving, wait_until
from tests.engine import commands as c
from tests.vfiouser import client
from tests.vfiouser.vmm import PATIENCE, Vmm

MESSAGES = 50_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 12_000
SEEDS = range(3)
EDGES = (0, 1, 2, 3, 7, 8, 9, 31, 32, 64, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 1 << 16, 1 << 31, (1 << 32) - 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a daemon's socket `registers` is, and its process id in `pid`."""
    place = tmp_path_factory.mktemp("fuzz")
    with serving(
        place, "--ephemeral", "--registers", f"vfio-user:{place}/registers", "--log-level", "error"
    ) as process:
        yield place
        status, errors = end(process)
        assert status == 0, errors
        assert "Traceback" not in errors


def number(chance: random.Random, bits: int) -> int:
    """Often one at which something begins or ends."""
    value = chance.choice(EDGES) if chance.random() < 0.7 else chance.getrandbits(bits)
    return value & ((1 << bits) - 1)


def registers(chance: random.Random) -> bytes:
    """An access to registers that a guest could have meant."""
    if chance.random() < 0.4:
        return client.read(
            chance.getrandbits(16), client.BAR0, chance.randrange(0, 0x1FF8, 4), chance.choice((1, 4, 8))
        )
    offset = chance.choice((0x08, 0x40, 0x48, 0x4C, 0x50, 0x1000, 0x1002))
    data = chance.choice((b"\1\0\0\0", b"\2\0\0\0", b"\4\0\0\0", b"\0\0\0\0", c.STARTUP_CLEAR, c.GET_RANDOM))
    return client.write(chance.getrandbits(16), client.BAR0, offset, data, chance.choice((0, client.NO_REPLY)))


def message(chance: random.Random) -> bytes:
    """Any message: right, wrong in a field, or nothing at all."""
    ident = chance.getrandbits(16)
    # What ends a connection (kinds 8 and 9) is rare, or little of what comes after it would be heard.
    kind = chance.choices(range(10), (3, 2, 2, 3, 2, 2, 2, 2, 0.2, 0.6))[0]
    if kind < 3:
        return registers(chance)
    if kind == 3:
        region, offset, count = number(chance, 32), number(chance, 64), number(chance, 32)
        region = chance.choice((0, 0, 7, region))
        return client.message(
            ident, chance.choice((client.READ, client.WRITE)), struct.pack("<QII", offset, region, count)
        )
    if kind == 4:
        data = chance.randbytes(chance.choice((0, 1, 4, 8, 300, 0x1000)))
        return client.write(ident, chance.choice((0, 7, 7, number(chance, 32))), number(chance, 13), data)
    if kind == 5:
        writes = [(chance.choice((0, 7)), number(chance, 13), chance.randbytes(chance.randrange(9))) for _ in range(5)]
        return client.write_multi(ident, writes)
    if kind == 6:
        return chance.choice(client.HANDSHAKE)
    if kind == 7:
        body = b"".join(struct.pack("<I", number(chance, 32)) for _ in range(chance.randrange(9)))
        return client.message(ident, chance.randrange(20), body, chance.choice((0, 0, 0x10, 0x20)))
    whole = bytearray(chance.choice(client.HANDSHAKE))
    if kind == 8:
        whole[chance.randrange(8, len(whole))] ^= 1 << chance.randrange(8)
        return bytes(whole)
    if chance.random() < 0.9:
        return client.dma_map(ident, number(chance, 64), number(chance, 64))
    return chance.choice((chance.randbytes(20), bytes(whole[:-3]), client.message(ident, 9, size=number(chance, 32))))


def converse(path: Path, messages: list[bytes], descriptors: int) -> bytes:
    """Say all that, the first message with descriptors, and return all that is said to it until the end."""
    received = b""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * descriptors))] if descriptors else []
    with socket.socket(socket.AF_UNIX) as talking:
        talking.settimeout(PATIENCE)
        talking.connect(str(path))
        deadline = time.monotonic() + PATIENCE
        rest = memoryview(b"".join(messages))
        talking.setblocking(False)
        open_ended = True
        while True:
            assert time.monotonic() < deadline, "the daemon hangs"
            readable, writable, _ = select.select([talking], [talking] if rest else [], [], 1.0)
            try:
                if writable:
                    rest = rest[talking.sendmsg([rest[: 1 << 15]], rights) :]
                    rights = []
                elif not rest and open_ended:
                    talking.shutdown(socket.SHUT_WR)
                    open_ended = False
                if readable:
                    piece, ancillary, _, _ = talking.recvmsg(1 << 16, 64)
                    close_all(ancillary)
                    received += piece
                    if not piece:
                        return received
            except (BrokenPipeError, ConnectionResetError):
                return received


def close_all(ancillary: list[tuple[int, int, bytes]]) -> None:
    for _, _, data in ancillary:
        for descriptor in struct.unpack(f"{len(data) // 4}i", data):
            os.close(descriptor)


def guest(place: Path) -> int:
    """A machine boots and goes; how many descriptors the daemon has while it is there."""
    with Vmm(place / "registers") as vmm:
        vmm.boot()
        assert len(vmm.run(c.GET_RANDOM)) == 28
        return len(os.listdir(f"/proc/{(place / 'pid').read_text().strip()}/fd"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_a_client_says(place: Path, seed: int) -> None:
    chance = random.Random(seed)
    before = guest(place)
    said = 0
    while said < MESSAGES // len(SEEDS):
        messages = [message(chance) for _ in range(chance.randrange(1, 40))]
        if chance.random() < 0.9:
            messages.insert(0, client.version(1))
        said += len(messages)
        received = converse(place / "registers", messages, chance.choice((0, 0, 1, 8, 30)))
        whole = 0
        while whole < len(received):
            size = int.from_bytes(received[whole + 4 : whole + 8], "little")
            assert 16 <= size <= 16 + 16 + 65536
            whole += size
        assert whole == len(received), "the last reply is cut short"
    wait_until(lambda: guest(place) <= before, "as few descriptors as before")
