"""Ephemeral TPMs: new ones, what happens to them, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.errors import DaemonError, EndpointError, EngineFailedError, EngineMissingError, UsageError
from crbd.testing.tpm import EphemeralTpm, TpmFactory
from tests.cli.process import PATIENCE, ask, wait_until
from tests.engine import commands as c

DIGEST = bytes(range(32))
NV_DEFINED, RETRY = 0x14C, 0x922


@pytest.fixture(scope="module")
def factory() -> Iterator[TpmFactory]:
    with TpmFactory() as made:
        yield made


@pytest.fixture
def tpm(factory: TpmFactory) -> Iterator[EphemeralTpm]:
    with factory.make() as made:
        yield made


class Client:
    """A connection to the data channel."""

    def __init__(self, tpm: EphemeralTpm) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(tpm.socket))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self, command: bytes) -> bytes:
        self._socket.sendall(command)
        return self.receive()

    def receive(self) -> bytes:
        return self._socket.recv(4096)

    def code(self, command: bytes) -> int:
        return c.code(self.run(command))

    def pcr(self, number: int) -> bytes:
        return c.pcr_value(self.run(c.pcr_read(number)))


def test_a_new_one_is_started_and_empty(tpm: EphemeralTpm) -> None:
    assert len(ask(tpm.socket, c.GET_RANDOM, 28)) == 28
    assert tpm.tcti == f"swtpm:path={tpm.socket}"
    assert tpm.directory.stat().st_mode & 0o777 == 0o700
    with Client(tpm) as client:
        assert client.pcr(16) == bytes(32)
        assert client.code(c.nv_define(8)) == c.SUCCESS
        assert client.code(c.nv_define(8)) == NV_DEFINED
    assert tpm.log == ""


def test_two_at_a_time_have_nothing_in_common(factory: TpmFactory) -> None:
    with factory.make() as one, factory.make() as two, Client(one) as first, Client(two) as second:
        assert first.code(c.nv_define(8)) == second.code(c.nv_define(8)) == c.SUCCESS
        assert first.run(c.GET_RANDOM) != second.run(c.GET_RANDOM)


def test_the_same_template_gives_another_key(factory: TpmFactory) -> None:
    keys = []
    for _ in range(2):
        with factory.make() as made, made.esapi() as esapi:
            _, public, *_ = esapi.create_primary(None, "ecc256")
            keys.append(bytes(public.publicArea.marshal()))
    assert keys[0] != keys[1]


def test_nothing_is_left_of_one(factory: TpmFactory) -> None:
    made = factory.make()
    place = made.directory
    made.close()
    made.close()
    assert not place.exists()
    assert made.log == ""
    with pytest.raises(DaemonError):
        made.snapshot()


def test_a_client_that_stays_does_not_hold_it(factory: TpmFactory) -> None:
    made = factory.make()
    with Client(made) as client:
        assert client.code(c.GET_RANDOM) == c.SUCCESS
        made.close()
        assert client.receive() == b""
    assert not made.directory.exists()


def test_it_ends_with_its_keeper_however_that_ends(factory: TpmFactory) -> None:
    program = (
        "import sys\nfrom crbd.testing.tpm import TpmFactory\n"
        "tpm = TpmFactory().make()\nprint(tpm.directory, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        place = Path(keeper.stdout.readline().strip())
        assert (place / "tpm").exists()
        keeper.send_signal(signal.SIGKILL)
    wait_until(lambda: not place.exists(), "the TPM's end")


def test_the_environment_is_for_this_tpm(tpm: EphemeralTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = tpm.directory / "given.json"
    configuration.write_text('{"profile_name": "P_RSA2048SHA256", "tcti": "device:/dev/tpm0", "user_dir": "~/x"}')
    monkeypatch.setenv("TSS2_FAPICONF", str(configuration))
    variables = tpm.environment
    named = ("TPM2TOOLS_TCTI", "TPM2_PKCS11_TCTI", "TPM2OPENSSL_TCTI", "TCTI", "SYSTEMD_TPM2_DEVICE")
    assert {variables[name] for name in named} == {tpm.tcti}
    assert (variables["CRBD_DATA"], variables["CRBD_CTRL"]) == (str(tpm.socket), str(tpm.control))
    made = Path(variables["TSS2_FAPICONF"]).read_text()
    assert '"P_RSA2048SHA256"' in made
    assert tpm.tcti in made
    assert "/dev/tpm0" not in made
    assert f'"user_dir": "{tpm.directory}/' in made
    monkeypatch.setenv("TSS2_FAPICONF", str(tpm.directory / "absent"))
    assert "TSS2_FAPICONF" not in tpm.environment


# -- what happens to it


def test_a_snapshot_brings_back_all_of_it_under_an_open_connection(tpm: EphemeralTpm) -> None:
    with Client(tpm) as client:
        assert client.code(c.pcr_extend(16, DIGEST)) == c.SUCCESS
        before, snapshot = client.pcr(16), tpm.snapshot()
        assert client.code(c.pcr_extend(16, DIGEST)) == c.SUCCESS
        assert client.code(c.nv_define(8)) == c.SUCCESS
        for _ in range(2):
            tpm.restore(snapshot)
            assert client.pcr(16) == before
            assert client.code(c.nv_define(8)) == c.SUCCESS


def test_one_can_be_made_from_a_snapshot(factory: TpmFactory, tpm: EphemeralTpm) -> None:
    with Client(tpm) as client:
        assert client.code(c.nv_define(8)) == c.SUCCESS
        assert client.code(c.pcr_extend(16, DIGEST)) == c.SUCCESS
        extended = client.pcr(16)
    with factory.make(tpm.snapshot()) as copy, Client(copy) as client:
        assert client.pcr(16) == extended
        assert client.code(c.nv_define(8)) == NV_DEFINED
    places = set(tpm.directory.parent.glob("crbd-*"))
    with pytest.raises(DaemonError, match="the snapshot"):
        factory.make(b"nonsense")
    assert set(tpm.directory.parent.glob("crbd-*")) <= places, "what was begun is gone"


def test_a_reset_is_the_machines(tpm: EphemeralTpm) -> None:
    with Client(tpm) as client:
        assert client.code(c.pcr_extend(16, DIGEST)) == c.SUCCESS
        tpm.reset()
        assert client.pcr(16) == bytes(32)
        assert client.code(c.STARTUP_CLEAR) == c.INITIALIZE, "it is started already"


def test_faults_are_for_as_long_as_they_are_wanted(tpm: EphemeralTpm) -> None:
    with Client(tpm) as client:
        with tpm.faults("GetRandom:2+=retry") as faults:
            assert faults.struck == 0
            assert [client.code(c.GET_RANDOM) for _ in range(3)] == [c.SUCCESS, RETRY, RETRY]
            assert faults.struck == 2
        assert faults.struck == 2
        assert client.code(c.GET_RANDOM) == c.SUCCESS
        assert "GetRandom:2+=retry" in tpm.log
        with pytest.raises(UsageError, match="there is no action 'retrx'"), tpm.faults("GetRandom=retrx"):
            pass
        assert client.code(c.GET_RANDOM) == c.SUCCESS


def test_failure_mode_is_over_after_a_reset(tpm: EphemeralTpm) -> None:
    with Client(tpm) as client:
        with tpm.faults("GetRandom:1=failure-mode"):
            assert client.code(c.GET_RANDOM) == c.FAILURE
        assert client.code(c.GET_RANDOM) == c.FAILURE
        tpm.reset()
        assert client.code(c.GET_RANDOM) == c.SUCCESS


def test_a_delay_does_not_keep_it_from_ending(factory: TpmFactory) -> None:
    made = factory.make()
    with Client(made) as client, made.faults("GetRandom=delay:3600s") as faults:
        waiting = threading.Thread(target=client.run, args=(c.GET_RANDOM,))
        waiting.start()
        wait_until(lambda: faults.struck == 1, "the delay")
        made.close()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()
        made.close()


# -- what cannot be


def test_a_library_that_is_not_there() -> None:
    with (
        TpmFactory("/nonexistent/libtpms.so.0") as factory,
        pytest.raises(EngineMissingError, match="libtpms cannot be loaded"),
    ):
        factory.make()


def test_a_directory_with_too_long_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with TpmFactory() as factory:
        monkeypatch.setattr("tempfile.tempdir", str(deep))
        with pytest.raises(EndpointError, match="TMPDIR"):
            factory.make()
    assert os.listdir(deep) == []


def test_a_factory_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with TpmFactory() as factory:
        factory.make().close()
        factory.close()
        with pytest.raises(EngineFailedError, match="no TPM can be made"):
            factory.make()
    assert os.listdir(tmp_path) == []
