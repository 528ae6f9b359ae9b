"""Who is let in: users at UNIX sockets, addresses of TCP listeners, and who may change the state."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import PATIENCE, crbd, end, serving

pytestmark = pytest.mark.slow

GET_CAPABILITY = bytes.fromhex("00000001")
CAPABILITIES = bytes.fromhex("000000000001ffff")
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
_ASK = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
client.connect(sys.argv[1])
client.sendall(bytes.fromhex("00000001"))
print(client.recv(8).hex() or "closed")
"""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user gets to; pytest's are root's alone."""
    with tempfile.TemporaryDirectory(prefix="crbd-access-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def answered(path: Path, uid: int) -> str:
    """What a control client of that user gets."""
    command = ["setpriv", f"--reuid={uid}", "--clear-groups", sys.executable, "-I", "-c", _ASK, str(path)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    return asked.stdout.strip() or asked.stderr.strip().splitlines()[-1]


@as_root
@pytest.mark.parametrize(
    ("allowed", "users"), [("0", {0}), ("nobody,0", {0, NOBODY}), ("65534", {NOBODY}), (None, {0, NOBODY})]
)
def test_users_that_are_not_named_are_turned_away(open_place: Path, allowed: str | None, users: set[int]) -> None:
    options = [] if allowed is None else ["--allow-uids", allowed]
    with serving(open_place, "--ephemeral", "--ctrl", f"unix:{open_place / 'ctrl'},mode=0666", *options) as process:
        for uid in (0, NOBODY):
            said = answered(open_place / "ctrl", uid)
            if uid in users:
                assert said == CAPABILITIES.hex()
            else:
                assert said == "closed" or "ConnectionResetError" in said or "BrokenPipeError" in said
        _, errors = end(process)
        assert ("turned away" in errors) == (users != {0, NOBODY})


@as_root
def test_the_data_channel_turns_away_as_well(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--ephemeral", "--data", f"unix:{tmp_path / 'data'}", "--allow-uids", "nobody") as process,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(PATIENCE)
        client.connect(str(tmp_path / "data"))
        assert client.recv(1) == b""
        assert "user 0 is turned away" in end(process)[1]


@pytest.mark.parametrize("endpoint", ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:0", "tcp:example.org:0"])
@pytest.mark.parametrize("option", ["--ctrl", "--data"])
def test_a_listener_for_the_world_has_to_be_asked_for(endpoint: str, option: str) -> None:
    ended = crbd("serve", "--ephemeral", option, endpoint)
    assert ended.returncode == 2
    assert "--allow-remote" in ended.stderr


def test_a_listener_for_the_world_that_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path, "--ephemeral", "--data", "tcp:0.0.0.0:0", "--allow-remote") as process:
        assert end(process) == (0, "")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ctrl", "tcp:127.0.0.1:0", "--allow-uids", "0"], "--allow-uids is for UNIX sockets"),
        (["--ctrl", "unix:/nowhere/ctrl", "--allow-uids", "0,nosuchuser"], "there is no user 'nosuchuser'"),
    ],
)
def test_mistakes(options: list[str], text: str) -> None:
    ended = crbd("serve", "--ephemeral", *options)
    assert ended.returncode == 2
    assert text in ended.stderr


def exposed(place: Path, kind: str) -> Path:
    """A state directory, or a linear file, that others may change."""
    state = place / "around" / "state"
    state.parent.mkdir()
    if kind == "a file":
        state.write_bytes(b"")
        state.chmod(0o666)
        return state
    state.mkdir()
    match kind:
        case "writable":
            state.chmod(0o777)
        case "sticky":
            state.chmod(0o1777)
        case "of another":
            os.chown(state, NOBODY, NOBODY)
        case "replaceable":
            state.parent.chmod(0o777)
    return state


@as_root
@pytest.mark.parametrize(
    "kind",
    [
        "writable",
        "of another",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sticky", "replaceable", "a file")),
    ],
)
def test_state_that_others_may_change(tmp_path: Path, kind: str) -> None:
    state = exposed(tmp_path, kind)
    options: list[str | Path] = ["--state", state, "--create", "--ctrl", f"unix:{tmp_path / 'ctrl'}"]
    ended = crbd("serve", *options)
    assert ended.returncode == 45
    assert "--allow-exposed-state" in ended.stderr
    assert not state.is_dir() or list(state.iterdir()) == []
    if kind != "a file":
        with serving(tmp_path, *options, "--allow-exposed-state") as process:
            assert end(process) == (0, "")


def test_beside_others_in_a_directory_like_tmp(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with serving(tmp_path, "--state", tmp_path / "state", "--create", "--ctrl", f"unix:{tmp_path / 'ctrl'}") as process:
        assert end(process) == (0, "")
