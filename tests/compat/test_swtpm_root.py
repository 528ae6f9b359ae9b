"""`swtpm` in another root directory, as another user, in the background."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from crbd.errors import EndpointError
from crbd.server.endpoint import UnixEndpoint, opened

from .swtpm_processes import (
    DONE,
    GET_RANDOM,
    INIT,
    PATIENCE,
    SHUTDOWN,
    SWTPM,
    ask,
    connected,
    has_pid,
    is_at_end,
    killed,
    run_command,
    swtpm,
    wait_until,
)

pytestmark = pytest.mark.slow
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do that")
UID = 54321


def _status(pid: int, field: str) -> list[str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split()[1:]


@as_root
def test_chroot_and_runas(tmp_path: Path) -> None:
    """An empty directory will do: nothing is loaded from it. Files belong to the user."""
    root = tmp_path / "root"
    (root / "state").mkdir(parents=True)
    for path in (root, root / "state"):
        os.chown(path, UID, UID)
    secret = tmp_path / "key"
    secret.write_text("a passphrase")
    number = os.open(secret, os.O_RDONLY)
    with (
        subprocess.Popen(
            [
                *(*SWTPM, "socket", "--tpm2", "--chroot", str(root), "--runas", str(UID), "--tpmstate", "dir=/state"),
                *("--ctrl", "type=unixio,path=/ctrl", "--server", "type=unixio,path=/data", "--pid", "file=/pid"),
                *("--log", "file=/log,level=5", "--key", f"pwdfd={number}", "--flags", "startup-clear"),
            ],
            pass_fds=[number],
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        killed(process),
    ):
        os.close(number)
        wait_until(lambda: has_pid(root / "pid") or process.poll() is not None, "the pid file")
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert Path(f"/proc/{process.pid}/root").readlink() == root
        assert Path(f"/proc/{process.pid}/cwd").readlink() == root
        assert _status(process.pid, "Uid") == _status(process.pid, "Gid") == [str(UID)] * 4
        with connected(root / "data") as client:
            assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
        assert ask(root / "ctrl", SHUTDOWN) == DONE
        assert process.wait(PATIENCE) == 0
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {"log", "tpm2-00.permall", ".lock"} <= {path.name for path in files}
    assert {path.stat().st_uid for path in files} == {UID}


@as_root
def test_a_user_by_name_has_its_groups(tmp_path: Path) -> None:
    """The name is looked up before the root directory changes, in which nobody has a name."""
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o777)
    arguments = ("--tpmstate", "dir=/", "--ctrl", "type=unixio,path=/ctrl", "--pid", "file=/pid")
    with (
        subprocess.Popen(
            [*SWTPM, "socket", "--tpm2", "--chroot", str(root), "--runas", "nobody", *arguments]
        ) as process,
        killed(process),
    ):
        wait_until(lambda: has_pid(root / "pid"), "the pid file")
        user = pwd.getpwnam("nobody")
        assert _status(process.pid, "Uid") == [str(user.pw_uid)] * 4
        assert _status(process.pid, "Gid") == [str(user.pw_gid)] * 4
        groups = {str(number) for number in os.getgrouplist("nobody", user.pw_gid)}
        assert set(_status(process.pid, "Groups")) == groups
        process.terminate()
        assert process.wait(PATIENCE) == 0


@as_root
def test_a_root_that_is_none(tmp_path: Path) -> None:
    ended = swtpm("socket", "--tpm2", "--chroot", str(tmp_path / "absent"), "--print-info", "4")
    assert ended.returncode == 1
    assert ended.stderr.startswith("swtpm: chroot failed: No such file or directory")


def test_the_background(tmp_path: Path) -> None:
    """The process that was started ends with 0 when clients are served; whatever reads its output sees its end."""
    ctrl, pid_file = tmp_path / "ctrl", tmp_path / "pid"
    started = swtpm(
        *("socket", "-d", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--pid", f"file={pid_file}"),
        *("--ctrl", f"type=unixio,path={ctrl}"),
    )
    pid = int(pid_file.read_text())
    try:
        assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
        assert os.getsid(pid) not in (pid, os.getsid(0))
        assert Path(f"/proc/{pid}/fd/2").readlink() == Path("/dev/null")
        assert ask(ctrl, INIT) == DONE
        with connected(ctrl) as client:
            client.sendall(SHUTDOWN)
            assert client.recv(4) == DONE
            assert is_at_end(client)
        wait_until(lambda: not pid_file.exists(), "the end")
    finally:
        if pid_file.exists():
            os.kill(pid, signal.SIGKILL)


def test_a_start_in_the_background_that_fails(tmp_path: Path) -> None:
    ended = swtpm("socket", "-d", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--ctrl", "type=unixio,path=/no/ctrl")
    assert ended.returncode == 1
    assert ended.stderr.startswith("swtpm: Could not open UnixIO socket: ")
    assert not any(path.suffix == ".permall" for path in tmp_path.iterdir())


def test_the_service_manager_is_told_by_an_abstract_name(tmp_path: Path) -> None:
    name = f"crbd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(f"\0{name}")
        started = swtpm(
            *("socket", "-d", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--pid", f"file={tmp_path / 'pid'}"),
            *("--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"),
            environment={"NOTIFY_SOCKET": f"@{name}"},
        )
        assert started.returncode == 0
        assert manager.recv(100) == b"READY=1"
    assert ask(tmp_path / "ctrl", SHUTDOWN) == DONE
    wait_until(lambda: not (tmp_path / "pid").exists(), "the end")


@as_root
def test_a_socket_that_cannot_be_given_away_does_not_stay() -> None:
    place = Path(tempfile.mkdtemp(prefix="crbd-owner-"))
    try:
        os.chown(place, UID, UID)
        os.seteuid(UID)
        try:
            endpoint = UnixEndpoint(place / "ctrl", uid=0)
            with pytest.raises(EndpointError, match="Operation not permitted"), opened(endpoint, "--ctrl"):
                pass
            assert not list(place.iterdir())
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(place)
