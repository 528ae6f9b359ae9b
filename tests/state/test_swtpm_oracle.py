"""Debian's swtpm reads what we wrote, and we read what it wrote: plain and with every form of key."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crbd.control import messages as m
from crbd.engine.libtpms import LibtpmsEngine
from crbd.state.kinds import StateKind
from crbd.state.swtpm import decode_file, decode_migration, encode_file, encode_migration
from crbd.state.swtpm_sealing import SwtpmKey
from tests.control.test_control_swtpm import PATIENCE, Oracle
from tests.e2e.daemon import dies_with_us, fresh_directory
from tests.engine import commands as c
from tests.engine.conftest import MemoryStatePort

pytestmark = pytest.mark.e2e

RAW = bytes(range(100, 132))
PHRASE = b"a passphrase with a line end\n"
FORMS: dict[str, tuple[bytes, str, SwtpmKey]] = {
    "hex": (RAW[:16].hex().encode(), "file={}", SwtpmKey(RAW[:16])),
    "hex 0x": (b"0x" + RAW[:16].hex().encode() + b"\n", "file={},mode=aes-cbc,format=hex", SwtpmKey(RAW[:16])),
    "hex 256": (RAW.hex().encode(), "file={},mode=aes-256-cbc", SwtpmKey(RAW)),
    "binary": (RAW[:16], "file={},format=binary", SwtpmKey(RAW[:16])),
    "binary 256": (RAW, "file={},format=binary,mode=aes-256-cbc", SwtpmKey(RAW)),
    "binary 128 in mode 256": (RAW[:16], "file={},format=binary,mode=aes-256-cbc", SwtpmKey(RAW[:16])),
    "pbkdf2": (PHRASE, "pwdfile={}", SwtpmKey.from_passphrase(PHRASE, 16)),
    "pbkdf2 256": (PHRASE, "pwdfile={},mode=aes-256-cbc,kdf=pbkdf2", SwtpmKey.from_passphrase(PHRASE, 32)),
    "sha512": (PHRASE, "pwdfile={},kdf=sha512", SwtpmKey.from_passphrase(PHRASE, 16, "sha512")),
    "sha512 256": (PHRASE, "pwdfile={},mode=aes-256-cbc,kdf=sha512", SwtpmKey.from_passphrase(PHRASE, 32, "sha512")),
}
THEIRS, OURS = b"written by swtpm", b"written by crbd."
DECRYPTED, ENCRYPTED = m.StateFlag.DECRYPTED, m.StateFlag.ENCRYPTED


class Swtpm:
    """A running swtpm and its data channel."""

    def __init__(self, oracle: Oracle, data: socket.socket) -> None:
        self.oracle = oracle
        self._data = data

    def execute(self, command: bytes) -> bytes:
        self._data.sendall(command)
        answer = b""
        while len(answer) < 10 or len(answer) < int.from_bytes(answer[2:6], "big"):
            received = self._data.recv(4096)
            assert received, "swtpm closed the data channel"
            answer += received
        return answer

    def power_on(self) -> None:
        assert self.oracle.ask(m.Init(m.InitFlag(0))) == m.Done()
        assert c.code(self.execute(c.STARTUP_CLEAR)) == c.SUCCESS

    def off(self) -> None:
        assert self.oracle.ask(m.Shutdown()) == m.Done()
        assert self.oracle.process.wait(PATIENCE) == 0

    def blob(self, flags: m.StateFlag) -> m.StateBlob:
        blob = self.oracle.ask(m.GetStateBlob(flags, StateKind.PERMANENT, 0))
        assert isinstance(blob, m.StateBlob)
        assert blob.result == 0
        return blob


@contextmanager
def swtpm(directory: Path, *options: str) -> Iterator[Swtpm]:
    program = shutil.which("swtpm")
    assert program, "swtpm is not installed"
    control = directory / "control"
    command = [program, "socket", "--tpm2", "--tpmstate", f"dir={directory}", "--ctrl", f"type=unixio,path={control}"]
    with subprocess.Popen(dies_with_us([*command, *options])) as process:
        ours, theirs = socket.socketpair()
        try:
            ours.settimeout(PATIENCE)
            oracle = Oracle(process, control)
            with oracle.socket:
                assert oracle.ask(m.SetDataFd(theirs.fileno())) == m.Done()
                yield Swtpm(oracle, ours)
        finally:
            ours.close()
            theirs.close()
            process.terminate()


@pytest.fixture
def directory() -> Iterator[Path]:
    with fresh_directory() as path:
        yield path


def option(directory: Path, name: str, form: str | None) -> tuple[str, ...]:
    """swtpm's option for a key of this form, its file written."""
    if form is None:
        return ()
    content, template, _ = FORMS[form]
    path = directory / f"file-of{name}"
    path.write_bytes(content)
    return name, template.format(path)


def key_of(form: str | None) -> SwtpmKey | None:
    return None if form is None else FORMS[form][2]


def mark(execute: Swtpm | LibtpmsEngine, value: bytes, *, define: bool) -> None:
    if define:
        assert c.code(execute.execute(c.nv_define(len(value)))) == c.SUCCESS
    assert c.code(execute.execute(c.nv_write(value))) == c.SUCCESS


def rewritten(state: bytes) -> bytes:
    """Run our engine on swtpm's state: see its mark, leave ours."""
    port = MemoryStatePort()
    port.states[StateKind.PERMANENT] = state
    engine = LibtpmsEngine(port)
    try:
        engine.start()
        assert not engine.was_manufactured
        assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
        assert c.nv_value(engine.execute(c.nv_read(len(THEIRS)))) == THEIRS
        mark(engine, OURS, define=False)
        engine.execute(c.SHUTDOWN_CLEAR)
    finally:
        engine.close()
    return port.states[StateKind.PERMANENT]


@pytest.mark.parametrize("form", [None, *FORMS])
def test_files(directory: Path, form: str | None) -> None:
    """swtpm makes a TPM and marks it; we read it, mark it ourselves, write it; swtpm finds our mark."""
    options = option(directory, "--key", form)
    with swtpm(directory, *options) as process:
        process.power_on()
        mark(process, THEIRS, define=True)
        process.off()
    path = directory / "tpm2-00.permall"
    state = decode_file(path.read_bytes(), str(path), key_of(form))
    path.write_bytes(encode_file(rewritten(state), key_of(form)))
    with swtpm(directory, *options) as process:
        process.power_on()
        assert c.nv_value(process.execute(c.nv_read(len(OURS)))) == OURS
        process.off()


# swtpm 0.7 cannot encrypt with keys of two lengths in one process: its IV buffer keeps the longer one's length.
SHORT, LONG = (None, "hex", "pbkdf2"), (None, "hex 256", "sha512 256")
PAIRS = list(dict.fromkeys([*itertools.product(SHORT, SHORT), *itertools.product(LONG, LONG)]))
PAIRS += [(form, None) for form in FORMS if (form, None) not in PAIRS]


@pytest.mark.parametrize(("migration", "file"), PAIRS)
def test_migration_blobs(directory: Path, migration: str | None, file: str | None) -> None:
    """GET_STATEBLOB, decrypted and not, is read by us; SET_STATEBLOB of what we wrote, in both forms, by swtpm."""
    options = option(directory, "--migration-key", migration) + option(directory, "--key", file)
    key, file_key = key_of(migration), key_of(file)
    with swtpm(directory, *options) as process:
        process.power_on()
        mark(process, THEIRS, define=True)
        asked = process.blob(DECRYPTED)
        unasked = process.blob(m.StateFlag(0))
        assert bool(unasked.flags & ENCRYPTED) == (file is not None)
        state = decode_migration(asked.data, "blob", key)
        again = decode_migration(unasked.data, "blob", key, file_key, encrypted=bool(unasked.flags & ENCRYPTED))
        assert again == state
        ours = rewritten(state)
        for inner in {None, file_key}:
            blob = encode_migration(ours, key, inner)
            flags = ENCRYPTED if inner is not None else m.StateFlag(0)
            assert process.oracle.ask(m.Stop()) == m.Done()
            assert process.oracle.ask(m.SetStateBlob(flags, StateKind.PERMANENT, blob)) == m.Done()
            process.power_on()
            assert c.nv_value(process.execute(c.nv_read(len(OURS)))) == OURS
            mark(process, THEIRS, define=False)
        process.off()


def test_version_1_blobs_are_read_by_swtpm_as_we_write_them(directory: Path) -> None:
    """The old form, which nothing writes any more: swtpm is the witness that ours is the one it meant."""
    options = option(directory, "--key", "hex")
    with swtpm(directory, *options) as process:
        process.power_on()
        mark(process, THEIRS, define=True)
        process.off()
    path = directory / "tpm2-00.permall"
    key = FORMS["hex"][2]
    body = key.encrypt_version_1(rewritten(decode_file(path.read_bytes(), str(path), key)))
    old = bytes.fromhex("01 01 000a 0001") + (10 + len(body)).to_bytes(4, "big") + body
    path.write_bytes(old)
    assert decode_file(old, str(path), key)
    with swtpm(directory, *options) as process:
        process.power_on()
        assert c.nv_value(process.execute(c.nv_read(len(OURS)))) == OURS
        process.off()
