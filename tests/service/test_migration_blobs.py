"""State blobs on the control channel: keys, flags, pieces, limits, and what rides along."""

from __future__ import annotations

import pytest

from crbd.control import messages as m
from crbd.control.spec import MAX_STATE_BLOB
from crbd.engine.fake import FakeEngine
from crbd.engine.port import Engine, StatePort
from crbd.service.control import ControlService
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from crbd.state.swtpm import encode_migration, open_migration
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.tpm.head import response_code
from crbd.tpm.results import TpmResult
from tests.engine import commands as c

from .failing_store import FailingStore

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE
NONE, DECRYPTED, ENCRYPTED = m.StateFlag(0), m.StateFlag.DECRYPTED, m.StateFlag.ENCRYPTED
KEYS: dict[str, SwtpmKey | None] = {
    "none": None,
    "128": SwtpmKey(bytes(range(16))),
    "256": SwtpmKey(bytes(range(32))),
    "passphrase": SwtpmKey.from_passphrase(b"a passphrase", 32),
}
OTHER = SwtpmKey(bytes(16))


class Peer:
    """A control channel's client, its service and its instance with the fake TPM."""

    def __init__(
        self, key: SwtpmKey | None = None, file_key: SwtpmKey | None = None, *, store: FailingStore | None = None
    ) -> None:
        self.store = store or FailingStore()
        options = InstanceOptions(may_manufacture=True, migration_key=key, file_key=file_key)
        self.engines: list[FakeEngine] = []
        self.instance = Instance(self._make, self.store, options)
        self._service = ControlService(self.instance)

    def _make(self, port: StatePort) -> Engine:
        self.engines.append(FakeEngine(port))
        return self.engines[-1]

    def ask(self, request: m.Request) -> m.Reply:
        return self._service.answer(request)

    def started(self) -> Peer:
        assert self.ask(m.Init(m.InitFlag(0))) == m.Done()
        assert self.run(c.STARTUP_CLEAR) == c.SUCCESS
        return self

    def run(self, command: bytes) -> int | None:
        return response_code(self.instance.execute(command))

    def get(self, kind: int, flags: m.StateFlag = DECRYPTED, offset: int = 0) -> m.StateBlob:
        reply = self.ask(m.GetStateBlob(flags, kind, offset))
        assert isinstance(reply, m.StateBlob)
        return reply

    def set(self, kind: int, blob: bytes, flags: m.StateFlag = NONE) -> m.Reply:
        return self.ask(m.SetStateBlob(flags, kind, blob))


def move(source: Peer, target: Peer, flags: m.StateFlag = DECRYPTED) -> None:
    """As QEMU does it."""
    blobs = [source.get(kind, flags) for kind in StateKind]
    assert target.ask(m.Stop()) == m.Done()
    for kind, blob in zip(StateKind, blobs, strict=True):
        if blob.result == TpmResult.SUCCESS:
            assert target.set(kind, blob.data, blob.flags) == m.Done()
    assert target.ask(m.Init(m.InitFlag.DELETE_VOLATILE)) == m.Done()


@pytest.mark.parametrize("flags", [NONE, DECRYPTED])
@pytest.mark.parametrize("file_key", KEYS)
@pytest.mark.parametrize("key", KEYS)
def test_a_tpm_moves_under_every_pair_of_keys(key: str, file_key: str, flags: m.StateFlag) -> None:
    source = Peer(KEYS[key], KEYS[file_key]).started()
    source.run(c.pcr_extend(16, b"\x11" * 32))
    value = source.instance.execute(c.pcr_read(16))
    blob = source.get(VOLATILE, flags)
    inner = flags is NONE and KEYS[file_key] is not None
    assert blob.flags == (ENCRYPTED if inner else NONE)
    assert blob.total_length == len(blob.data)
    opened = open_migration(blob.data, "blob", KEYS[key], KEYS[file_key] if inner else None)
    assert (opened.state in blob.data) == (KEYS[key] is None and not inner)
    # The head alone says it too: QEMU keeps the flags, other clients may not.
    assert open_migration(blob.data, "blob", KEYS[key], KEYS[file_key], encrypted=inner) == opened
    target = Peer(KEYS[key], KEYS[file_key])
    move(source, target, flags)
    assert target.instance.execute(c.pcr_read(16)) == value


def test_a_plain_blob_is_taken_where_there_is_a_migration_key() -> None:
    """swtpm: a running TPM can be moved to a host that encrypts."""
    source, target = Peer().started(), Peer(KEYS["256"], KEYS["128"])
    move(source, target)
    assert target.run(c.pcr_read(16)) == c.SUCCESS


@pytest.mark.parametrize("wrong", ["no migration key", "another", "one of another size", "no file key"])
def test_what_cannot_be_opened_is_refused(wrong: str) -> None:
    source = Peer(KEYS["128"], KEYS["256"]).started()
    key = {"no migration key": None, "another": OTHER, "one of another size": KEYS["256"]}.get(wrong, KEYS["128"])
    target = Peer(key, None if wrong == "no file key" else KEYS["256"])
    blob = source.get(PERMANENT, NONE)
    assert target.set(PERMANENT, blob.data, blob.flags) == m.Failure(TpmResult.KEY_NOT_FOUND)
    assert target.store.commits == 0
    assert target.set(PERMANENT, b"garbage as long as a head", NONE) == m.Failure(TpmResult.BAD_PARAMETER)


@pytest.mark.parametrize("file_key", KEYS)
@pytest.mark.parametrize("key", KEYS)
def test_get_config_tells_which_keys(key: str, file_key: str) -> None:
    wanted = m.ConfigFlag(0)
    if KEYS[key] is not None:
        wanted |= m.ConfigFlag.MIGRATION_KEY
    if KEYS[file_key] is not None:
        wanted |= m.ConfigFlag.FILE_KEY
    assert Peer(KEYS[key], KEYS[file_key]).ask(m.GetConfig()) == m.Config(wanted)


def test_pieces_are_of_one_blob_whatever_the_tpm_does_meanwhile() -> None:
    """The keys' IVs are random: pieces of two blobs would not fit even where the state is the same."""
    peer = Peer(KEYS["128"], KEYS["128"]).started()
    whole = peer.get(VOLATILE).data
    peer.run(c.pcr_extend(16, b"\x11" * 32))
    assert peer.get(PERMANENT).data != b""
    assert peer.get(VOLATILE, offset=100).data == whole[100:]
    assert peer.get(VOLATILE, offset=len(whole) - 1).data == whole[-1:]
    end = peer.get(VOLATILE, offset=len(whole))
    assert (end.result, end.total_length, end.data) == (TpmResult.SUCCESS, 0, b"")
    assert peer.get(VOLATILE, offset=0xFFFFFFFF).data == b""
    # Not asked for decrypted, it is another blob; and so it is from offset 0 again.
    assert peer.get(VOLATILE, NONE, 100).data != whole[100:]
    assert peer.get(VOLATILE).data != whole
    assert peer.get(VOLATILE, offset=100).data != whole[100:]


def test_pieces_do_not_outlive_the_tpm_they_are_of() -> None:
    peer = Peer().started()
    peer.run(c.pcr_extend(16, b"\x11" * 32))
    old = open_migration(peer.get(VOLATILE).data, "blob")
    peer.ask(m.Init(m.InitFlag(0)))
    assert peer.run(c.STARTUP_CLEAR) == c.SUCCESS
    part = peer.get(VOLATILE, offset=1).data
    assert open_migration(b"\x02" + part, "blob").state != old.state


def test_limits() -> None:
    peer = Peer().started()
    assert peer.get(SAVESTATE) == m.StateBlob(TpmResult.RETRY)
    assert peer.get(4) == m.StateBlob(TpmResult.FAIL)
    assert peer.set(PERMANENT, b"x") == m.Failure(TpmResult.BAD_ORDINAL), "the TPM is on"
    peer.ask(m.Stop())
    assert peer.get(PERMANENT) == m.StateBlob(TpmResult.BAD_ORDINAL), "the TPM is off"
    assert peer.set(4, b"x") == m.Failure(TpmResult.BAD_PARAMETER)
    assert peer.set(PERMANENT, bytes(MAX_STATE_BLOB)) == m.Failure(TpmResult.BAD_PARAMETER)


class Fat(FakeEngine):
    """Its volatile state is more than a blob may hold."""

    def get_state(self, kind: StateKind) -> bytes | None:
        return bytes(MAX_STATE_BLOB) if kind is VOLATILE else super().get_state(kind)


def test_a_blob_that_no_client_would_take_is_not_handed_out() -> None:
    instance = Instance(Fat, FailingStore(), InstanceOptions(may_manufacture=True))
    service = ControlService(instance)
    service.answer(m.Init(m.InitFlag(0)))
    reply = service.answer(m.GetStateBlob(DECRYPTED, VOLATILE, 0))
    assert reply == m.StateBlob(TpmResult.SIZE)
    assert len(m.encode_reply(reply)) == 16


# -- what rides along


def test_locality_buffer_size_established_flag_and_last_command_arrive() -> None:
    source = Peer()
    source.ask(m.SetBufferSize(3000))
    source.started()
    for request in (m.HashStart(), m.HashData(b"drtm"), m.HashEnd(), m.SetLocality(2)):
        assert source.ask(request) == m.Done()
    assert source.run(c.SHUTDOWN_CLEAR) == c.SUCCESS
    target = Peer()
    move(source, target)
    assert target.ask(m.GetTpmEstablished()) == m.Established(True)
    sizes = target.ask(m.SetBufferSize(0))
    assert isinstance(sizes, m.BufferSizes)
    assert sizes.current == 3000
    target.ask(m.Stop())
    log = target.engines[0].log
    assert [entry.command for entry in log] == [], "the guest has shut its TPM down already"
    assert target.engines[0].locality == 2
    # It moves on from there, and can be reset where it is.
    target.ask(m.Init(m.InitFlag(0)))
    target.ask(m.SetLocality(0))
    assert target.run(c.STARTUP_CLEAR) == c.SUCCESS
    third = Peer()
    move(target, third)
    assert third.ask(m.GetTpmEstablished()) == m.Established(True)
    assert third.ask(m.ResetTpmEstablished(3)) == m.Done()
    assert third.ask(m.GetTpmEstablished()) == m.Established(False)


def test_a_flag_that_is_not_set_there_is_cleared_here() -> None:
    """A snapshot from before the measured launch."""
    peer = Peer().started()
    blobs = {kind: peer.get(kind).data for kind in (PERMANENT, VOLATILE)}
    for request in (m.HashStart(), m.HashEnd()):
        peer.ask(request)
    assert peer.ask(m.GetTpmEstablished()) == m.Established(True)
    peer.ask(m.Stop())
    for kind, blob in blobs.items():
        peer.set(kind, blob)
    peer.ask(m.Init(m.InitFlag(0)))
    assert peer.ask(m.GetTpmEstablished()) == m.Established(False)


def test_what_the_client_here_set_counts() -> None:
    source, target = Peer(), Peer()
    source.ask(m.SetBufferSize(3000))
    target.ask(m.SetBufferSize(3500))
    move(source.started(), target)
    sizes = target.ask(m.SetBufferSize(0))
    assert isinstance(sizes, m.BufferSizes)
    assert sizes.current == 3500


def test_a_locality_that_is_refused_here_does_not_come_in() -> None:
    source = Peer().started()
    source.ask(m.SetLocality(4))
    options = InstanceOptions(reject_locality_4=True)
    engines: list[FakeEngine] = []

    def make(port: StatePort) -> Engine:
        engines.append(FakeEngine(port))
        return engines[-1]

    target = Instance(make, FailingStore(), options)
    for kind in (PERMANENT, VOLATILE):
        target.set_state_blob(kind, source.get(kind).data)
    target.init(delete_volatile=True)
    assert engines[0].locality == 0


def test_swtpms_blobs_leave_all_that_as_it_is() -> None:
    source, target = Peer().started(), Peer()
    source.ask(m.SetLocality(3))
    target.ask(m.SetLocality(1))
    for kind in (PERMANENT, VOLATILE):
        state = open_migration(source.get(kind).data, "blob").state
        assert target.set(kind, encode_migration(state)) == m.Done()
    target.ask(m.Init(m.InitFlag(0)))
    assert target.engines[0].locality == 1


def test_the_session_goes_with_the_volatile_blob() -> None:
    """Taken back or replaced with it."""
    source, target = Peer().started(), Peer()
    source.ask(m.SetLocality(3))
    permanent, volatile = source.get(PERMANENT).data, source.get(VOLATILE).data
    target.set(PERMANENT, permanent)
    target.set(VOLATILE, volatile)
    target.set(VOLATILE, b"")
    target.ask(m.Init(m.InitFlag(0)))
    assert target.engines[0].locality == 0
    target.ask(m.Stop())
    target.set(PERMANENT, permanent)
    target.set(VOLATILE, volatile)
    target.set(PERMANENT, permanent)
    target.ask(m.Init(m.InitFlag(0)))
    assert target.engines[0].locality == 3
