"""`crbd registers` against a running daemon, while somebody else has the control channel."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from threading import Thread

import pytest

from tests.engine import commands as c

from .process import ask, crbd, serving


def test_registers_tell_what_the_data_channel_did(tmp_path: Path) -> None:
    arguments = ["--ephemeral", "--ctrl", f"unix:{tmp_path}/ctrl", "--data", f"unix:{tmp_path}/data"]
    with (
        serving(tmp_path, *arguments, "--flags", "startup-clear"),
        socket.socket(socket.AF_UNIX) as holder,
    ):
        holder.connect(f"{tmp_path}/ctrl")
        holder.sendall(bytes.fromhex("00000005 02"))
        assert holder.recv(4) == bytes(4)
        response = ask(tmp_path / "data", c.GET_RANDOM, 28)
        ctrl = ["--ctrl", f"unix:{tmp_path}/ctrl"]
        done = crbd("registers", *ctrl, "--json", "--buffer")
        assert done.returncode == 0, done.stderr
        localities = json.loads(done.stdout)["localities"]
        assert [shown["locality"] for shown in localities] == [0, 1, 2, 3, 4]
        state = localities[2]["registers"]["LOC_STATE"]["fields"]
        assert (state["locAssigned"], state["activeLocality"]) == (1, 2)
        assert localities[2]["registers"]["CTRL_START"]["value"] == 0
        assert localities[2]["buffer"].startswith(response.hex())
        assert set(localities[0]["buffer"]) == {"0"}, "no other locality sees it"

        text = crbd("registers", *ctrl, "--locality", "2")
        assert text.returncode == 0
        assert text.stdout.startswith("locality 2\n  0x00 LOC_STATE ")
        assert "activeLocality=2" in text.stdout
        assert response.hex(" ", 4).split()[3] not in text.stdout
        assert text.stdout.count("locality ") == 1

        wrong = crbd("registers", *ctrl, "--locality", "5")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("code", "text", "arguments"),
    [
        (2, "--ctrl", []),
        (2, "fd:3", ["--ctrl", "fd:3"]),
        (32, "unix:/no/such/socket", ["--ctrl", "unix:/no/such/socket"]),
        (32, "tcp:127.0.0.1:1", ["--ctrl", "tcp:127.0.0.1:1"]),
    ],
)
def test_mistakes(code: int, text: str, arguments: list[str]) -> None:
    done = crbd("registers", *arguments)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert text in done.stderr


def test_a_daemon_that_does_not_know_registers(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/ctrl")
        listener.listen()

        def refuse() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(4)
                accepted.sendall(bytes.fromhex("0000000a"))

        thread = Thread(target=refuse)
        thread.start()
        done = crbd("registers", "--ctrl", f"unix:{tmp_path}/ctrl")
        thread.join()
    assert done.returncode == 32
    assert "does not answer GET_REGISTERS (0xa)" in done.stderr
