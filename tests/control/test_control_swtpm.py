"""Our requests and our decoder against Debian's swtpm: the oracle of the table."""

from __future__ import annotations

import array
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.control import messages as m
from crbd.control.client import ReplyDecoder
from crbd.tpm.results import TpmResult

pytestmark = pytest.mark.e2e

PATIENCE = 10.0
"""Seconds for anything that swtpm has to do."""
QUIET = 0.3
"""Seconds without a further byte that make a 4-byte refusal of GET_STATEBLOB whole."""


class Oracle:
    """A swtpm process and a connection to its control socket."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self._path = path
        self.socket = self._connect()
        self._decoder = ReplyDecoder()

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, "swtpm ended"
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(PATIENCE)
            try:
                client.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                client.close()
                assert time.monotonic() < deadline, "swtpm does not listen"
                continue
            return client

    def ask(self, request: m.Request, padding: bytes = b"") -> m.Reply:
        """Send one request, in one write, and read its reply."""
        data = m.encode_request(request) + padding
        if isinstance(request, m.SetDataFd):
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [request.fd]))
            self.socket.sendmsg([data], [rights])
        else:
            self.socket.sendall(data)
        self._decoder.expect(type(request))
        while (reply := self._decoder.next_reply()) is None:
            received = self._read(PATIENCE)
            assert received, "swtpm closed the connection"
            self._decoder.receive(received)
            if isinstance(request, m.GetStateBlob) and len(received) == 4 and not self._read_is_possible():
                reply = self._decoder.next_reply(final=True)
                assert reply is not None
                return reply
        return reply

    def _read(self, seconds: float) -> bytes:
        self.socket.settimeout(seconds)
        return self.socket.recv(1 << 16)

    def _read_is_possible(self) -> bool:
        self.socket.settimeout(QUIET)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return False


@pytest.fixture
def oracle() -> Iterator[Oracle]:
    program = shutil.which("swtpm")
    assert program, "swtpm is not installed"
    with tempfile.TemporaryDirectory(prefix="crbd-") as place:
        path = Path(place) / "ctrl"
        options = ["socket", "--tpm2", "--tpmstate", f"dir={place}", "--ctrl", f"type=unixio,path={path}"]
        with subprocess.Popen([program, *options]) as process:
            try:
                swtpm = Oracle(process, path)
                with swtpm.socket:
                    yield swtpm
            finally:
                process.terminate()


def test_every_request_is_understood_and_every_reply_decoded(oracle: Oracle) -> None:
    """One life of a TPM: before INIT, running, its state taken out and put back, the end."""
    before_init(oracle)
    assert oracle.ask(m.Init(m.InitFlag(0))) == m.Done()
    while_running(oracle)
    blob = state_taken(oracle)
    assert oracle.ask(m.Stop()) == m.Done()
    assert oracle.ask(m.SetStateBlob(m.StateFlag(0), 1, blob)) == m.Done()
    assert oracle.ask(m.Init(m.InitFlag.DELETE_VOLATILE)) == m.Done()
    assert state_taken(oracle) == blob
    assert oracle.ask(m.Shutdown()) == m.Done()
    assert oracle.process.wait(PATIENCE) == 0


def before_init(oracle: Oracle) -> None:
    """What swtpm answers while its TPM is off."""
    capabilities = oracle.ask(m.GetCapability())
    assert isinstance(capabilities, m.Capabilities)
    assert capabilities.caps & 0xFFFF == 0xFFFF
    for request in (m.GetTpmEstablished(), m.HashStart(), m.HashEnd(), m.CancelTpmCmd(), m.StoreVolatile()):
        assert oracle.ask(request) == m.Failure(TpmResult.BAD_ORDINAL)
    assert oracle.ask(m.GetStateBlob(m.StateFlag.DECRYPTED, 1, 0)) == m.Failure(TpmResult.BAD_ORDINAL)
    assert oracle.ask(m.Stop()) == m.Done()
    sizes = oracle.ask(m.SetBufferSize(0xF80))
    assert isinstance(sizes, m.BufferSizes)
    assert sizes.minimum <= sizes.current == 0xF80 <= sizes.maximum
    assert oracle.ask(m.GetConfig()) == m.Config(m.ConfigFlag(0))


def while_running(oracle: Oracle) -> None:
    """What swtpm answers while its TPM is on."""
    assert oracle.ask(m.GetTpmEstablished()) == m.Established(0)
    assert oracle.ask(m.SetBufferSize(0x800)) == m.Failure(TpmResult.BAD_ORDINAL)
    assert oracle.ask(m.SetLocality(4)) == m.Done()
    for request in (m.HashStart(), m.HashData(b"measured"), m.HashData(bytes(5000)), m.HashEnd()):
        assert oracle.ask(request) == m.Done()
    assert oracle.ask(m.GetTpmEstablished()) == m.Established(1)
    assert oracle.ask(m.ResetTpmEstablished(4), padding=b"abc") == m.Done()
    assert oracle.ask(m.GetTpmEstablished()) == m.Established(0)
    assert oracle.ask(m.SetLocality(5)) == m.Failure(TpmResult.BAD_LOCALITY)
    assert oracle.ask(m.SetLocality(0), padding=b"abc") == m.Done()
    assert oracle.ask(m.CancelTpmCmd()) == m.Done()
    assert oracle.ask(m.StoreVolatile()) == m.Done()
    assert oracle.ask(m.SetStateBlob(m.StateFlag(0), 1, b"")) == m.Failure(TpmResult.BAD_ORDINAL)
    info = oracle.ask(m.GetInfo(1, 0))
    assert isinstance(info, m.Info)
    assert info.total_length == len(info.text)
    assert json.loads(info.text.removesuffix(b"\0"))["TPMSpecification"]["family"] == "2.0"
    assert oracle.ask(m.GetInfo(1, 1)) == m.Info(info.total_length, info.text[1:])
    # swtpm got LOCK_STORAGE with 0.8.
    assert oracle.ask(m.LockStorage(0)) in (m.Done(), m.Failure(TpmResult.BAD_ORDINAL))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert oracle.ask(m.SetDataFd(theirs.fileno())) == m.Done()
        assert oracle.ask(m.SetDataFd(theirs.fileno())) == m.Failure(TpmResult.IO_ERROR)


def state_taken(oracle: Oracle) -> bytes:
    """The permanent state. The lengths count what remains behind the offset; a missing blob is a whole head."""
    blob = oracle.ask(m.GetStateBlob(m.StateFlag.DECRYPTED, 1, 0))
    assert isinstance(blob, m.StateBlob)
    assert (blob.result, blob.flags, blob.total_length) == (0, 0, len(blob.data))
    tail = oracle.ask(m.GetStateBlob(m.StateFlag.DECRYPTED, 1, 100))
    assert tail == m.StateBlob(0, m.StateFlag(0), len(blob.data) - 100, blob.data[100:])
    assert oracle.ask(m.GetStateBlob(m.StateFlag.DECRYPTED, 3, 0)) == m.StateBlob(TpmResult.RETRY)
    return blob.data


def test_data_channel_descriptor_is_required(oracle: Oracle) -> None:
    oracle.socket.sendall(bytes.fromhex("00000010"))
    assert m.decode_reply(m.SetDataFd, oracle.socket.recv(64)) == m.Failure(TpmResult.BAD_PARAMETER)
    oracle.socket.sendall(bytes.fromhex("000000ff"))
    assert m.decode_reply(m.Stop, oracle.socket.recv(64)) == m.Failure(TpmResult.BAD_ORDINAL)
