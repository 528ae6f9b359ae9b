"""Hostile bytes on both channels of a real daemon: it never hangs, never dies, and the TPM answers afterwards.

CI tries a few hundred; HYPOTHESIS_PROFILE=nightly tries 50 000.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.process import PATIENCE, ask, end, serving, wait_until
from tests.engine import commands as c

SHUTDOWN = bytes.fromhex("00000003")
RESET = bytes.fromhex("0000000e 00000002 00000001 00000002 00000000 00000005 00")
"""STOP, INIT that deletes volatile state which a STORE_VOLATILE may have left, INIT without it, locality 0."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a daemon's sockets `ctrl` and `data` are."""
    place = tmp_path_factory.mktemp("fuzz")
    arguments = ["--ephemeral", "--ctrl", f"unix:{place}/ctrl", "--data", f"unix:{place}/data", "--log-level", "error"]
    with serving(place, *arguments, "--flags", "startup-clear") as process:
        yield place
        status, errors = end(process, signal.SIGTERM)
        assert status == 0, errors
        assert "Traceback" not in errors


def say(path: Path, pieces: list[bytes], descriptors: int) -> bytes:
    """Send the pieces, the first with that many descriptors, close one's half, and return all that comes back."""
    received = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                sent = os.dup(client.fileno()) if descriptors else -1
                rights = array.array("i", [sent] * descriptors)
                client.sendmsg([piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else [])
                descriptors = 0
                if sent >= 0:
                    os.close(sent)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(1 << 16):
                received += piece
    return received


def assert_alive(place: Path) -> None:
    """After the client, the TPM is what it was: it can be powered on and does its work."""
    assert ask(place / "ctrl", RESET, 16) == bytes(16)
    assert c.code(ask(place / "data", c.STARTUP_CLEAR, 10)) == c.SUCCESS
    assert c.code(ask(place / "data", c.GET_RANDOM, 28)) == c.SUCCESS


lengths = st.one_of(st.integers(0, 64), st.sampled_from([4096, 4097, 0x80000, 0x80001, 0x7FFFFFFF, 0xFFFFFFFF]))
words = st.one_of(st.integers(0, 0x14), st.integers(0, 0xFFFFFFFF)).map(lambda word: struct.pack(">I", word))
control_requests = st.one_of(
    st.binary(max_size=40),
    st.lists(words, max_size=6).map(b"".join),
    st.builds(lambda code, body: struct.pack(">I", code) + body, st.integers(0, 0x14), st.binary(max_size=24)),
    st.builds(lambda length, body: struct.pack(">II", 7, length) + body, lengths, st.binary(max_size=64)),
    st.builds(
        lambda kind, length, body: struct.pack(">IIII", 0xD, 0, kind, length) + body,
        st.integers(0, 4),
        lengths,
        st.binary(max_size=64),
    ),
).filter(lambda data: SHUTDOWN not in data)
heads = st.builds(
    lambda tag, size, code: struct.pack(">HII", tag, size, code),
    st.sampled_from([0x8001, 0x8002, 0xC1, 0]),
    lengths,
    st.one_of(st.integers(0x11F, 0x197), st.integers(0, 0xFFFFFFFF)),
)
data_requests = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda head, body: head + body, heads, st.binary(max_size=64)),
    st.builds(
        lambda locality, size, body: struct.pack(">IBI", 8, locality, size) + body,
        st.integers(0, 255),
        lengths,
        st.binary(max_size=64),
    ),
    st.sampled_from([c.GET_RANDOM, c.STARTUP_CLEAR, c.pcr_read(0)]),
)
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@relaxed
@given(pieces=st.lists(control_requests, min_size=1, max_size=4), descriptors=st.integers(0, 3))
def test_control(place: Path, pieces: list[bytes], descriptors: int) -> None:
    if SHUTDOWN in b"".join(pieces):
        return
    say(place / "ctrl", pieces, descriptors)
    assert_alive(place)


@relaxed
@given(pieces=st.lists(data_requests, min_size=1, max_size=4))
def test_data(place: Path, pieces: list[bytes]) -> None:
    answers = say(place / "data", pieces, 0)
    # Whatever was sent, what came back is a row of responses, with or without the send-command header.
    while answers:
        if answers[:2] in (b"\x80\x01", b"\x80\x02"):
            answers = answers[int.from_bytes(answers[2:6], "big") :]
        else:
            size = int.from_bytes(answers[:4], "big")
            assert answers[4 + size : 8 + size] == bytes(4)
            answers = answers[8 + size :]
    assert_alive(place)


def test_nothing_was_leaked(place: Path) -> None:
    process = int((place / "pid").read_text())

    def held() -> int:
        return len(os.listdir(f"/proc/{process}/fd"))

    before = held()
    for _ in range(50):
        say(place / "ctrl", [bytes.fromhex("00000010"), bytes.fromhex("000000ff")], 3)
    assert_alive(place)
    wait_until(lambda: held() <= before, "the daemon to close what it was handed")
