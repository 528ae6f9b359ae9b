"""`swtpm_ioctl` against a running `crbd serve`. Against Debian's swtpm: tests/differential."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.compat.ioctl import main
from crbd.compat.ioctl_commands import HELP, VERSION
from crbd.control import messages as m
from crbd.control.spec import MAX_STATE_BLOB
from tests.cli.process import PATIENCE, serving


class Tpm:
    """A running daemon and swtpm_ioctl on its control socket."""

    def __init__(self, place: Path, process: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.place = place
        self.process = process
        self._capsys = capsys

    def ioctl(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of one run."""
        status = main(["--unix", str(self.place / "ctrl"), *arguments])
        out, errors = self._capsys.readouterr()
        return status, out, errors


@pytest.fixture
def tpm(capsys: pytest.CaptureFixture[str]) -> Iterator[Tpm]:
    with tempfile.TemporaryDirectory(prefix="crbd-") as directory:
        place = Path(directory)
        options = ("--ephemeral", "--ctrl", f"unix:{place / 'ctrl'}", "--flags", "startup-clear")
        with serving(place, *options) as process:
            yield Tpm(place, process, capsys)


def test_one_life(tpm: Tpm) -> None:
    """Every command, on a TPM that is on, off, on again and ended."""
    assert tpm.ioctl("-c") == (0, "ptm capability is 0x1ffff\n", "")
    assert tpm.ioctl("-e") == (0, "tpmEstablished is 0\n", "")
    assert tpm.ioctl("-l", "4") == (0, "", "")
    assert tpm.ioctl("-h", "x" * 5000) == (0, "", "")
    assert tpm.ioctl("-e") == (0, "tpmEstablished is 1\n", "")
    assert tpm.ioctl("-r", "2")[:2] == (1, "")
    assert tpm.ioctl("-r", "4") == (0, "", "")
    assert tpm.ioctl("-e") == (0, "tpmEstablished is 0\n", "")
    assert tpm.ioctl("-g") == (0, "ptm configuration flags: 0x0\n", "")
    sizes = "TPM buffersize: 4096\nminimum size  : 2808\nmaximum size  : 4096\n"
    assert tpm.ioctl("-b", "0") == (0, sizes, "")
    assert tpm.ioctl("-b", "3000") == (1, "", "TPM result from PTM_SET_BUFFERSIZE: 0xa\n")
    for command in (("-C",), ("-v",), ("-i",), ("--lock-storage", "3")):
        assert tpm.ioctl(*command) == (0, "", "")
    status, text, errors = tpm.ioctl("--info", "0x7")
    assert (status, errors) == (0, "")
    assert {"TPMSpecification", "TPMAttributes"} <= json.loads(text).keys()
    assert tpm.ioctl("--stop") == (0, "", "")
    assert tpm.ioctl("-e") == (1, "", "TPM result from PTM_GET_TPMESTABLISHED: 0xa\n")
    assert tpm.ioctl("-h", "x") == (1, "", "TPM result from PTM_HASH_START: 0xa\n")
    assert tpm.ioctl("-i") == (0, "", "")
    assert tpm.ioctl("-s") == (0, "", "")
    assert tpm.process.wait(PATIENCE) == 0
    assert tpm.ioctl("-c") == (1, "", "Connect failed: No such file or directory\n")


def test_a_state_blob_goes_out_and_back(tpm: Tpm) -> None:
    path = tpm.place / "blob"
    path.write_bytes(b"x" * 10_000)
    path.chmod(0o640)
    assert tpm.ioctl("--save", "permanent", str(path)) == (0, "", "")
    blob = path.read_bytes()
    assert 1000 < len(blob) < 10_000
    assert path.stat().st_mode & 0o777 == 0o640
    assert tpm.ioctl("--load", "permanent", str(path)) == (1, "", "TPM result from PTM_SET_STATEBLOB: 0xa\n")
    assert tpm.ioctl("--stop")[0] == 0
    assert tpm.ioctl("--load", "permanent", str(path)) == (0, "", "")
    assert tpm.ioctl("-i")[0] == 0
    new = tpm.place / "new"
    assert tpm.ioctl("--save", "permanent", str(new)) == (0, "", "")
    assert new.read_bytes() == blob
    assert new.stat().st_mode & 0o777 == 0o600
    assert tpm.ioctl("--save", "savestate", str(new)) == (0, "", "")
    assert new.read_bytes() == b""


def test_a_refused_save_leaves_the_file_as_it_was(tpm: Tpm) -> None:
    path = tpm.place / "blob"
    path.write_bytes(b"precious")
    tpm.ioctl("--stop")
    assert tpm.ioctl("--save", "permanent", str(path)) == (1, "", "TPM result from PTM_GET_STATEBLOB: 0xa\n")
    assert path.read_bytes() == b"precious"


def test_a_blob_that_is_too_long_is_not_sent(tpm: Tpm) -> None:
    path = tpm.place / "blob"
    path.write_bytes(bytes(MAX_STATE_BLOB + 1))
    status, _, errors = tpm.ioctl("--load", "permanent", str(path))
    assert (status, errors) == (1, f"File '{path}' is longer than a state blob may be (524288 bytes).\n")


REFUSED = [
    ((), "No valid command."),
    (("-c", "-i"), "Only one command may be given."),
    (("-c", "-c"), "Only one command may be given."),
    (("-l", "5"), "Locality outside valid range of [0..4]."),
    (("-r", "x"), "Could not get locality number from x."),
    (("-l=1",), "Could not get locality number from -l=1."),
    (("-b", "x"), "Could not get buffersize from x."),
    (("--info", "08"), "Cannot parse info flags."),
    (("--info", "0x"), "Cannot parse info flags."),
    (("--info", "18446744073709551616"), "Cannot parse info flags."),
    (("--lock-storage", "x"), "Could not parse lock retries from x."),
    (("--save", "permanent"), "Missing filename argument for --save option"),
    (("--load", "permanent", "-c"), "Missing filename argument for --load option"),
    (("-c",), "Error: Missing device name."),
    (("-c", "/nosuch"), "Unable to open device '/nosuch'."),
    (("-c", "/dev/null"), "Could not execute PTM_GET_CAPABILITY: Inappropriate ioctl for device"),
    (("-h", "x", "/dev/null"), "Could not execute ioctl PTM_HASH_START: Inappropriate ioctl for device"),
    (("-c", "--tcp", ":x"), "Invalid port 'x'"),
    (("-c", "--unix", "x" * 108), "Socket path is too long."),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: " ".join(value)[:40] or "nothing")
def test_refused_command_lines(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr() == ("", f"{message}\n")


def test_a_device_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file named by mistake: swtpm's tool writes its request into it."""
    path = tmp_path / "file"
    path.write_text("mine")
    assert main(["-s", str(path)]) == 1
    assert path.read_text() == "mine"
    assert "Inappropriate ioctl" in capsys.readouterr().err


def test_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (VERSION, "")
    assert main(["--foo", "--help"]) == 0
    assert capsys.readouterr() == (HELP, "swtpm_ioctl: unrecognized option '--foo'\n")


def answering(place: Path, *answers: bytes) -> threading.Thread:
    """A daemon that answers each connection with fixed bytes, whatever it is asked, and closes it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "ctrl"))
    listener.listen()

    def serve() -> None:
        with listener:
            for answer in answers:
                client, _ = listener.accept()
                with client:
                    client.recv(1 << 16)
                    client.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("command", "answer", "errors"),
    [
        (("-c",), b"", "Could not execute PTM_GET_CAPABILITY: Connection reset by peer"),
        (("-e",), b"\0\0", "Could not execute PTM_GET_ESTABLISHED: Connection reset by peer"),
        (("-h", "x"), b"", "Could not execute ioctl PTM_HASH_START: Connection reset by peer"),
        (("--save", "permanent", "PLACE/x"), bytes.fromhex("0000000a"), "TPM result from PTM_GET_STATEBLOB: 0xa"),
    ],
)
def test_answers_of_a_broken_daemon(
    command: tuple[str, ...], answer: bytes, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="crbd-") as place:
        thread = answering(Path(place), answer)
        status = main(["--unix", f"{place}/ctrl", *(word.replace("PLACE", place) for word in command)])
        thread.join(PATIENCE)
    assert (status, capsys.readouterr().err) == (1, f"{errors}\n")


def test_information_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    """GET_INFO hands out at most 3 KiB at once: the rest is asked for on the same connection."""
    text = b'{"x":"' + b"y" * 5000 + b'"}\0'

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            while request := client.recv(64):
                offset = int.from_bytes(request[12:16], "big")
                client.sendall(m.encode_reply(m.Info(len(text), text[offset : offset + 3072])))

    with tempfile.TemporaryDirectory(prefix="crbd-") as place, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{place}/ctrl")
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        assert main(["--unix", f"{place}/ctrl", "--info", "1"]) == 0
        thread.join(PATIENCE)
    assert capsys.readouterr().out == text[:-1].decode() + "\n"
