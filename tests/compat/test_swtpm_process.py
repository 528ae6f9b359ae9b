"""`swtpm` as a process: what libvirt does with it, how it ends, what it leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from .swtpm_processes import (
    DONE,
    GET_CAPABILITY,
    INIT,
    LAUNCHERS,
    PATIENCE,
    SHUTDOWN,
    SWTPM,
    ask,
    connected,
    end,
    has_pid,
    killed,
    mode_of,
    receive,
    running,
    swtpm,
    wait_until,
)


def test_what_libvirt_runs(tmp_path: Path) -> None:
    """As libvirt 9 does it: the process stays, its pid file names it, SHUTDOWN ends it, and only state stays behind."""
    ctrl, log = tmp_path / "ctrl", tmp_path / "log"
    with running(
        tmp_path,
        *("--ctrl", f"type=unixio,path={ctrl},mode=0600"),
        *("--log", f"file={log}"),
        "--terminate",
    ) as process:
        assert (tmp_path / "pid").read_bytes() == str(process.pid).encode()
        assert (mode_of(ctrl), mode_of(tmp_path / "pid"), mode_of(log)) == (0o600, 0o644, 0o600)
        assert not (tmp_path / "state/tpm2-00.permall").exists()
        with connected(ctrl) as client:
            client.sendall(INIT)
            assert receive(client, 4) == DONE
            assert mode_of(tmp_path / "state/tpm2-00.permall") == 0o640
            client.sendall(SHUTDOWN)
            assert receive(client, 4) == DONE
        assert process.wait(PATIENCE) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "state"]
    assert (tmp_path / "state/.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "--server", f"type=unixio,path={tmp_path / 'data'}") as process:
        assert mode_of(tmp_path / "data") == 0o770
        assert end(process, number) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_signal_that_was_ignored_ends_it_from_the_first_moment(tmp_path: Path) -> None:
    """Started as a background job of a shell, and told to end as soon as there is a pid file."""
    (tmp_path / "state").mkdir()
    data = f"type=unixio,path={tmp_path / 'data'}"
    arguments = ["socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", "--server", data]
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *SWTPM]
    command = [*ignoring, *arguments, "--pid", f"file={tmp_path / 'pid'}"]
    with subprocess.Popen(command, text=True) as process, killed(process):
        wait_until(lambda: has_pid(tmp_path / "pid"), "the pid file")
        assert end(process, signal.SIGINT) == 0


def test_files_at_the_sockets_paths_are_replaced(tmp_path: Path) -> None:
    ctrl, data = tmp_path / "ctrl", tmp_path / "data"
    ctrl.write_text("a regular file")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(data))
    with running(tmp_path, "--ctrl", f"type=unixio,path={ctrl}", "--server", f"type=unixio,path={data}") as process:
        assert len(ask(ctrl, GET_CAPABILITY, 8)) == 8
        with connected(data):
            pass
        assert end(process) == 0


def test_a_locked_directory(tmp_path: Path) -> None:
    arguments = ("--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}")
    with running(tmp_path, *arguments) as process:
        second = swtpm("socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", *arguments)
        assert second.returncode == 1
        assert f"in use by process {process.pid}" in second.stderr
        # The first one is as it was, its socket too.
        assert len(ask(tmp_path / "ctrl", GET_CAPABILITY, 8)) == 8
        assert end(process) == 0


def test_a_key_in_a_pipe(tmp_path: Path) -> None:
    """As libvirt hands it over; `remove` takes the file of a key away."""
    ctrl = tmp_path / "ctrl"
    migration_key = tmp_path / "migration-key"

    def start_and_init() -> None:
        reading, writing = os.pipe()
        migration_key.write_text("00" * 32)
        os.write(writing, b"a passphrase")
        os.close(writing)
        with running(
            tmp_path,
            *("--ctrl", f"type=unixio,path={ctrl}"),
            *("--key", f"pwdfd={reading},mode=aes-256-cbc"),
            *("--migration-key", f"file={migration_key},mode=aes-256-cbc,remove"),
            pass_fds=[reading],
        ) as process:
            os.close(reading)
            assert not migration_key.exists()
            assert ask(ctrl, INIT) == DONE
            assert end(process) == 0

    start_and_init()
    # u16 flags of the head: encrypted (1), by a 256-bit key (8).
    assert (tmp_path / "state/tpm2-00.permall").read_bytes()[4:6] == bytes((0, 1 | 8))
    start_and_init()
    ended = swtpm("socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}", "--ctrl", f"type=unixio,path={ctrl}")
    assert ended.returncode == 1
    assert "encrypted" in ended.stderr


def test_the_launcher_becomes_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (
        subprocess.Popen(
            [
                str(LAUNCHERS / "swtpm"),
                "socket",
                "--tpm2",
                "--tpmstate",
                f"dir={tmp_path / 'state'}",
                "--pid",
                f"file={tmp_path / 'pid'}",
                "--ctrl",
                f"type=unixio,path={tmp_path / 'ctrl'}",
            ],
        ) as process,
        killed(process),
    ):
        wait_until(lambda: has_pid(tmp_path / "pid"), "the pid file")
        assert (tmp_path / "pid").read_bytes() == str(process.pid).encode()
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Unlike swtpm's, whose pid file and log are the only traces of the reason."""
    (tmp_path / "tpm2-00.permall").write_bytes(b"no state at all")
    log = tmp_path / "log"
    ended = swtpm(
        *("socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--log", f"file={log},prefix=<%d> "),
        *("--pid", f"file={tmp_path / 'pid'}", "--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"),
    )
    assert ended.returncode == 1
    assert "tpm2-00.permall" in ended.stderr
    assert log.read_text().startswith("<%d> ")
    assert "tpm2-00.permall" in log.read_text()
    assert (tmp_path / "tpm2-00.permall").read_bytes() == b"no state at all"
    assert not (tmp_path / "pid").exists()
    assert not (tmp_path / "ctrl").exists()
