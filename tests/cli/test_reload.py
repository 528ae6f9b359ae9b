"""The upgrade of a running daemon, by itself: what its clients see of it, in every layout and in every odd moment."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine import commands as c

from .process import CRBD, PATIENCE, crbd, end, serving, wait_until

UPGRADE = bytes.fromhex("000000c1")
GET_CAPABILITY = bytes.fromhex("00000001")
CAPABILITIES = bytes.fromhex("000000000001ffff")
SET_DATAFD = bytes.fromhex("00000010")
HASH_START = bytes.fromhex("00000006")
HASH_END = bytes.fromhex("00000008")
LAYOUTS: dict[str, Callable[[Path], list[str | Path]]] = {
    "crbd": lambda place: ["--state", place / "state", "--create"],
    "swtpm": lambda place: ["--state", place / "state", "--create", "--layout", "swtpm"],
    "linear": lambda place: ["--state", place / "state", "--create", "--layout", "linear"],
    "ephemeral": lambda place: ["--ephemeral"],
}


class Client:
    """A client that stays connected."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size and (piece := self.socket.recv(size - len(received))):
            received += piece
        return received

    def run(self, command: bytes) -> bytes:
        self.socket.sendall(command)
        return self.response()

    def response(self) -> bytes:
        head = self.receive(10)
        return head + self.receive(int.from_bytes(head[2:6], "big") - 10)

    def ask(self, request: bytes, size: int) -> bytes:
        self.socket.sendall(request)
        return self.receive(size)

    def upgrade(self) -> tuple[bool, str]:
        """Ask for it on this connection; whether it was done, and what was said."""
        head = self.ask(UPGRADE, 12)
        assert head[:4] == bytes(4)
        return head[7] == 1, self.receive(int.from_bytes(head[8:12], "big")).decode()


def sockets(place: Path) -> list[str | Path]:
    return ["--ctrl", f"unix:{place / 'ctrl'}", "--data", f"unix:{place / 'data'}", "--flags", "startup-clear"]


@pytest.mark.parametrize(
    "layout",
    ["crbd", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("swtpm", "linear", "ephemeral"))],
)
def test_no_client_notices(tmp_path: Path, layout: str) -> None:
    with serving(tmp_path, *LAYOUTS[layout](tmp_path), *sockets(tmp_path)) as process:
        with Client(tmp_path / "data") as data, Client(tmp_path / "ctrl") as ctrl:
            assert c.code(data.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
            assert c.code(data.run(c.nv_define(8))) == c.SUCCESS
            assert c.code(data.run(c.nv_write(b"12345678"))) == c.SUCCESS
            before = data.run(c.pcr_read(16))
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
            done, said = ctrl.upgrade()
            assert done, said
            assert data.run(c.pcr_read(16)) == before
            assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
        # New clients find it, the pid is the same, and the end is as ever.
        assert int((tmp_path / "pid").read_text()) == process.pid
        with Client(tmp_path / "data") as data:
            assert data.run(c.pcr_read(16)) == before
        status, errors = end(process)
        assert status == 0, errors
        assert {path.name for path in tmp_path.iterdir()} <= {"state", "state.lock"}


def test_crbd_reload(tmp_path: Path) -> None:
    with serving(tmp_path, "--ephemeral", *sockets(tmp_path)):
        done = crbd("reload", "--ctrl", f"unix:{tmp_path / 'ctrl'}")
        assert (done.returncode, done.stderr) == (0, "")
        assert "goes on for crbd" in done.stdout
        with Client(tmp_path / "ctrl"):
            again = crbd("reload", "--ctrl", f"unix:{tmp_path / 'ctrl'}")
            assert again.returncode == 0, "another client's turn is not waited for"


@pytest.mark.slow
def test_hangup_is_the_same(tmp_path: Path) -> None:
    with serving(tmp_path, "--ephemeral", *sockets(tmp_path), "--log-level", "info") as process:
        with Client(tmp_path / "data") as data:
            data.run(c.pcr_extend(16, b"\x16" * 32))
            before = data.run(c.pcr_read(16))
            for _ in range(3):
                process.send_signal(signal.SIGHUP)
                assert data.run(c.pcr_read(16)) == before
        assert process.stderr is not None
        for line in process.stderr:
            if "goes on for crbd" in line:
                break
        assert end(process)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--key", "--passphrase"])
def test_a_key_that_can_be_read_only_once(tmp_path: Path, kind: str) -> None:
    """The state stays sealed by it, and the successor needs no second reading."""
    reading, writing = os.pipe()
    os.write(writing, bytes(range(32)).hex().encode())
    os.close(writing)
    arguments = ["--state", str(tmp_path / "state"), "--create", kind, f"fd:{reading}", "--pid", str(tmp_path / "pid")]
    command = [*CRBD, "serve", *arguments, *map(str, sockets(tmp_path))]
    with subprocess.Popen(command, pass_fds=(reading,), stderr=subprocess.PIPE, text=True) as process:
        os.close(reading)
        try:
            wait_until((tmp_path / "pid").exists, "the pid file")
            with Client(tmp_path / "data") as data, Client(tmp_path / "ctrl") as ctrl:
                for value in (b"11111111", b"22222222"):
                    data.run(c.nv_define(8))
                    assert c.code(data.run(c.nv_write(value))) == c.SUCCESS
                    done, said = ctrl.upgrade()
                    assert done, said
                    assert c.nv_value(data.run(c.nv_read(8))) == value
            assert end(process)[0] == 0
        finally:
            process.kill()
    key = tmp_path / "key"
    key.write_text(bytes(range(32)).hex())
    key.chmod(0o600)
    seen = crbd("check", tmp_path / "state", kind, f"file:{key}")
    assert seen.returncode == 0, seen.stderr
    assert crbd("check", tmp_path / "state").returncode != 0


@pytest.mark.slow
def test_half_a_command_and_half_a_request(tmp_path: Path) -> None:
    command = c.pcr_extend(16, b"\x16" * 32)
    # As long as it takes to try the new program a request may take only if it is a large one.
    hashed = bytes(4 << 20)
    request = bytes.fromhex("00000007") + len(hashed).to_bytes(4, "big") + hashed
    with (
        serving(tmp_path, "--ephemeral", *sockets(tmp_path)),
        Client(tmp_path / "data") as data,
        Client(tmp_path / "ctrl") as ctrl,
        Client(tmp_path / "ctrl") as other,
    ):
        assert ctrl.ask(HASH_START, 4) == bytes(4)
        data.socket.sendall(command[:20])
        ctrl.socket.sendall(request[: 3 << 20])
        done, said = other.upgrade()
        assert done, said
        assert ctrl.ask(request[3 << 20 :], 4) == bytes(4)
        assert ctrl.ask(HASH_END, 4) == bytes(4)
        # A whole command would have ended the hash sequence, half a one does not.
        data.socket.sendall(command[20:])
        assert c.code(data.response()) == c.SUCCESS
        measured = hashlib.sha256(bytes(32) + hashlib.sha256(hashed).digest()).digest()
        assert c.pcr_value(data.run(c.pcr_read(17))) == measured


@pytest.mark.slow
def test_a_client_that_waits_for_its_turn_waits_on(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--ephemeral", *sockets(tmp_path)),
        Client(tmp_path / "ctrl") as first,
        Client(tmp_path / "ctrl") as second,
        Client(tmp_path / "data") as data,
    ):
        assert first.ask(GET_CAPABILITY, 8) == CAPABILITIES
        second.socket.sendall(GET_CAPABILITY)
        data.run(c.GET_RANDOM)
        with Client(tmp_path / "data") as waiting:
            waiting.socket.sendall(c.GET_RANDOM)
            done, said = first.upgrade()
            assert done, said
            second.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.socket.recv(1)
            second.socket.settimeout(PATIENCE)
            assert first.ask(GET_CAPABILITY, 8) == CAPABILITIES
            first.socket.close()
            assert second.receive(8) == CAPABILITIES
            data.socket.close()
            assert c.code(waiting.response()) == c.SUCCESS


@pytest.mark.slow
def test_a_descriptor_that_waits_for_its_turn_goes_along(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ctrl = tmp_path / "ctrl"
    with (
        ours,
        serving(tmp_path, "--ephemeral", "--ctrl", f"unix:{ctrl}", "--flags", "startup-clear"),
        Client(ctrl) as holder,
        Client(ctrl) as waiting,
    ):
        assert holder.ask(GET_CAPABILITY, 8) == CAPABILITIES
        socket.send_fds(waiting.socket, [SET_DATAFD], [theirs.fileno()])
        theirs.close()
        done, said = holder.upgrade()
        assert done, said
        holder.socket.close()
        assert waiting.receive(4) == bytes(4)
        for _ in range(2):
            ours.settimeout(PATIENCE)
            ours.sendall(c.GET_RANDOM)
            assert c.code(ours.recv(4096)) == c.SUCCESS
            done, said = waiting.upgrade()
            assert done, said


@pytest.mark.slow
def test_a_command_that_computes_is_waited_for(tmp_path: Path) -> None:
    rsa = bytes.fromhex("0001000b00030472000000060080004300100c000000000000 00".replace(" ", ""))
    with (
        serving(tmp_path, "--ephemeral", *sockets(tmp_path)),
        Client(tmp_path / "data") as data,
        Client(tmp_path / "ctrl") as ctrl,
    ):
        data.socket.sendall(c.create_primary(rsa))
        done, said = ctrl.upgrade()
        assert done, said
        assert int.from_bytes(data.response()[6:10], "big") == c.SUCCESS


@pytest.mark.slow
def test_a_new_program_that_cannot_go_on_changes_nothing(tmp_path: Path) -> None:
    """A package that fails in its trial is put before the running one; the old one goes on, and says why."""
    shadow = tmp_path / "shadow"
    script = installed_copy(shadow)
    with serving_script(script, tmp_path) as process:
        with Client(tmp_path / "data") as data, Client(tmp_path / "ctrl") as ctrl:
            data.run(c.pcr_extend(16, b"\x16" * 32))
            before = data.run(c.pcr_read(16))
            frozen = shadow / "crbd" / "service" / "frozen.py"
            whole = frozen.read_text()
            frozen.write_text(whole + "\nraise SystemExit('no, not like this')\n")
            done, said = ctrl.upgrade()
            assert not done
            assert "no, not like this" in said
            assert data.run(c.pcr_read(16)) == before
            frozen.write_text(whole)
            done, said = ctrl.upgrade()
            assert done, said
            script.rename(tmp_path / "gone")
            done, said = ctrl.upgrade()
            assert not done
            assert "No such file" in said
            assert data.run(c.pcr_read(16)) == before
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
        assert end(process)[0] == 0


@pytest.mark.slow
def test_a_program_that_is_gone_between_trial_and_exec(tmp_path: Path) -> None:
    """The script removes itself in the trial: the exec fails, and the frozen clients are served on by the old one."""
    script = installed_copy(tmp_path / "shadow")
    with serving_script(script, tmp_path) as process:
        with Client(tmp_path / "data") as data, Client(tmp_path / "ctrl") as ctrl, Client(tmp_path / "data") as waiting:
            before = data.run(c.pcr_read(16))
            text = script.read_text()
            away = f"import os, sys\nos.rename(sys.argv[0], {str(script.with_name('away'))!r})\n"
            script.write_text(text.replace("import sys\n", away))
            waiting.socket.sendall(c.pcr_read(16))
            done, said = ctrl.upgrade()
            assert not done
            assert "No such file" in said
            assert data.run(c.pcr_read(16)) == before
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
            data.socket.close()
            assert waiting.response() == before
        assert end(process)[0] == 0


WAITING = """import os, sys, time
if os.environ.get("CRBD_HANDOVER", "trial").partition(":")[0] != "trial":
    open({started!r}, "w").close()
    while not os.path.exists({go!r}):
        time.sleep(0.01)
"""


def slow_to_start(script: Path, place: Path) -> tuple[Path, Path]:
    """Let the program begin its start as a successor with `started`, and go on only when there is a file `go`."""
    started, go = place / "started", place / "go"
    waiting = WAITING.format(started=str(started), go=str(go))
    script.write_text(script.read_text().replace("import sys\n", waiting))
    return started, go


@pytest.mark.slow
def test_commands_are_run_while_the_new_program_starts(tmp_path: Path) -> None:
    """However long that takes: the copy that was left behind runs them, and what it did is there afterwards."""
    script = installed_copy(tmp_path / "shadow")
    state = ["--state", str(tmp_path / "state"), "--create"]
    with (
        serving_script(script, tmp_path, state) as process,
        Client(tmp_path / "data") as data,
        Client(tmp_path / "ctrl") as ctrl,
    ):
        started, go = slow_to_start(script, tmp_path)
        ctrl.socket.sendall(UPGRADE)
        wait_until(started.exists, "the start of the new program")
        for number in range(5):
            assert c.code(data.run(c.pcr_extend(16, number.to_bytes(32, "big")))) == c.SUCCESS
        assert c.code(data.run(c.nv_define(8))) == c.SUCCESS
        assert c.code(data.run(c.nv_write(b"12345678"))) == c.SUCCESS
        data.socket.sendall(c.pcr_read(16)[:9])
        go.touch()
        head = ctrl.receive(12)
        assert head[7] == 1
        ctrl.receive(int.from_bytes(head[8:12], "big"))
        data.socket.sendall(c.pcr_read(16)[9:])
        assert c.pcr_value(data.response()) == chain(5)
        assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
        assert children_of(process.pid) == [], "the copy is gone"
        assert end(process)[0] == 0


@pytest.mark.slow
def test_a_new_program_that_dies_while_it_starts(tmp_path: Path) -> None:
    """The copy does not live on: the lock is free, and all that was answered is there for the next start."""
    script = installed_copy(tmp_path / "shadow")
    state = ["--state", str(tmp_path / "state"), "--create"]
    with serving_script(script, tmp_path, state) as process, Client(tmp_path / "data") as data:
        started, _ = slow_to_start(script, tmp_path)
        with Client(tmp_path / "ctrl") as ctrl:
            ctrl.socket.sendall(UPGRADE)
            wait_until(started.exists, "the start of the new program")
            assert c.code(data.run(c.nv_define(8))) == c.SUCCESS
            assert c.code(data.run(c.nv_write(b"12345678"))) == c.SUCCESS
            (copy,) = children_of(process.pid)
            process.kill()
            process.wait()
            wait_until(lambda: not Path(f"/proc/{copy}/task").exists() or ends(copy), "the end of the copy")
    for name in ("pid", "ctrl", "data"):
        (tmp_path / name).unlink()
    with serving(tmp_path, "--state", tmp_path / "state", *sockets(tmp_path)), Client(tmp_path / "data") as data:
        assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"


@pytest.mark.slow
def test_a_data_client_that_goes_while_the_new_program_starts(tmp_path: Path) -> None:
    script = installed_copy(tmp_path / "shadow")
    with serving_script(script, tmp_path) as process, Client(tmp_path / "ctrl") as ctrl:
        with Client(tmp_path / "data") as data:
            started, go = slow_to_start(script, tmp_path)
            ctrl.socket.sendall(UPGRADE)
            wait_until(started.exists, "the start of the new program")
            data.run(c.pcr_extend(16, bytes(32)))
        go.touch()
        head = ctrl.receive(12)
        assert head[7] == 1
        ctrl.receive(int.from_bytes(head[8:12], "big"))
        with Client(tmp_path / "data") as other:
            assert c.pcr_value(other.run(c.pcr_read(16))) == chain(1)
        assert end(process)[0] == 0


def children_of(pid: int) -> list[int]:
    """Processes that it started and that still run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if not ends(int(child))]


def ends(pid: int) -> bool:
    """Whether it is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def installed_copy(place: Path) -> Path:
    """The package and a script for it, as an installation has them."""
    package = Path(__file__).parents[2] / "crbd"
    place.mkdir()
    subprocess.run(["cp", "-r", str(package), str(place / "crbd")], check=True)
    script = place / "crbd-script"
    script.write_text(
        f"#!{sys.executable} -B\nimport sys\nsys.path.insert(0, {str(place)!r})\n"
        "from crbd.cli.main import main\nsys.exit(main())\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@contextmanager
def serving_script(
    script: Path, place: Path, state: Sequence[str] = ("--ephemeral",)
) -> Iterator[subprocess.Popen[str]]:
    """`crbd serve` by a script of its own, which may do things in its trial that Landlock would not let it."""
    options = ["--landlock", "off", "--pid", str(place / "pid"), *map(str, sockets(place))]
    command = [str(script), "serve", *state, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until((place / "pid").exists, "the pid file")
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_commands_all_the_while(tmp_path: Path) -> None:
    """A client that never stops, through ten upgrades: each command is answered once, and the PCR is their chain."""
    with serving(tmp_path, "--ephemeral", *sockets(tmp_path)):
        answered: list[int] = []
        stop = threading.Event()

        def work() -> None:
            with Client(tmp_path / "data") as data:
                while not stop.is_set():
                    code = c.code(data.run(c.pcr_extend(16, len(answered).to_bytes(32, "big"))))
                    answered.append(code)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            with Client(tmp_path / "ctrl") as ctrl:
                for _ in range(10):
                    done, said = ctrl.upgrade()
                    assert done, said
        finally:
            stop.set()
            worker.join()
        assert set(answered) == {c.SUCCESS}
        with Client(tmp_path / "data") as data:
            assert c.pcr_value(data.run(c.pcr_read(16))) == chain(len(answered))


def chain(count: int) -> bytes:
    value = bytes(32)
    for number in range(count):
        value = hashlib.sha256(value + number.to_bytes(32, "big")).digest()
    return value
