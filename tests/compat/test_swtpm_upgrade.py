"""A live upgrade of the swtpm command, as libvirt runs it: nothing that could be read once is needed again."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from .swtpm_processes import DONE, GET_CAPABILITY, INIT, PATIENCE, connected, end, receive, running

UPGRADE = bytes.fromhex("000000c1")


def upgrade(client: socket.socket) -> tuple[bool, str]:
    client.sendall(UPGRADE)
    head = receive(client, 12)
    return head[7] == 1, receive(client, int.from_bytes(head[8:], "big")).decode()


@pytest.mark.slow
def test_with_keys_from_pipes_a_log_and_a_pid_file(tmp_path: Path) -> None:
    key, migration_key = pipe_with(b"the passphrase"), pipe_with(b"another one")
    ctrl, log = tmp_path / "ctrl", tmp_path / "log"
    with (
        running(
            tmp_path,
            *("--ctrl", f"type=unixio,path={ctrl},mode=0600"),
            *("--log", f"file={log},truncate,level=2"),
            *("--key", f"pwdfd={key},mode=aes-256-cbc", "--migration-key", f"pwdfd={migration_key},mode=aes-256-cbc"),
            pass_fds=(key, migration_key),
        ) as process,
        connected(ctrl) as client,
    ):
        client.settimeout(PATIENCE)
        client.sendall(INIT)
        assert receive(client, 4) == DONE
        before = (tmp_path / "state/tpm2-00.permall").read_bytes()
        for _ in range(2):
            done, said = upgrade(client)
            assert done, said
            client.sendall(GET_CAPABILITY)
            assert receive(client, 8)[:4] == DONE
        assert (tmp_path / "pid").read_bytes() == str(process.pid).encode()
        assert log.read_text().count("goes on for") == 2, "the log is gone on with"
        # A reset writes the state again, by the same key: what is there is encrypted still.
        client.sendall(INIT)
        assert receive(client, 4) == DONE
        after = (tmp_path / "state/tpm2-00.permall").read_bytes()
        assert before[4:6] == after[4:6], "the flags: encrypted, by a key of 256 bits"
        assert end(process) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "state"]


@pytest.mark.slow
def test_not_where_the_program_is_out_of_reach(tmp_path: Path) -> None:
    ctrl = tmp_path / "ctrl"
    with (
        running(tmp_path, "--ctrl", f"type=unixio,path={ctrl}", "--pcap", f"file={tmp_path / 'pcap'}") as process,
        connected(ctrl) as client,
    ):
        client.settimeout(PATIENCE)
        done, said = upgrade(client)
        assert not done
        assert "does not know what to start" in said
        client.sendall(INIT)
        assert receive(client, 4) == DONE
        assert end(process) == 0


def pipe_with(text: bytes) -> int:
    """The reading end of a pipe that holds the text and is closed."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    return reading
