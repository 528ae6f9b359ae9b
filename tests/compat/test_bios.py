"""`swtpm_bios`: the bytes it sends, what it makes of the answers, and a whole start of a `crbd serve`."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.compat.bios import HELP, VERSION, main
from crbd.compat.bios_connection import Device, Tcp, target_of
from crbd.compat.bios_sequence import Startup, Wanted, is_deactivated, tpm2_steps, tpm12_steps
from tests.cli.process import PATIENCE, serving

SUCCESS = bytes.fromhex("80010000000a00000000")
REFUSAL = bytes.fromhex("80010000000a00000101")
PASSWORD = bytes(range(20))


class FakeTpm:
    """A data socket that answers each connection's command with the next of its answers, or closes it."""

    def __init__(self, place: str, answers: list[bytes]) -> None:
        self.path = f"{place}/data"
        self.commands: list[str] = []
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            client, _ = self._listener.accept()
            with client:
                command = client.recv(1 << 12)
                if not command:
                    return
                self.commands.append(command.hex())
                # In two pieces: a stream keeps no borders.
                client.sendall(answer[:4])
                client.sendall(answer[4:])

    def close(self) -> None:
        """End the thread, whether all answers were wanted or not."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:
            last.connect(self.path)
        self._thread.join(PATIENCE)
        self._listener.close()


@contextlib.contextmanager
def fake_tpm(*answers: bytes) -> Iterator[FakeTpm]:
    with tempfile.TemporaryDirectory(prefix="crbd-") as place:
        tpm = FakeTpm(place, list(answers))
        try:
            yield tpm
        finally:
            tpm.close()


# From TPM 2.0 Part 3: tag, size, code, parameters.
TPM2_SEQUENCES = [
    ([], ["80010000000c000001440000"]),
    (["-c"], ["80010000000c000001440000"]),
    (["-s"], ["80010000000c000001440001"]),
    (["-n"], []),
    (["-d"], []),
    (["-n", "-cs"], ["80010000001000000142" + "00000001000b"]),
]


@pytest.mark.parametrize(("options", "commands"), TPM2_SEQUENCES, ids=lambda value: " ".join(value) or "none")
def test_what_a_tpm2_is_sent(options: list[str], commands: list[str]) -> None:
    with fake_tpm(*[SUCCESS] * len(commands)) as tpm:
        assert main(["--tpm2", "--unix", tpm.path, *options]) == 0
        assert tpm.commands == commands


def test_the_platform_password_is_random() -> None:
    sent = []
    for _ in range(2):
        with fake_tpm(SUCCESS) as tpm:
            assert main(["--tpm2", "-n", "-u", "--unix", tpm.path]) == 0
            sent.append(tpm.commands[0])
    head = "80020000003100000129" + "4000000c" + "00000009" + "40000009" + "0000" + "01" + "0000" + "0014"
    assert [command[: len(head)] for command in sent] == [head, head]
    assert sent[0] != sent[1]
    assert len(bytes.fromhex(sent[0])) == 0x31


# From TPM Main Part 3: TPM_Startup 0x99, TSC_PhysicalPresence 0x4000000a, TPM_GetCapability 0x65, ...
STARTUP = "00c10000000c000000990001"
PRESENT = ["00c10000000c4000000a0020", "00c10000000c4000000a0008"]
FLAGS = "00c100000016000000650000000400000004" + "00000108"
ENABLE = "00c10000000a0000006f"
ACTIVATE = "00c10000000b0000007200"
SELF_TEST = "00c10000000a00000053"
GIVE_UP = ["00c10000000c4000000a0020", "00c10000000c4000000a0014"]

TPM12_SEQUENCES = [
    ([], [STARTUP, *PRESENT, ENABLE, ACTIVATE]),
    (["-o"], [STARTUP]),
    (["-o", "-c"], [STARTUP, *PRESENT, ENABLE, ACTIVATE]),
    (["-s", "-o"], ["00c10000000c000000990002"]),
    (["-d"], ["00c10000000c000000990003"]),
    (["-n"], [*PRESENT, ENABLE, ACTIVATE]),
    (["-n", "-o", "-cs"], [SELF_TEST]),
    (["-n", "-o", "-u"], GIVE_UP),
    (["-ea", "-u", "-cs"], [STARTUP, *PRESENT, FLAGS, ENABLE, ACTIVATE, SELF_TEST, *GIVE_UP]),
]


@pytest.mark.parametrize(("options", "commands"), TPM12_SEQUENCES, ids=lambda value: " ".join(value)[:30] or "none")
def test_what_a_tpm12_is_sent(options: list[str], commands: list[str]) -> None:
    with fake_tpm(*[SUCCESS] * len(commands)) as tpm:
        assert main(["--unix", tpm.path, *options]) == 0
        assert tpm.commands == commands


def flags(deactivated: int) -> bytes:
    """TPM_GetCapability's answer: head, size, tag, and the flags, of which the third is `deactivated`."""
    return bytes.fromhex("00c4000000240000000000000016001f") + bytes([0, 0, deactivated]) + bytes(17)


def test_a_deactivated_tpm_needs_a_reset(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_tpm(SUCCESS, SUCCESS, SUCCESS, flags(1), SUCCESS, SUCCESS) as tpm:
        assert main(["-ea", "-u", "--unix", tpm.path]) == 129
        assert tpm.commands[-1] == ACTIVATE
    assert capsys.readouterr() == ("TPM requires a reset\n", "")
    assert not is_deactivated(flags(0))
    assert not is_deactivated(REFUSAL)


def test_refusals_do_not_end_the_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_tpm(REFUSAL, SUCCESS, REFUSAL) as tpm:
        assert main(["--tpm2", "-cs", "-u", "--unix", tpm.path]) == 128
        assert len(tpm.commands) == 3
    refused = "{} returned error code 0x00000101\n"
    assert capsys.readouterr() == (refused.format("TPM2_Startup") + refused.format("TPM2_HierarchyChangeAuth"), "")
    with fake_tpm(REFUSAL) as tpm:
        assert main(["-o", "--unix", tpm.path]) == 128
    assert capsys.readouterr() == ("", refused.format("TPM_Startup(0x01)"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "Returned packet is too short."),
        (SUCCESS[:9], "Returned packet is too short."),
        (SUCCESS + b"\0", "Malformed response."),
        (bytes.fromhex("80010000000900000000"), "Malformed response."),
    ],
)
def test_answers_that_are_none(answer: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_tpm(answer) as tpm:
        assert main(["--tpm2", "--unix", tpm.path]) == 255
    assert capsys.readouterr() == ("", f"{message}\n")


NO_TPM = [
    (["--unix", "/nosuch/socket"], 255, "Could not connect using UnixIO socket."),
    (["--unix", "x" * 108], 255, "Socket path is too long."),
    (["--tpm-device", "/nosuch"], 255, "Unable to open device '/nosuch'."),
    (["--tpm-device", "/dev/null"], 255, "Returned packet is too short."),
    (["--tpm-device", "/dev/null", "--unix", "/nosuch"], 255, "Returned packet is too short."),
    (["--tcp", ":x"], 1, "Invalid port 'x'"),
]


@pytest.mark.parametrize(("options", "status", "message"), NO_TPM, ids=lambda value: str(value)[:40])
def test_no_tpm(options: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tpm2", *options]) == status
    assert capsys.readouterr() == ("", f"{message}\n")


@pytest.mark.parametrize(
    ("environment", "target"),
    [
        ({}, Device("/dev/tpm0")),
        ({"TPM_DEVICE": "/dev/tpm9"}, Device("/dev/tpm9")),
        ({"TPM_DEVICE": "/dev/tpm9", "TCSD_USE_TCP_DEVICE": ""}, Tcp("localhost", 6545)),
        (
            {"TCSD_USE_TCP_DEVICE": "1", "TCSD_TCP_DEVICE_HOSTNAME": "h", "TCSD_TCP_DEVICE_PORT": "12"},
            Tcp("h", 12),
        ),
    ],
)
def test_the_environment_names_the_tpm(environment: dict[str, str], target: object) -> None:
    assert target_of(environment) == target


def test_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-v"]) == 0
    assert capsys.readouterr() == (VERSION, "")
    assert main(["-h"]) == 0
    assert capsys.readouterr() == (HELP, "")
    assert main(["--foo"]) == 1
    assert capsys.readouterr() == (HELP, "swtpm_bios: unrecognized option '--foo'\n")


def test_the_steps_by_themselves() -> None:
    assert [step.name for step in tpm2_steps(Wanted(Startup.STATE, self_test=True, give_up=True), PASSWORD)] == [
        "TPM2_Startup",
        "TPM2_IncrementalSelfTest",
        "TPM2_HierarchyChangeAuth",
    ]
    assert list(tpm12_steps(Wanted(Startup.NONE, more=False))) == []


def test_a_tpm_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="crbd-") as directory:
        place = Path(directory)
        options = ("--ephemeral", "--data", f"unix:{place / 'data'}", "--flags", "not-need-init")
        target = ["--tpm2", "--unix", str(place / "data")]
        with serving(place, *options):
            assert main(target) == 0
            assert main(target) == 128
            assert main([*target, "-n", "-cs", "-u"]) == 0
            assert main([*target, "-n", "-u"]) == 128  # the password is nobody's
            assert main(["--unix", str(place / "data"), "-o"]) == 128
    refusals = "TPM2_Startup returned error code 0x00000100\nTPM2_HierarchyChangeAuth returned error code 0x000009a2\n"
    assert capsys.readouterr() == (refusals, "TPM_Startup(0x01) returned error code 0x00000084\n")
