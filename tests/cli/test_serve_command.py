"""`crbd serve` as a process: how it starts, ends, and refuses to start."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from crbd.engine.declarations import load
from crbd.errors import EngineMissingError
from tests.engine import commands as c

from .process import PATIENCE, ask, crbd, end, serving, wait_until

pytestmark = pytest.mark.slow

SHUTDOWN = bytes.fromhex("00000003")
INIT = bytes.fromhex("0000000200000000")


def contents(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def options(place: Path) -> list[str]:
    return ["--state", f"{place}/state", "--ctrl", f"unix:{place}/ctrl", "--data", f"unix:{place}/data"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_leaves_only_the_state(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, *options(tmp_path), "--create", "--flags", "startup-clear") as process:
        assert (tmp_path / "pid").read_text() == str(process.pid)
        assert contents(tmp_path) == ["ctrl", "data", "pid", "state"]
        assert len(ask(tmp_path / "data", c.GET_RANDOM, 28)) == 28
        assert end(process, number) == (0, "")
    assert contents(tmp_path) == ["state"]
    assert contents(tmp_path / "state") == [".lock", "tpm.crbd"]


def test_shutdown_ends_it_with_0(tmp_path: Path) -> None:
    with serving(tmp_path, *options(tmp_path), "--create") as process:
        assert ask(tmp_path / "ctrl", INIT, 4) == bytes(4)
        assert ask(tmp_path / "ctrl", SHUTDOWN, 5) == bytes(4)
        assert process.wait(PATIENCE) == 0
    assert contents(tmp_path) == ["state"]


def test_the_state_outlives_the_process(tmp_path: Path) -> None:
    flags = ["--flags", "startup-clear"]
    with serving(tmp_path, *options(tmp_path), *flags, "--create") as process:
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 10 + 5 + 4)) == c.SUCCESS
        process.kill()
        process.wait(PATIENCE)
    (tmp_path / "pid").unlink()
    with serving(tmp_path, *options(tmp_path), *flags) as process:
        assert ask(tmp_path / "data", c.nv_define(8), 10)[6:] == bytes.fromhex("0000014c"), "TPM_RC_NV_DEFINED"
        status, said = end(process)
    assert status == 0
    assert "was not shut down" in said
    with serving(tmp_path, *options(tmp_path), *flags) as process:
        assert end(process) == (0, "")


def refuse(code: int, text: str, *arguments: str | Path) -> str:
    """The one line on stderr of a start that must fail with this code."""
    done = crbd("serve", *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("crbd: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_absent_state_is_not_made(tmp_path: Path) -> None:
    refuse(11, "--create", *options(tmp_path))
    assert contents(tmp_path) == []
    (tmp_path / "state").mkdir()
    refuse(11, "--create", *options(tmp_path))
    assert contents(tmp_path / "state") == []


def test_unreadable_state_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    permall = tmp_path / "state" / "tpm2-00.permall"
    for code, content in (
        (12, b""),
        (12, b"\x02\x01\x00\x0a\x00\x00\x00\x00\x00\x14\x00\x01\x00\x00\x00\x04nope"),
        (13, b"\x09\x09\x00\x0a\x00\x00\x00\x00\x00\x0a"),
        (14, b"\x02\x01\x00\x0a\x00\x01\x00\x00\x00\x0a"),
    ):
        permall.write_bytes(content)
        message = refuse(code, "state", *options(tmp_path), "--create", "--flags", "startup-clear")
        assert str(tmp_path / "state") in message
        assert permall.read_bytes() == content
        assert contents(tmp_path) == ["state"]


def test_damaged_state_of_our_own_changes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, *options(tmp_path), "--create", "--flags", "startup-clear") as process:
        assert end(process) == (0, "")
    file = tmp_path / "state" / "tpm.crbd"
    whole = file.read_bytes()
    for code, content in ((17, b""), (19, b"x" * len(whole)), (12, whole[:512] + bytes(len(whole) - 512))):
        file.write_bytes(content)
        message = refuse(code, str(file), *options(tmp_path), "--create", "--flags", "startup-clear")
        assert message.count(": ") >= 2, "a remedy"
        assert file.read_bytes() == content


def test_swtpms_layout_where_it_is_asked_for_or_found(tmp_path: Path) -> None:
    flags = ["--flags", "startup-clear"]
    with serving(tmp_path, *options(tmp_path), *flags, "--create", "--layout", "swtpm") as process:
        assert contents(tmp_path / "state") == [".lock", "tpm2-00.permall"]
        assert end(process) == (0, "")
    with serving(tmp_path, *options(tmp_path), *flags) as process:
        assert end(process) == (0, "")
    assert contents(tmp_path / "state") == [".lock", "tpm2-00.permall"]
    refuse(19, "swtpm layout", *options(tmp_path), "--layout", "crbd")
    (tmp_path / "state" / "tpm.crbd").write_bytes(b"")
    refuse(19, "of crbd (tpm.crbd) and of swtpm", *options(tmp_path))


def swtpm_key(place: Path, key: bytes, name: str) -> list[str]:
    """In swtpm's own spelling."""
    (place / name).write_text(key.hex())
    return ["--swtpm-key", f"file={place / name},mode=aes-256-cbc"]


@pytest.mark.parametrize("layout", ["swtpm", "linear"])
def test_swtpms_layouts_want_swtpms_key(tmp_path: Path, layout: str) -> None:
    flags = ["--flags", "startup-clear"]
    key, other = swtpm_key(tmp_path, bytes(range(32)), "key"), swtpm_key(tmp_path, bytes(32), "other")
    with serving(tmp_path, *options(tmp_path), *flags, *key, "--create", "--layout", layout) as process:
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 10 + 5 + 4)) == c.SUCCESS
        assert end(process) == (0, "")
    refuse(14, "encrypted with a state key", *options(tmp_path))
    refuse(40, "encrypted with another key", *options(tmp_path), *other)
    refuse(2, "use --swtpm-key", *options(tmp_path), "--key", f"file:{tmp_path / 'key'}")
    with serving(tmp_path, *options(tmp_path), *flags, *key, "--require-existing") as process:
        assert ask(tmp_path / "data", c.nv_define(8), 10)[6:] == bytes.fromhex("0000014c"), "TPM_RC_NV_DEFINED"
        assert end(process) == (0, "")
    done = crbd("check", tmp_path / "state", *key)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "in swtpm's layout" in done.stdout
    assert crbd("check", tmp_path / "state").returncode == 14


@pytest.mark.parametrize("layout", ["swtpm", "linear"])
def test_plain_state_is_not_opened_with_a_key(tmp_path: Path, layout: str) -> None:
    with serving(tmp_path, *options(tmp_path), "--flags", "startup-clear", "--create", "--layout", layout) as process:
        assert end(process) == (0, "")
    refuse(43, "is not encrypted", *options(tmp_path), *swtpm_key(tmp_path, bytes(32), "key"))


def test_the_instance_that_is_expected(tmp_path: Path) -> None:
    ours, other = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"
    flags = ["--flags", "startup-clear"]
    with serving(tmp_path, *options(tmp_path), *flags, "--create", "--uuid", ours) as process:
        assert end(process) == (0, "")
    refuse(41, f"belongs to instance {ours}", *options(tmp_path), "--uuid", other)
    refuse(41, f"belongs to instance {ours}", *options(tmp_path), "--create", "--uuid", other)
    with serving(tmp_path, *options(tmp_path), *flags, "--uuid", ours) as process:
        assert end(process) == (0, "")
    assert crbd("check", tmp_path / "state", "--uuid", ours).returncode == 0
    assert crbd("check", tmp_path / "state", "--uuid", other).returncode == 41


def test_existing_state_is_required(tmp_path: Path) -> None:
    refuse(11, "no TPM state", *options(tmp_path), "--require-existing")
    assert contents(tmp_path) == []


def test_sealed_state_wants_its_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "hex").write_text(bytes(range(32)).hex() + "\n")
    (tmp_path / "other").write_bytes(bytes(32))
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ncat {tmp_path}/key\n")
    hook.chmod(0o700)
    flags = ["--flags", "startup-clear"]
    key = ["--key", f"file:{tmp_path}/key"]
    with serving(tmp_path, *options(tmp_path), *flags, *key, "--create") as process:
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 10 + 5 + 4)) == c.SUCCESS
        assert end(process) == (0, "")
    before = (tmp_path / "state" / "tpm.crbd").read_bytes()
    refuse(14, "encrypted and no key", *options(tmp_path))
    refuse(40, "none of the given keys", *options(tmp_path), "--key", f"file:{tmp_path}/other")
    refuse(40, "none of the given keys", *options(tmp_path), "--passphrase", f"file:{tmp_path}/key")
    assert (tmp_path / "state" / "tpm.crbd").read_bytes() == before
    for source in (f"file:{tmp_path}/hex", f"exec:{hook}"):
        with serving(tmp_path, *options(tmp_path), *flags, "--key", source) as process:
            assert ask(tmp_path / "data", c.nv_define(8), 10)[6:] == bytes.fromhex("0000014c")
            assert end(process) == (0, "")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("says not where from", ["--key", "nonsense"]),
        ("says not where from", ["--passphrase", "pass:word"]),
        ("--key file:/no/such/key", ["--key", "file:/no/such/key"]),
        ("ended with status 1", ["--key", "exec:/bin/false"]),
        ("has 0 bytes", ["--key", "exec:/bin/true"]),
        ("no such credential", ["--key", "credential:tpm"]),
        ("Bad file descriptor", ["--key", "fd:999"]),
        ("hexadecimal", ["--key", "file:nonhex"]),
        ("more than 4096", ["--key", "file:/dev/zero"]),
        ("is empty", ["--passphrase", "file:/dev/null"]),
    ],
)
def test_keys_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, arguments: list[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nonhex").write_text("x" * 64)
    refuse(2, text, "--state", "state", "--create", "--ctrl", "unix:ctrl", *arguments)
    assert contents(tmp_path) == ["nonhex"]


def test_a_second_instance_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path, *options(tmp_path), "--create", "--flags", "startup-clear") as process:
        other = ["--state", str(tmp_path / "state"), "--ctrl", f"unix:{tmp_path}/other"]
        refuse(15, f"in use by process {process.pid}", *other)
        assert len(ask(tmp_path / "data", c.GET_RANDOM, 28)) == 28
        refuse(30, "in use by another process", "--ephemeral", "--ctrl", f"unix:{tmp_path}/ctrl")
        assert len(ask(tmp_path / "data", c.GET_RANDOM, 28)) == 28


@pytest.mark.parametrize(
    ("code", "text", "arguments"),
    [
        (2, "--help", ["--nonsense"]),
        (2, "--state DIR or --ephemeral", ["--ctrl", "unix:x"]),
        (2, "exclude each other", ["--state", "s", "--ephemeral", "--ctrl", "unix:x"]),
        (2, "--ctrl, --data or both", ["--ephemeral"]),
        (2, "is not an endpoint", ["--ephemeral", "--ctrl", "nonsense"]),
        (2, "there is no 'nonsense'", ["--ephemeral", "--ctrl", "unix:x", "--flags", "nonsense"]),
        (2, "exclude each other", ["--ephemeral", "--ctrl", "unix:x", "--flags", "startup-clear,startup-state"]),
        (2, "there is no 'nonsense'", ["--ephemeral", "--ctrl", "unix:x", "--locality", "nonsense"]),
        (2, "not allowed with", ["--state", "s", "--ctrl", "unix:x", "--create", "--require-existing"]),
        (2, "--ephemeral keeps none", ["--ephemeral", "--ctrl", "unix:x", "--require-existing"]),
        (2, "--uuid is for state", ["--ephemeral", "--ctrl", "unix:x", "--uuid", "{" + "0" * 32 + "}"]),
        (2, "invalid UUID value", ["--state", "s", "--ctrl", "unix:x", "--uuid", "nonsense"]),
        (2, "--swtpm-key names 0 sources", ["--state", "s", "--ctrl", "unix:x", "--swtpm-key", "mode=aes-cbc"]),
        (20, "apt-get install libtpms0", ["--ephemeral", "--ctrl", "unix:x", "--libtpms", "/no/such/libtpms.so"]),
        (21, "TPM2_Startup(STATE)", ["--ephemeral", "--ctrl", "unix:x", "--flags", "startup-state"]),
        (30, "unix:/no/such", ["--ephemeral", "--ctrl", "unix:/no/such/directory"]),
        (30, "fd:999", ["--ephemeral", "--data", "fd:999"]),
        (31, "--pid", ["--ephemeral", "--ctrl", "unix:x", "--pid", "/no/such/directory/pid"]),
    ],
)
def test_operator_mistakes_are_one_line_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str, arguments: list[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    refuse(code, text, *arguments)
    assert contents(tmp_path) == []


def test_a_library_that_is_no_libtpms() -> None:
    with pytest.raises(EngineMissingError, match="libtpms"):
        load("libc.so.6")


def test_help_and_version_exit_with_0() -> None:
    for arguments in (["--help"], ["--version"], ["serve", "--help"]):
        done = crbd(*arguments)
        assert done.returncode == 0
        assert done.stdout
        assert done.stderr == ""


def test_socket_modes(tmp_path: Path) -> None:
    arguments = ["--ephemeral", "--ctrl", f"unix:{tmp_path}/ctrl,mode=0660", "--data", f"unix:{tmp_path}/data"]
    with serving(tmp_path, *arguments):
        assert (tmp_path / "ctrl").stat().st_mode & 0o777 == 0o660
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o600


def test_ending_while_a_key_is_made_takes_less_than_a_second(tmp_path: Path) -> None:
    rsa_3072 = c.authorized(
        0x131,
        (c.OWNER,),
        c.sized(bytes(4))
        + c.sized(bytes.fromhex("0001000b 00030072 0000 0006 0080 0043 0010 0c00 00000000 0000"))
        + c.sized(b"")
        + bytes(4),
    )
    with serving(tmp_path, "--ephemeral", "--data", f"unix:{tmp_path}/data", "--flags", "startup-clear") as process:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "data"))
            client.sendall(rsa_3072)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: process.poll() is not None, "the end")
        assert process.returncode == 0
