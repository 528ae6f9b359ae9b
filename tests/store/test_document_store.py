"""crbd's own layout: what a commit carries on, what an old or a newer document does, and which key opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

from crbd.errors import (
    StateDamagedError,
    StateForeignError,
    StateLockedError,
    StateNewerError,
    StateSealedError,
    StateUnfinishedError,
    StateUnsealedError,
    StateWrongKeyError,
    StoreError,
    StoreFencedError,
    UsageError,
)
from crbd.state.document import decode, encode, peek_header
from crbd.state.keys import Passphrase, RawKey, ScryptCost
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.store.document import FILE_NAME, DocumentStore, NewTpm
from crbd.store.layout import Layout, found_in, open_state
from crbd.store.slots import SlotFile

PERMANENT, VOLATILE = StateKind.PERMANENT, StateKind.VOLATILE
ENGINE = EngineStamp(0, 9, 2)
GOLDEN = Path(__file__).resolve().parents[1] / "state" / "golden"


def opened(path: Path, *, create: bool = False, new: NewTpm | None = None) -> DocumentStore:
    store = DocumentStore(path, create=create, new=new)
    store.use_engine(ENGINE)
    return store


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A directory with a TPM of one commit."""
    store = opened(tmp_path, create=True, new=NewTpm("vm1"))
    store.commit({PERMANENT: b"one"})
    store.close()
    return tmp_path


def payload(path: Path) -> bytes:
    slots = SlotFile.open(path / FILE_NAME, create=False, writable=False)
    loaded = slots.load()
    slots.close()
    assert loaded is not None
    return loaded.payload


def put(path: Path, document: bytes) -> None:
    slots = SlotFile.open(path / FILE_NAME, create=True)
    slots.commit(document)
    slots.close()


def test_the_identity_is_carried_on_and_the_generation_counts(made: Path) -> None:
    first = decode(payload(made))
    assert (first.identity.name, first.identity.generation) == ("vm1", 1)
    store = opened(made)
    store.commit({VOLATILE: b"v"})
    store.commit({PERMANENT: b"two"})
    store.close()
    third = decode(payload(made))
    assert third.identity.uuid == first.identity.uuid
    assert third.identity.created == first.identity.created
    assert third.identity.generation == 3
    assert third.permanent is not None
    assert third.permanent.engine == ENGINE
    assert third.volatile is not None
    assert third.writer_id != first.writer_id


def test_a_new_file_appears_with_its_first_commit(tmp_path: Path) -> None:
    store = opened(tmp_path, create=True)
    assert [store.document, (tmp_path / FILE_NAME).exists()] == [None, False]
    store.commit({PERMANENT: b"one"})
    assert store.load(PERMANENT) == b"one"
    assert (tmp_path / FILE_NAME).exists()
    store.close()


def test_a_store_without_an_engine_commits_nothing(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path, create=True)
    with pytest.raises(StoreError, match="engine"):
        store.commit({PERMANENT: b"one"})
    store.close()


def test_state_of_a_newer_engine_is_refused_before_the_engine_sees_it(made: Path) -> None:
    store = opened(made)
    store.use_engine(EngineStamp(0, 10, 2, "default-v1", 7))
    store.commit({PERMANENT: b"two"})
    store.close()
    store = opened(made)
    with pytest.raises(StateNewerError, match=r"libtpms 0\.10"):
        store.load(PERMANENT)
    store.use_engine(EngineStamp(0, 10, 0))
    assert store.load(PERMANENT) == b"two"
    store.close()


def test_an_old_format_is_kept_when_it_is_first_written_over(made: Path) -> None:
    old = encode(decode(payload(made)), format_version=1)
    put(made, old)
    store = opened(made)
    assert store.load(PERMANENT) == b"one"
    kept = made / f"{FILE_NAME}.format-1"
    assert not kept.exists(), "reading upgrades nothing"
    store.commit({PERMANENT: b"two"})
    assert kept.read_bytes() == old
    assert kept.stat().st_mode & 0o777 == 0o600
    assert peek_header(payload(made)).format_version == 3
    store.commit({PERMANENT: b"three"})
    store.close()
    assert kept.read_bytes() == old


def test_an_old_format_that_cannot_be_kept_is_not_written_over(made: Path) -> None:
    old = encode(decode(payload(made)), format_version=2)
    put(made, old)
    (made / f".{FILE_NAME}.format-2.new").mkdir()
    store = opened(made)
    with pytest.raises(StoreError, match="format-2"):
        store.commit({PERMANENT: b"two"})
    assert payload(made) == old
    assert store.load(PERMANENT) == b"one"
    store.close()


@pytest.mark.parametrize("keys", [(RawKey(bytes(32)),), (Passphrase(b"secret", cost=ScryptCost(10, 8, 1)),)])
def test_sealed_state_and_the_wrong_keys(tmp_path: Path, keys: tuple[RawKey | Passphrase, ...]) -> None:
    store = opened(tmp_path, create=True, new=NewTpm("", keys))
    store.commit({PERMANENT: b"very secret"})
    assert store.load(PERMANENT) == b"very secret"
    store.close()
    assert b"very secret" not in (tmp_path / FILE_NAME).read_bytes()
    again = opened(tmp_path, new=NewTpm("", keys))
    assert again.load(PERMANENT) == b"very secret"
    again.commit({PERMANENT: b"more"})
    assert again.load(PERMANENT) == b"more"
    again.close()
    with pytest.raises(StateSealedError, match="no key"):
        opened(tmp_path)
    with pytest.raises(StateWrongKeyError):
        opened(tmp_path, new=NewTpm("", (RawKey(b"x" * 32),)))
    opened(tmp_path, new=NewTpm("", keys)).close()


def test_a_plain_document_where_a_key_was_given_is_refused(made: Path) -> None:
    with pytest.raises(StateUnsealedError):
        opened(made, new=NewTpm("", (RawKey(bytes(32)),)))


def test_damage_and_locks(made: Path) -> None:
    first = opened(made)
    with pytest.raises(StateLockedError):
        opened(made)
    first.close()
    put(made, b"no document")
    with pytest.raises(StateDamagedError, match=r"tpm\.crbd"):
        opened(made)
    put(made, b"still none")
    with pytest.raises(StateDamagedError):
        opened(made)


def test_a_store_that_was_overtaken_writes_nothing(made: Path) -> None:
    store = opened(made)
    other = encode(decode(payload(made)))
    put(made, other)
    with pytest.raises(StoreFencedError):
        store.commit({PERMANENT: b"stale"})
    assert payload(made) == other
    store.close()


def test_layouts(tmp_path: Path) -> None:
    assert found_in(tmp_path / "nowhere") is None
    assert found_in(tmp_path) is None
    open_state(tmp_path / "a", create=True, layout=Layout.SWTPM).close()
    assert found_in(tmp_path / "a") is None, "nothing was committed"
    store = open_state(tmp_path / "b", create=True)
    store.use_engine(ENGINE)
    store.commit({PERMANENT: b"one"})
    store.close()
    assert found_in(tmp_path / "b") is Layout.CRBD
    with pytest.raises(StateForeignError, match="--layout crbd"):
        open_state(tmp_path / "b", create=True, layout=Layout.SWTPM)


def test_what_an_interrupted_creation_left_is_not_taken_for_a_tpm(tmp_path: Path) -> None:
    (tmp_path / f".{FILE_NAME}.new").write_bytes(bytes(1000))
    with pytest.raises(StateUnfinishedError):
        open_state(tmp_path, create=False)


def test_a_key_is_not_ignored_in_swtpms_layout(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(b"x")
    with pytest.raises(UsageError, match="--swtpm-key"):
        open_state(tmp_path, create=False, new=NewTpm("", (RawKey(bytes(32)),)))
