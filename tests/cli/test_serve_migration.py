"""`crbd serve --migration` and `--migration-key`, as processes on one directory."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from crbd.control import messages as m
from tests.engine import commands as c

from .process import PATIENCE, crbd, end, serving

INCOMING, OUTGOING = "incoming", "release-lock-outgoing"
MOVED = [m.GetStateBlob(m.StateFlag.DECRYPTED, kind, 0) for kind in (1, 2, 3)]


def ask(place: Path, request: m.Request) -> m.Reply:
    """One request on a connection of its own, which closes when the reply is read."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(place / "ctrl"))
        client.sendall(m.encode_request(request))
        client.shutdown(socket.SHUT_WR)
        received = b""
        while piece := client.recv(65536):
            received += piece
    return m.decode_reply(type(request), received)


def execute(place: Path, command: bytes) -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(place / "data"))
        client.sendall(command)
        return c.code(client.recv(4096))


def places(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "a", tmp_path / "b"
    for place in made:
        place.mkdir()
    return made


def options(place: Path, *further: str) -> list[str]:
    state = place.parent / "state"
    return ["--state", str(state), "--ctrl", f"unix:{place}/ctrl", "--data", f"unix:{place}/data", *further]


@pytest.mark.parametrize("layout", ["crbd", "swtpm"])
def test_the_lock_goes_from_one_process_to_the_other_and_back(tmp_path: Path, layout: str) -> None:
    here, there = places(tmp_path)
    (tmp_path / "key").write_text("a passphrase")
    key = ["--migration-key", f"pwdfile={tmp_path}/key,mode=aes-256-cbc"]
    first = options(here, *key, "--create", "--layout", layout, "--migration", OUTGOING)
    second = options(there, *key, "--migration", f"{INCOMING},{OUTGOING}")
    with serving(here, *first) as source, ExitStack() as later:
        assert ask(here, m.GetConfig()) == m.Config(m.ConfigFlag.MIGRATION_KEY)
        assert ask(here, m.Init(m.InitFlag(0))) == m.Done()
        assert execute(here, c.STARTUP_CLEAR) == c.SUCCESS
        destination = later.enter_context(serving(there, *second))
        blobs = {request.blob_type: ask(here, request) for request in MOVED}
        for kind in (1, 2):
            blob = blobs[kind]
            assert isinstance(blob, m.StateBlob)
            assert ask(there, m.SetStateBlob(m.StateFlag(0), kind, blob.data)) == m.Done()
        assert ask(here, m.LockStorage(2)) == m.Failure(9)
        assert ask(there, m.Init(m.InitFlag.DELETE_VOLATILE)) == m.Done()
        assert execute(there, c.pcr_extend(16, b"\x11" * 32)) == c.SUCCESS
        assert end(source)[0] == 0
        assert execute(there, c.nv_define(8)) == c.SUCCESS
        for request in MOVED:
            ask(there, request)
        assert end(destination) == (0, "")
    with serving(here, *options(here)) as again:
        assert ask(here, m.Init(m.InitFlag(0))) == m.Done()
        assert end(again)[0] == 0


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--migration", "outgoing"], "--migration: there is no 'outgoing'"),
        (["--migration", "incoming", "--flags", "startup-clear"], "--migration incoming waits for INIT"),
        (["--migration-key", "pwdfile=/nowhere"], "--migration-key: pwdfile=/nowhere"),
        (["--migration-key", "file=/dev/null"], "--migration-key"),
    ],
)
def test_operator_mistakes(tmp_path: Path, further: list[str], said: str) -> None:
    here, _ = places(tmp_path)
    ended = crbd("serve", *options(here, "--create", *further))
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_incoming_does_not_mind_who_has_the_state_and_makes_none(tmp_path: Path) -> None:
    _, there = places(tmp_path)
    with serving(there, *options(there, "--migration", INCOMING)) as destination:
        assert isinstance(ask(there, m.Init(m.InitFlag(0))), m.Failure), "there is nothing to power on"
        status, said = end(destination)
    assert status == 0
    assert "there is no TPM state" in said
    assert not (tmp_path / "state" / "tpm.crbd").exists()
