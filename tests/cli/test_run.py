"""`crbd run` as a process: the command has its TPM, its status comes back, signals reach it, and nothing stays."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine import commands as c

from .process import CRBD, PATIENCE, ask, wait_until

pytestmark = pytest.mark.slow

ASK = """
import os, socket
tpm = socket.socket(socket.AF_UNIX)
tpm.connect(os.environ["CRBD_DATA"])
for _ in range(2):
    tpm.sendall(bytes.fromhex("80010000000c0000017b0008"))
    print(tpm.recv(4096)[6:10].hex())
"""
"""Prints the response codes of two TPM2_GetRandom."""
COUNT = """
import os, signal, socket
os.setpgid(0, 0)
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(0))
def end(*_):
    tpm = socket.socket(socket.AF_UNIX)
    tpm.connect(os.environ["CRBD_DATA"])
    tpm.sendall(bytes.fromhex("80010000000c0000017b0008"))
    print(len(tpm.recv(4096)), "bytes,", len(caught), "times")
    raise SystemExit
signal.signal(signal.SIGUSR1, end)
print("ready", flush=True)
while True:
    signal.pause()
"""
"""Says at SIGUSR1 how many bytes the TPM gives and how many SIGINT came. Not in the terminal's foreground: of what is
typed there it gets only what another process passes on."""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TMPDIR, which is empty afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [*CRBD, "run", *arguments]
    return subprocess.run(command, check=False, input=text, capture_output=True, text=True, timeout=PATIENCE)


def shell(script: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return run("--", "sh", "-c", script, text=text)


@contextmanager
def running(script: str) -> Iterator[subprocess.Popen[str]]:
    """A shell under `crbd run`, from the moment that it has said `ready`."""
    command = [*CRBD, "run", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_the_command_has_a_tpm_and_the_terminal(places: Path) -> None:
    done = run("--", sys.executable, "-c", ASK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "00000000\n" * 2, "")
    done = shell('cat; echo "$TPM2TOOLS_TCTI" >&2; test -S "$CRBD_DATA"; exit 7', "through\n")
    assert (done.returncode, done.stdout) == (7, "through\n")
    assert done.stderr.startswith(f"swtpm:path={places}/crbd-")


def test_its_arguments_are_its_own(places: Path) -> None:
    done = run("--", "printf", "%s|", "--", "--faults", "-x", "a b")
    assert done.stdout == "--|--faults|-x|a b|"
    assert run("printf", "%s|", "--libtpms", "--").stdout == "--libtpms|--|"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--", "/nonexistent/command"], 127, "crbd: /nonexistent/command: there is no such command"),
        (["--", "/etc/passwd"], 126, "crbd: /etc/passwd cannot be run: Permission denied"),
        ([], 2, "crbd: there is no command to run"),
        (["--"], 2, "crbd: there is no command to run"),
        (["--libtpms", "/nonexistent", "--", "echo"], 20, "crbd: libtpms cannot be loaded"),
        (["--faults", "GetRandon=retry", "--", "echo"], 2, "crbd: --faults: there is no TPM command 'GetRandon'"),
        (["--faults", "/nonexistent", "--", "echo"], 2, "crbd: --faults /nonexistent: No such file or directory"),
    ],
)
def test_what_cannot_be_run(places: Path, arguments: list[str], status: int, said: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_the_status_of_a_signal(places: Path) -> None:
    assert shell("kill -KILL $$").returncode == 128 + signal.SIGKILL
    # Python ignores it; the command is not to.
    assert shell("kill -PIPE $$").returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command(places: Path, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 3' {number.name.removeprefix('SIG')}; echo ready; while :; do sleep 0.01; done"
    with running(script) as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (3, "caught\n")


def test_the_command_may_ignore_one_and_still_has_its_tpm(places: Path) -> None:
    with running("trap '' TERM; echo ready; read line; test -S $CRBD_DATA && echo here") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate("on\n", timeout=PATIENCE)
        assert (process.returncode, out) == (0, "here\n")


def test_what_the_keyboard_sends_is_not_passed_on(places: Path) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.execv(CRBD[0], [*CRBD, "run", "--", sys.executable, "-c", COUNT])
    with open(terminal, "r+b", buffering=0) as keyboard:
        said = b""

        def says(what: bytes) -> bool:
            nonlocal said
            said += os.read(terminal, 4096)
            return what in said

        wait_until(lambda: says(b"ready"), "the start")
        keyboard.write(b"\x03")
        wait_until(lambda: says(b"^C"), "the interrupt")
        os.kill(process, signal.SIGUSR1)
        wait_until(lambda: says(b"times"), "the end")
        assert b"20 bytes, 0 times" in said
    assert os.waitpid(process, 0)[1] == 0


def test_a_tpm_that_fails_on_purpose(places: Path) -> None:
    done = run("--faults", "GetRandom:2=lockout", "--", sys.executable, "-c", ASK)
    assert done.stdout == "00000000\n00000921\n"
    assert "injected fault: GetRandom:2=lockout" in done.stderr


def test_faults_from_a_file(places: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("faults") / "faults"
    file.write_text("# the first one\n*:1=retry\n")
    assert run("--faults", str(file), "--", sys.executable, "-c", ASK).stdout == "00000922\n00000000\n"
    file.write_bytes(b"\xff\xfe")
    done = run("--faults", str(file), "--", "echo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no text" in done.stderr


def test_the_tpm_does_not_outlive_a_killed_crbd(places: Path) -> None:
    with running("echo ready; echo $CRBD_DATA; read line") as process:
        assert process.stdout is not None
        socket = Path(process.stdout.readline().strip())
        assert len(ask(socket, c.GET_RANDOM, 28)) == 28
        process.kill()
        wait_until(lambda: not socket.parent.exists(), "the TPM's end")
