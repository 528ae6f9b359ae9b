"""`crbd state snapshot` and `restore`, of a running daemon and of a directory; and what SIGKILL leaves."""

from __future__ import annotations

import hashlib
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crbd.control.spec import MAX_DOCUMENT as LONGEST_ON_THE_CHANNEL
from crbd.state.document import decode, verify
from crbd.state.header import MAX_DOCUMENT
from crbd.state.keys import RawKey
from tests.engine import commands as c
from tests.state import samples as s

from .process import PATIENCE, ask, end, serving, wait_until
from .states import crbd, document, key_file, refuse

pytestmark = pytest.mark.slow

ON = ["--flags", "startup-clear"]
INIT = bytes.fromhex("00000002 00000000")
READ, READ_SIZE = c.pcr_read(16), 62


def options(place: Path, *more: str | Path) -> list[str | Path]:
    sockets: list[str | Path] = ["--ctrl", f"unix:{place}/ctrl", "--data", f"unix:{place}/data"]
    return [*sockets, "--state", place / "tpm", *more]


def pcr(place: Path) -> bytes:
    return c.pcr_value(ask(place / "data", READ, READ_SIZE))


def extend(place: Path, value: int) -> None:
    assert c.code(ask(place / "data", c.pcr_extend(16, bytes((value,)) * 32), 19)) == c.SUCCESS


def test_the_channel_carries_the_longest_document() -> None:
    assert LONGEST_ON_THE_CHANNEL == MAX_DOCUMENT


@pytest.mark.parametrize("suite", ["plain", "sealed"])
def test_there_and_back(tmp_path: Path, suite: str) -> None:
    key = ["--key", key_file(tmp_path)] if suite == "sealed" else []
    ctrl = ["--ctrl", f"unix:{tmp_path}/ctrl"]
    with serving(tmp_path, *options(tmp_path, *ON, "--create", *key)) as process:
        extend(tmp_path, 1)
        before = pcr(tmp_path)
        done = crbd("state", "snapshot", *ctrl, tmp_path / "out")
        assert (done.status, done.err) == (0, "")
        assert suite in done.out
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
        refuse(10, "--force", "state", "snapshot", *ctrl, tmp_path / "out", untouched=tmp_path)
        extend(tmp_path, 2)
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 19)) == c.SUCCESS
        refuse(35, "--allow-rollback", "state", "restore", *ctrl, tmp_path / "out")
        done = crbd("state", "restore", *ctrl, tmp_path / "out", "--allow-rollback")
        assert (done.status, done.err) == (0, "")
        assert "is lost, but for the undo" in done.out
        assert pcr(tmp_path) == before
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 19)) == c.SUCCESS, "the index was of later"
        assert end(process)[0] == 0
    data = (tmp_path / "out").read_bytes()
    assert verify(data).sealed == (suite == "sealed")
    taken = decode(data, [RawKey(s.KEY)] if key else None)
    assert taken.checkpoint
    assert taken.crb is not None
    assert taken.identity.uuid == document(tmp_path / "tpm", s.KEY if key else None).identity.uuid
    # And offline: the volatile state in it is no one's whose platform is reset.
    done = crbd("state", "restore", tmp_path / "tpm", tmp_path / "out", "--allow-rollback", *key)
    assert (done.status, done.err) == (0, "")
    with serving(tmp_path, *options(tmp_path, *key)) as process:
        assert ask(tmp_path / "ctrl", INIT, 4) == bytes(4)
        assert c.code(ask(tmp_path / "data", READ, 10)) == c.INITIALIZE
        assert end(process)[0] == 0


def test_a_snapshot_of_a_directory_is_its_document(tmp_path: Path) -> None:
    with serving(tmp_path, *options(tmp_path, *ON, "--create")) as process:
        refuse(15, "in use", "state", "snapshot", tmp_path / "tpm", tmp_path / "out")
        assert end(process)[0] == 0
    assert crbd("state", "snapshot", tmp_path / "tpm", tmp_path / "out").status == 0
    assert crbd("state", "export", tmp_path / "tpm", "--out", tmp_path / "exported").status == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "exported").read_bytes()


def test_wrong_words(tmp_path: Path) -> None:
    out, ctrl = tmp_path / "out", f"unix:{tmp_path}/ctrl"
    refuse(2, "whose state", "state", "snapshot", out)
    refuse(2, "whose state", "state", "snapshot", tmp_path, out, "--ctrl", ctrl)
    refuse(2, "its key already", "state", "snapshot", "--ctrl", ctrl, out, "--key", key_file(tmp_path))
    refuse(32, "No such file", "state", "snapshot", "--ctrl", ctrl, out)
    (tmp_path / "bad").write_bytes(b"no document")
    refuse(12, "bad", "state", "restore", "--ctrl", ctrl, tmp_path / "bad")
    base: list[str | Path] = ["serve", "--ctrl", ctrl]
    refuse(2, "--checkpoint", *base, "--ephemeral", "--checkpoint", "5")
    for when in ("0", "always", "1e9", "nan"):
        refuse(2, "is no time", *base, "--state", tmp_path / "tpm", "--create", "--checkpoint", when)
    swtpm: list[str | Path] = ["--state", tmp_path / "new", "--layout", "swtpm", "--create", "--checkpoint", "5"]
    refuse(2, "crbd's own layout", *base, *swtpm)


# -- SIGKILL


@contextmanager
def lives(place: Path, *more: str) -> Iterator[None]:
    """A daemon that is killed at the end."""
    with serving(place, *options(place, *more)) as process:
        yield
        process.kill()
        process.wait(PATIENCE)
    (place / "pid").unlink()


def test_without_checkpoints_nothing_is_answered_before_a_new_startup(tmp_path: Path) -> None:
    with lives(tmp_path, *ON, "--create"):
        extend(tmp_path, 1)
    with lives(tmp_path):
        assert c.code(ask(tmp_path / "data", READ, 10)) == c.FAILURE, "off"
        assert ask(tmp_path / "ctrl", INIT, 4) == bytes(4)
        assert c.code(ask(tmp_path / "data", READ, 10)) == c.INITIALIZE
        assert c.code(ask(tmp_path / "data", c.pcr_extend(16, bytes(32)), 10)) == c.INITIALIZE
    with lives(tmp_path, "--flags", "not-need-init"):
        assert c.code(ask(tmp_path / "data", READ, 10)) == c.INITIALIZE


def test_with_every_command_no_answered_extend_is_ever_missing(tmp_path: Path) -> None:
    """Killed while a client extends without a pause: the PCR is that of all answered extends, or of one more."""
    seed = int(os.environ.get("KILL_SEED", str(random.randrange(1 << 32))))
    print(f"KILL_SEED={seed}")
    pick = random.Random(seed)
    possible = {bytes(32)}
    extend_it = c.pcr_extend(16, b"\x11" * 32)
    for number in range(4):
        more = ["--create"] if not number else []
        flags = ["--checkpoint", "every-command", *ON, *more]
        with serving(tmp_path, *options(tmp_path, *flags)) as process, socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(tmp_path / "data"))
            value = _asked(client, READ, READ_SIZE)[-32:]
            assert value in possible
            for _ in range(pick.randrange(1, 60)):
                assert c.code(_asked(client, extend_it, 19)) == c.SUCCESS
                value = _extended(value)
            client.sendall(extend_it)
            for _ in range(pick.randrange(2000)):
                pass
            process.kill()
            process.wait(PATIENCE)
        (tmp_path / "pid").unlink()
        possible = {value, _extended(value)}


def test_an_idle_tpm_goes_on_and_a_busy_one_does_not(tmp_path: Path) -> None:
    flags = ["--checkpoint", "0.1", "--flags", "not-need-init"]
    with lives(tmp_path, *flags, "--create"):
        assert c.code(ask(tmp_path / "data", c.STARTUP_CLEAR, 10)) == c.SUCCESS
        extend(tmp_path, 1)
        before = pcr(tmp_path)
        wait_until(lambda: document(tmp_path / "tpm").volatile is not None, "a checkpoint")
    with lives(tmp_path, *flags):
        assert pcr(tmp_path) == before
        extend(tmp_path, 2)
        assert document(tmp_path / "tpm").volatile is None, "removed before the answer left"


def _asked(client: socket.socket, command: bytes, size: int) -> bytes:
    client.sendall(command)
    received = b""
    while len(received) < size:
        piece = client.recv(size - len(received))
        assert piece
        received += piece
    return received


def _extended(value: bytes) -> bytes:
    return hashlib.sha256(value + b"\x11" * 32).digest()


def test_swtpm_is_given_no_checkpoint(tmp_path: Path) -> None:
    """It would go on from it at the next boot."""
    with lives(tmp_path, *ON, "--checkpoint", "every-command", "--create"):
        extend(tmp_path, 1)
    assert document(tmp_path / "tpm").checkpoint
    done = crbd("state", "convert", tmp_path / "tpm", "--to", "swtpm", "--out", tmp_path / "swtpm")
    assert done.status == 0
    assert "a checkpoint" in done.out + done.err
    assert sorted(path.name for path in (tmp_path / "swtpm").iterdir()) == [".lock", "tpm2-00.permall"]
