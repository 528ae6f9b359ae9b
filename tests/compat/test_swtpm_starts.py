"""The start of `swtpm`, and every way in which it does not come to one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from .swtpm_processes import (
    GET_RANDOM,
    PATIENCE,
    STARTUP_CLEAR,
    SUCCESS_HEAD,
    SWTPM,
    connected,
    end,
    free_port,
    has_pid,
    killed,
    mode_of,
    run_command,
    running,
    swtpm,
    wait_until,
)

NOT_STARTED = bytes.fromhex("00000100")
pytestmark = pytest.mark.slow


def test_a_directory_at_the_sockets_path(tmp_path: Path) -> None:
    (tmp_path / "ctrl").mkdir()
    ended = swtpm(
        "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("swtpm: Could not open UnixIO socket: ")


def test_a_socket_in_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "no/ctrl"
    ended = swtpm("socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--ctrl", f"type=unixio,path={path}")
    assert ended.returncode == 1
    first, second = ended.stderr.splitlines()
    assert first == "swtpm: Could not open UnixIO socket: No such file or directory"
    assert str(path) in second


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ended = swtpm("socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--server", f"port={port}")
    assert ended.returncode == 1
    assert ended.stderr.startswith("swtpm: Could not open TCP socket: Address already in use\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a socket away needs root")
def test_a_socket_with_an_owner(tmp_path: Path) -> None:
    ctrl, data = tmp_path / "ctrl", tmp_path / "data"
    with running(
        tmp_path,
        *("--ctrl", f"type=unixio,path={ctrl},uid=nobody,gid=nogroup,mode=0640"),
        *("--server", f"type=unixio,path={data},uid=12345,gid=54321"),
    ) as process:
        status = data.lstat()
        assert (status.st_uid, status.st_gid) == (12345, 54321)
        assert ctrl.owner() == "nobody"
        assert mode_of(ctrl) == 0o640
        assert end(process) == 0
    assert not data.exists()


def test_the_pid_file_as_a_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "pid-by-descriptor"
    number = os.open(path, os.O_WRONLY | os.O_CREAT)
    ctrl = tmp_path / "ctrl"
    with (
        subprocess.Popen(
            [
                *SWTPM,
                "socket",
                "--tpm2",
                "--tpmstate",
                f"dir={tmp_path}",
                "--pid",
                f"fd={number}",
                "--ctrl",
                f"type=unixio,path={ctrl}",
            ],
            pass_fds=[number],
        ) as process,
        killed(process),
    ):
        os.close(number)
        wait_until(lambda: has_pid(path), "the pid")
        assert path.read_bytes() == str(process.pid).encode()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert not path.exists()


def test_a_pid_file_that_cannot_be_written(tmp_path: Path) -> None:
    arguments = ["--tpmstate", f"dir={tmp_path}", "--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"]
    for pid in ("file=/no/such/pid", "fd=99"):
        ended = swtpm("socket", "--tpm2", *arguments, "--pid", pid)
        assert ended.returncode == 1
        assert ended.stderr.startswith(
            "swtpm: Could not open pidfile /no/such/pid : No such file or directory\nswtpm: --pid /no/such/pid: "
            if pid.startswith("file")
            else "swtpm: Bad filedescriptor 99 for pid file\n"
        )
        assert not (tmp_path / "ctrl").exists()


def test_no_state_directory(tmp_path: Path) -> None:
    ctrl = f"type=unixio,path={tmp_path / 'ctrl'}"
    ended = swtpm("socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'absent'}", "--ctrl", ctrl)
    assert ended.returncode == 1
    assert "absent is not there" in ended.stderr
    assert not (tmp_path / "absent").exists()


def test_what_the_environment_says(tmp_path: Path) -> None:
    port = free_port()
    environment = {"TPM_PORT": str(port), "TPM_PATH": str(tmp_path)}
    with running(
        tmp_path, "--server", "type=tcp", "--flags", "startup-clear", state=False, environment=environment
    ) as process:
        with connected(port) as client:
            assert run_command(client, GET_RANDOM)[:2] == b"\x80\x01"
        assert end(process) == 0
    assert (tmp_path / "tpm2-00.permall").exists()


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(str(tmp_path / "notify"))
        ctrl = tmp_path / "ctrl"
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with running(tmp_path, "--ctrl", f"type=unixio,path={ctrl}", environment=environment) as process:
            assert manager.recv(100) == b"READY=1"
            assert end(process) == 0


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ("not-need-init", NOT_STARTED),
        ("startup-clear", bytes(4)),
        ("startup-none,not-need-init", NOT_STARTED),
        ("disable-auto-shutdown,startup-clear", bytes(4)),
    ],
)
def test_flags(tmp_path: Path, flags: str, code: bytes) -> None:
    data = tmp_path / "data"
    with running(tmp_path, "--server", f"type=unixio,path={data}", "--flags", flags) as process:
        with connected(data) as client:
            assert run_command(client, GET_RANDOM)[6:10] == code
        assert end(process) == 0


@pytest.mark.parametrize(("flag", "shuts_down"), [("", True), (",disable-auto-shutdown", False)])
def test_the_automatic_shutdown(tmp_path: Path, flag: str, shuts_down: bool) -> None:
    """TPM2_Startup(STATE) is possible only after a TPM2_Shutdown(STATE) (TPM 2.0 Part 3, 9.3)."""
    data = tmp_path / "data"
    arguments = ("--server", f"type=unixio,path={data}", "--flags")
    with running(tmp_path, *arguments, f"startup-clear{flag}") as process:
        with connected(data) as client:
            run_command(client, GET_RANDOM)
        assert end(process) == 0
    with running(tmp_path, *arguments, "not-need-init,disable-auto-shutdown") as process:
        with connected(data) as client:
            startup_state = STARTUP_CLEAR[:-2] + b"\0\1"
            assert (run_command(client, startup_state) == SUCCESS_HEAD) is shuts_down
        assert end(process) == 0


def test_a_linear_file(tmp_path: Path) -> None:
    data, file = tmp_path / "data", tmp_path / "linear"
    arguments = ("--tpmstate", f"backend-uri=file://{file},lock,mode=0600", "--server", f"type=unixio,path={data}")
    for _ in range(2):
        with running(tmp_path, *arguments, "--flags", "startup-clear", state=False) as process:
            with connected(data) as client:
                assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
            assert end(process) == 0
    assert file.read_bytes().startswith(b"nilmptws")
    assert mode_of(file) == 0o600


@pytest.mark.parametrize(("level", "lines"), [("", 0), (",level=0", 0), (",level=2", 1), (",level=5", 1)])
def test_log_levels(tmp_path: Path, level: str, lines: int) -> None:
    log = tmp_path / "log"
    log.write_text("old\n")
    arguments = ("--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}", "--log", f"file={log}{level},prefix=p: ")
    with running(tmp_path, *arguments) as process:
        assert end(process) == 0
    text = log.read_text()
    assert text.startswith("old\n")
    assert (len(re.findall(r"^p: .*serving", text, re.MULTILINE)) == lines) is True
    with running(tmp_path, *arguments[:3], f"file={log},truncate") as process:
        assert end(process) == 0
    assert log.read_text() == ""


@pytest.mark.parametrize(
    ("umask", "option", "mode"), [(0o022, "", 0o640), (0o077, "", 0o600), (0o077, ",mode=0660", 0o660)]
)
def test_the_mode_of_state_files(tmp_path: Path, umask: int, option: str, mode: int) -> None:
    before = os.umask(umask)
    try:
        with running(
            tmp_path,
            *("--tpmstate", f"dir={tmp_path}{option}", "--ctrl", f"type=unixio,path={tmp_path / 'ctrl'},mode=0666"),
            *("--flags", "not-need-init"),
            state=False,
        ) as process:
            assert mode_of(tmp_path / "tpm2-00.permall") == mode
            assert mode_of(tmp_path / "ctrl") == 0o666
            assert mode_of(tmp_path / "pid") == 0o644 & ~umask
            assert end(process, signal.SIGHUP) == 0
    finally:
        os.umask(before)


def test_a_pid_file_that_is_there_is_written_into(tmp_path: Path) -> None:
    """swtpm_setup makes the file, holds it open and reads it until the pid is there."""
    path = tmp_path / "pid"
    path.write_text("1234567890 of one that crashed")
    with open(path) as held, running(tmp_path, "--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}") as process:
        wait_until(lambda: bool(held.seek(0) == 0 and held.read() == str(process.pid)), "the pid")
        assert end(process) == 0
    path.symlink_to(tmp_path / "elsewhere")
    ended = swtpm(
        *("socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--pid", f"file={path}"),
        *("--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"),
    )
    assert ended.returncode == 1
    assert not (tmp_path / "elsewhere").exists()
