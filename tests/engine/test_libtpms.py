"""What only the real engine has: real cryptography, real cancelling, and libtpms' own traps."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crbd.engine.declarations import DECLARATIONS, load
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import EngineError, EngineMissingError
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

from . import commands as c
from .conftest import MemoryStatePort

DIGEST = hashlib.sha256(b"measured").digest()


@pytest.fixture
def started(libtpms: LibtpmsEngine) -> LibtpmsEngine:
    """The engine on, TPM2_Startup done."""
    libtpms.start()
    assert c.code(libtpms.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    return libtpms


def test_real_keys_are_made(started: LibtpmsEngine) -> None:
    first = started.execute(c.create_primary(c.ECC_P256))
    second = started.execute(c.create_primary(c.ECC_P256))
    assert c.code(first) == c.SUCCESS
    assert first[10:14] == b"\x80\0\0\0"
    assert second[10:14] == b"\x80\0\0\1"
    assert first[14:300] == second[14:300]


def test_cancel_from_another_thread(started: LibtpmsEngine) -> None:
    """RSA-3072 takes 70 to 200 ms. One found before the cancel arrives does not count, hence the attempts."""
    deadline = time.monotonic() + 60
    for attempt in range(200):
        assert time.monotonic() < deadline
        answers: list[bytes] = []
        command = c.create_primary(c.rsa_3072(bytes([attempt])))
        worker = threading.Thread(target=lambda to=answers, what=command: to.append(started.execute(what)))
        worker.start()
        while worker.is_alive():
            started.cancel()
            worker.join(0.001)
        code = c.code(answers[0])
        if code == c.CANCELED:
            break
        assert code == c.SUCCESS
        assert c.code(started.execute(c.command(0x165, answers[0][10:14]))) == c.SUCCESS
    else:
        pytest.fail("no command was cancelled")
    assert c.code(started.execute(c.GET_RANDOM)) == c.SUCCESS


def test_the_process_runs_on_while_a_command_executes(started: LibtpmsEngine) -> None:
    """The call into libtpms holds no interpreter lock: otherwise this thread could not count meanwhile."""
    worker = threading.Thread(target=started.execute, args=(c.create_primary(c.rsa_3072(b"")),))
    worker.start()
    rounds = 0
    while worker.is_alive():
        worker.join(0.0005)
        rounds += 1
    assert rounds > 3


def test_a_command_decrypted_in_place_stays_as_it_is_for_the_caller(started: LibtpmsEngine) -> None:
    """TPM2_Hash with its first parameter encrypted by AES-128-CFB: libtpms decrypts it where it lies (Part 1, 21)."""
    nonce = b"\1" * 16
    session = started.execute(c.start_session(0, nonce, struct.pack(">HHH", 0x06, 128, 0x43)))
    assert c.code(session) == c.SUCCESS
    handle = session[10:14]
    parameters = c.sized(b"sixteen bytes ..") + struct.pack(">HI", c.SHA256, 0x40000007)
    attributes = 0x21
    cp_hash = hashlib.sha256(struct.pack(">I", 0x17D) + parameters).digest()
    tag = hmac.digest(b"", cp_hash + nonce + session[16:] + bytes([attributes]), "sha256")
    area = handle + c.sized(nonce) + bytes([attributes]) + c.sized(tag)
    command = bytearray(c.authorized(0x17D, (), parameters, area))
    before = bytes(command)
    answer = started.execute(command)
    assert c.code(answer) == c.SUCCESS
    assert answer[16:48] != hashlib.sha256(b"sixteen bytes ..").digest()
    assert bytes(command) == before


def test_sessions_survive_in_volatile_state(started: LibtpmsEngine, port: MemoryStatePort) -> None:
    session = started.execute(c.start_session(1))
    get_digest = c.command(0x189, session[10:14])
    assert c.code(started.execute(c.command(0x16B, session[10:14]))) == c.SUCCESS  # TPM2_PolicyAuthValue
    expected = started.execute(get_digest)
    assert c.code(expected) == c.SUCCESS
    permanent, volatile = started.get_state(StateKind.PERMANENT), started.get_state(StateKind.VOLATILE)
    started.stop()
    port.states.clear()
    started.set_state(StateKind.PERMANENT, permanent)
    started.set_state(StateKind.VOLATILE, volatile)
    started.start()
    assert started.execute(get_digest) == expected


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from crbd.engine.libtpms import LibtpmsEngine
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

class Nowhere:
    def load(self, kind): return None
    def store(self, kind, data): pass
    def delete(self, kind): pass

engine = LibtpmsEngine(Nowhere())
engine.set_state(StateKind.PERMANENT, Path(sys.argv[1]).read_bytes())
engine.set_state(StateKind.VOLATILE, Path(sys.argv[2]).read_bytes())
engine.start()
print(engine.execute(bytes.fromhex(sys.argv[3])).hex())
"""


def test_state_moves_to_another_process(started: LibtpmsEngine, tmp_path: Path) -> None:
    started.execute(c.pcr_extend(10, DIGEST))
    expected = c.pcr_value(started.execute(c.pcr_read(10)))
    files = []
    for kind in (StateKind.PERMANENT, StateKind.VOLATILE):
        blob = started.get_state(kind)
        assert blob is not None
        files.append(tmp_path / kind.name)
        files[-1].write_bytes(blob)
    answer = in_python(IN_ANOTHER_PROCESS, *map(str, files), c.pcr_read(10).hex())
    assert c.pcr_value(bytes.fromhex(answer)) == expected


def in_python(program: str, *arguments: str) -> str:
    """Run a program in a Python of its own; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        timeout=60,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


WITHOUT_WRITABLE_CODE = """
import ctypes, errno, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(print("unsupported"))
from crbd.engine.libtpms import LibtpmsEngine

class Nowhere:
    def load(self, kind): return None
    def store(self, kind, data): pass
    def delete(self, kind): pass

engine = LibtpmsEngine(Nowhere())
engine.start()
engine.locality = 3
print(engine.execute(bytes.fromhex("80010000000c000001440000")).hex())
"""


def test_it_runs_where_memory_is_never_writable_and_executable() -> None:
    """What systemd's MemoryDenyWriteExecute= asks for (prctl(2), PR_SET_MDWE, Linux 6.3)."""
    answer = in_python(WITHOUT_WRITABLE_CODE)
    if answer == "unsupported":
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert c.code(bytes.fromhex(answer)) == c.SUCCESS


def test_one_engine_per_process(libtpms: LibtpmsEngine, port: MemoryStatePort) -> None:
    with pytest.raises(RuntimeError):
        LibtpmsEngine(port)
    libtpms.close()
    libtpms.close()
    another = LibtpmsEngine(port)
    with pytest.raises(RuntimeError):
        libtpms.start()
    with pytest.raises(EngineError):
        libtpms.execute(c.GET_RANDOM)
    another.start()
    another.close()


def test_an_engine_that_failed_to_open_leaves_room(port: MemoryStatePort) -> None:
    with pytest.raises(EngineMissingError):
        LibtpmsEngine(port, "/nonexistent/libtpms.so.0")
    LibtpmsEngine(port).close()


def test_there_are_five_localities(libtpms: LibtpmsEngine) -> None:
    for wrong in (-1, 5, 256):
        with pytest.raises(ValueError, match="locality"):
            libtpms.locality = wrong
    assert libtpms.locality == 0


def test_large_state_is_handed_over(
    started: LibtpmsEngine, port: MemoryStatePort, capfd: pytest.CaptureFixture[str]
) -> None:
    """More than the 128 KiB that TPM_Malloc would give, as much as fits."""
    for index in range(0x01500000, 0x01500000 + 100):
        if c.code(started.execute(c.nv_define(2048, index))) != c.SUCCESS:
            break
        for offset in (0, 1024):
            body = c.sized(os.urandom(1024)) + struct.pack(">H", offset)
            assert c.code(started.execute(c.authorized(0x137, (c.OWNER, index), body))) == c.SUCCESS
    assert len(port.states[StateKind.PERMANENT]) > 128 * 1024
    before = port.states[StateKind.PERMANENT]
    started.start()
    assert not started.was_manufactured
    assert started.get_state(StateKind.PERMANENT) == before
    assert capfd.readouterr() == ("", "")


def test_a_failing_load_callback_never_makes_libtpms_manufacture(libtpms: LibtpmsEngine, port: MemoryStatePort) -> None:
    """The second line of defence: `start` never lets it come to this, for it loads by itself first."""
    libtpms._callbacks.offer({})
    assert libtpms._library["TPMLIB_MainInit"]() != c.SUCCESS
    libtpms._library["TPMLIB_Terminate"]()
    assert port.stores == []
    with pytest.raises(KeyError):
        libtpms._callbacks.reraise()


def test_after_a_failed_callback_the_port_is_left_alone(libtpms: LibtpmsEngine, port: MemoryStatePort) -> None:
    """A TPM that libtpms goes on building on state it did not get must not be stored."""
    callbacks = libtpms._callbacks
    port.store_error = OSError("no space")
    assert callbacks._on_store(0, 0, 0, b"permall") == TpmResult.FAIL
    port.store_error = None
    assert callbacks._on_store(0, 0, 0, b"permall") == TpmResult.FAIL
    assert port.stores == []
    with pytest.raises(OSError, match="no space"):
        callbacks.reraise()
    assert callbacks._on_store(0, 0, 0, b"a name libtpms does not use") == TpmResult.FAIL
    with pytest.raises(ValueError, match="does not use"):
        callbacks.reraise()


def test_libtpms_is_silent_unless_asked(
    port: MemoryStatePort, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port.states[StateKind.PERMANENT] = b"rubbish"
    engine = LibtpmsEngine(port)
    with pytest.raises(EngineError):
        engine.start()
    engine.close()
    assert capfd.readouterr() == ("", "")

    with (tmp_path / "log").open("w+b") as log:
        engine = LibtpmsEngine(port, debug_fd=log.fileno())
        with pytest.raises(EngineError):
            engine.start()
        engine.close()
        log.seek(0)
        assert b"libtpms" in log.read()
    assert capfd.readouterr() == ("", "")


def test_profiles(libtpms: LibtpmsEngine) -> None:
    if not libtpms.supports_profiles:
        pytest.skip(f"libtpms {libtpms.version} has no profiles")
    with pytest.raises(EngineError):
        libtpms.set_profile("rubbish")
    libtpms.set_profile('{"Name":"default-v1"}')
    libtpms.start()
    assert libtpms.was_manufactured
    assert json.loads(libtpms.info(32))["ActiveProfile"]["Name"] == "default-v1"
    with pytest.raises(EngineError):
        libtpms.set_profile('{"Name":"default-v1"}')
    libtpms.start()
    assert not libtpms.was_manufactured


def test_the_version_is_the_librarys(libtpms: LibtpmsEngine) -> None:
    packed = ctypes.CDLL("libtpms.so.0").TPMLIB_GetVersion()
    version = libtpms.version
    assert version.major << 16 | version.minor << 8 | version.micro == packed
    assert str(version) == f"{version.major}.{version.minor}.{version.micro}"


def test_what_is_not_libtpms_is_refused() -> None:
    for path in ("/nonexistent/libtpms.so.0", "libc.so.6"):
        with pytest.raises(EngineMissingError, match="apt-get install libtpms0") as caught:
            load(path)
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)


VERSIONS = [(0x000901, False), (0x000902, True), (0x000A00, True), (0x010000, True)]


@pytest.mark.parametrize(("packed", "usable"), VERSIONS)
def test_the_oldest_version_is_0_9_2(tmp_path: Path, packed: int, usable: bool) -> None:
    """A library that has every needed name and only a version to tell."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    names = [declaration.name for declaration in DECLARATIONS if not declaration.optional]
    source = "".join(
        f"int {name}(void) {{ return {packed if name == 'TPMLIB_GetVersion' else 0}; }}\n" for name in names
    )
    library = tmp_path / "libtpms.so.0"
    (tmp_path / "stub.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "stub.c"], check=True, timeout=60)
    if usable:
        assert "TPMLIB_SetProfile" not in load(str(library))
    else:
        with pytest.raises(EngineMissingError, match="too old"):
            load(str(library))
