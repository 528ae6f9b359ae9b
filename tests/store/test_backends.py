"""What swtpm's `--tpmstate` and `--key` ask of its two layouts: modes, locking, backup, encryption."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from crbd.errors import (
    StateDamagedError,
    StateEmptyError,
    StateError,
    StateForeignError,
    StateSealedError,
    StateUnsealedError,
    StateWrongKeyError,
    StoreError,
    UsageError,
)
from crbd.state.document import decode
from crbd.state.kinds import StateKind
from crbd.state.swtpm import decode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.directory import DirectoryStore, open_directory
from crbd.store.document import FILE_NAME
from crbd.store.layout import Layout, found_in, open_backend, open_state
from crbd.store.linear import decode_head
from crbd.store.options import FileOptions
from crbd.store.port import Store
from tests.cli.states import blobs, contents, golden, put

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE
KEY, OTHER_KEY, SHORT_KEY = SwtpmKey(bytes(range(32))), SwtpmKey(bytes(32)), SwtpmKey(bytes(16))
SCHEMES = ["dir", "file"]


@pytest.fixture(params=SCHEMES)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path / 'state'}"


def state_file(uri: str) -> Path:
    scheme, _, path = uri.partition("://")
    return Path(path, "tpm2-00.permall") if scheme == "dir" else Path(path)


PLAIN = FileOptions()


def made(uri: str, key: SwtpmKey | None = None, options: FileOptions = PLAIN) -> None:
    store = open_backend(uri, create=True, swtpm_key=key, options=options)
    store.commit({PERMANENT: b"one", VOLATILE: b"v"})
    store.close()


# -- what is there


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made("dir://relative")
    made("file://relative.state")
    assert found_in(tmp_path / "relative") is Layout.SWTPM
    assert found_in(tmp_path / "relative.state") is Layout.LINEAR
    for wrong in ("relative", "http://x", "dir://", "://", "dir:/relative"):
        with pytest.raises(UsageError, match="there is no backend"):
            open_backend(wrong, create=True)
    with pytest.raises(UsageError, match="keeps no backup"):
        open_backend("file://new", create=True, options=FileOptions(backup=True))
    with pytest.raises(StateForeignError, match="in the linear layout, not in the swtpm layout"):
        open_backend("dir://relative.state", create=True)
    with pytest.raises(StateForeignError, match="in the swtpm layout, not in the linear layout"):
        open_backend("file://relative", create=True)
    assert not (tmp_path / "new").exists()


def test_a_linear_file_as_state(tmp_path: Path) -> None:
    """`--state FILE`: found, made where `--layout linear` says so, and never taken for something else."""
    path = tmp_path / "tpm.state"
    store = open_state(path, create=True, layout=Layout.LINEAR)
    store.commit({PERMANENT: b"one"})
    store.close()
    again = open_state(path, create=False)
    assert again.load(PERMANENT) == b"one"
    again.close()
    directory = put(tmp_path / "tpm", golden(1))
    with pytest.raises(StateForeignError, match="not swtpm's linear file"):
        open_state(directory / FILE_NAME, create=True)
    assert blobs(decode(golden(1)))
    (tmp_path / "empty").touch()
    with pytest.raises(StateEmptyError):
        open_state(tmp_path / "empty", create=False)
    with pytest.raises(StateForeignError, match="in the linear layout, not in the crbd layout"):
        open_state(path, create=True, layout=Layout.CRBD)


# -- keys


@pytest.mark.parametrize(
    ("written", "given", "error", "message"),
    [
        (KEY, None, StateSealedError, "encrypted with a state key"),
        (KEY, OTHER_KEY, StateWrongKeyError, "encrypted with another key"),
        (KEY, SHORT_KEY, StateWrongKeyError, "256 bits"),
        (None, KEY, StateUnsealedError, "is not encrypted"),
    ],
)
def test_the_wrong_key_and_none(
    uri: str, written: SwtpmKey | None, given: SwtpmKey | None, error: type[StateError], message: str
) -> None:
    made(uri, written)
    before = state_file(uri).read_bytes()
    store = open_backend(uri, create=False, swtpm_key=given)
    with pytest.raises(error, match=message) as refusal:
        store.load(PERMANENT)
    assert type(refusal.value) is error
    assert str(state_file(uri)) in str(refusal.value)
    store.close()
    assert state_file(uri).read_bytes() == before


def test_what_is_written_with_a_key_is_encrypted(uri: str) -> None:
    made(uri, KEY)
    store = open_backend(uri, create=False, swtpm_key=KEY)
    assert [store.load(kind) for kind in StateKind] == [b"one", b"v", None]
    store.commit({PERMANENT: b"in clear text", SAVESTATE: b"in clear text"})
    store.close()
    again = open_backend(uri, create=False, swtpm_key=KEY)
    assert [again.load(kind) for kind in StateKind] == [b"in clear text", b"v", b"in clear text"]
    again.close()
    path = state_file(uri)
    files = [path] if path.is_file() and uri.startswith("file") else list(path.parent.iterdir())
    assert not any(b"clear text" in file.read_bytes() for file in files)


def test_one_plain_kind_among_encrypted_ones_is_refused(tmp_path: Path) -> None:
    """Who can write the directory and has no key puts a volatile state of his own there."""
    made(f"dir://{tmp_path / 'ours'}", KEY)
    made(f"dir://{tmp_path / 'his'}")
    (tmp_path / "his" / "tpm2-00.volatilestate").replace(tmp_path / "ours" / "tpm2-00.volatilestate")
    store = open_backend(f"dir://{tmp_path / 'ours'}", create=False, swtpm_key=KEY)
    assert store.load(PERMANENT) == b"one"
    with pytest.raises(StateUnsealedError, match="volatilestate is not encrypted"):
        store.load(VOLATILE)
    store.close()


def test_each_layout_has_its_own_kind_of_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use --key"):
        open_state(tmp_path / "state", create=True, swtpm_key=KEY)
    assert not (tmp_path / "state").exists()


# -- modes


def test_modes(uri: str) -> None:
    made(uri)
    assert state_file(uri).stat().st_mode & 0o777 == 0o600
    opened(uri, FileOptions(mode=0o640)).close()
    assert state_file(uri).stat().st_mode & 0o777 == 0o600, "a default mode is for new files"
    opened(uri, FileOptions(mode=0o660, adopt_mode=True)).close()
    assert state_file(uri).stat().st_mode & 0o777 == 0o660


def test_modes_of_new_files(uri: str) -> None:
    made(uri, options=FileOptions(mode=0o644, lock_mode=0o640))
    assert state_file(uri).stat().st_mode & 0o777 == 0o644
    store = opened(uri, FileOptions(mode=0o644))
    store.commit({PERMANENT: b"two"})
    store.close()
    assert state_file(uri).stat().st_mode & 0o777 == 0o644
    if uri.startswith("dir"):
        assert state_file(uri).with_name(".lock").stat().st_mode & 0o777 == 0o640


def opened(uri: str, options: FileOptions) -> Store:
    return open_backend(uri, create=False, options=options)


# -- locking


def test_lock_false_locks_nothing(uri: str) -> None:
    made(uri)
    locked = open_backend(uri, create=False)
    unlocked = opened(uri, FileOptions(locking=False))
    assert unlocked.locked
    unlocked.commit({PERMANENT: b"two"})
    unlocked.release()
    with pytest.raises(StoreError, match="not locked"):
        unlocked.commit({PERMANENT: b"three"})
    unlocked.close()
    assert locked.load(PERMANENT) == b"two" or uri.startswith("file")
    locked.close()


# -- the backup (the names and the order of preference are those of swtpm 0.11's nvstore_dir)

BACKUP = FileOptions(backup=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With permanent state `two`, of which `one` is the backup."""
    store = open_directory(tmp_path / "state", create=True, options=BACKUP)
    store.commit({PERMANENT: b"one"})
    assert not (tmp_path / "state" / "tpm2-00.permall.bak").exists()
    store.commit({PERMANENT: b"two", VOLATILE: b"v"})
    store.commit({VOLATILE: None})
    store.close()
    return tmp_path / "state"


def held(directory: Path) -> dict[str, bytes]:
    return {name: decode_file(data, name) for name, data in contents(directory).items()}


def test_the_backup_is_the_permanent_state_before(directory: Path) -> None:
    assert held(directory) == {"tpm2-00.permall": b"two", "tpm2-00.permall.bak": b"one"}
    store = open_directory(directory, create=False)
    store.commit({PERMANENT: b"three"})
    store.close()
    assert held(directory) == {"tpm2-00.permall": b"three", "tpm2-00.permall.bak": b"one"}, "not asked for"


def test_a_missing_state_is_replaced_by_its_backup(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "tpm2-00.permall").unlink()
    with pytest.raises(StateDamagedError, match=r"permall is missing while tpm2-00\.permall\.bak is there"):
        open_directory(directory, create=True)
    store = open_directory(directory, create=False, options=BACKUP)
    assert store.load(PERMANENT) == b"one"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "may be older" in caplog.text
    store.close()
    assert held(directory) == {"tpm2-00.permall": b"one"}


def test_a_damaged_state_is_replaced_by_its_backup(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "tpm2-00.permall").write_bytes(b"damaged")
    store = open_directory(directory, create=False)
    with pytest.raises(StateDamagedError):
        store.load(PERMANENT)
    store.close()
    store = open_directory(directory, create=False, options=BACKUP)
    assert store.load(PERMANENT) == b"one"
    assert "the last change to the TPM is lost" in caplog.text
    store.close()
    assert (directory / "tpm2-00.permall.bak").read_bytes() == b"damaged"
    assert sorted(contents(directory)) == ["tpm2-00.permall", "tpm2-00.permall.bak"]


def damage_both(directory: Path) -> None:
    (directory / "tpm2-00.permall").write_bytes(b"damaged")
    (directory / "tpm2-00.permall.bak").write_bytes(b"damaged, too")


def damage_it_and_have_no_backup(directory: Path) -> None:
    (directory / "tpm2-00.permall").write_bytes(b"damaged")
    (directory / "tpm2-00.permall.bak").unlink()


@pytest.mark.parametrize("spoil", [damage_both, damage_it_and_have_no_backup])
def test_where_the_backup_is_of_no_use_all_stays_as_it_was(directory: Path, spoil: Callable[[Path], None]) -> None:
    spoil(directory)
    before = contents(directory)
    store = open_directory(directory, create=True, options=BACKUP)
    with pytest.raises(StateDamagedError, match=r"tpm2-00\.permall"):
        store.load(PERMANENT)
    store.close()
    assert contents(directory) == before


def test_a_missing_key_is_no_damage(directory: Path) -> None:
    store = open_directory(directory, create=False, key=KEY, options=BACKUP)
    with pytest.raises(StateUnsealedError):
        store.load(PERMANENT)
    store.close()
    assert held(directory) == {"tpm2-00.permall": b"two", "tpm2-00.permall.bak": b"one"}


def test_a_state_that_the_engine_rejects_can_be_swapped_and_swapped_back(directory: Path) -> None:
    store = DirectoryStore(directory, create=False, options=BACKUP)
    store.lock()
    assert store.swap_backup()
    assert held(directory) == {"tpm2-00.permall": b"one", "tpm2-00.permall.bak": b"two"}
    assert store.load(PERMANENT) == b"one"
    assert store.swap_backup()
    assert held(directory) == {"tpm2-00.permall": b"two", "tpm2-00.permall.bak": b"one"}
    store.close()
    without = open_directory(directory, create=False)
    assert not without.swap_backup()
    without.close()


def test_a_linear_file_keeps_what_it_does_not_rewrite_encrypted(tmp_path: Path) -> None:
    uri = f"file://{tmp_path / 'state'}"
    made(uri, KEY)
    store = open_backend(uri, create=False, swtpm_key=KEY)
    store.commit({VOLATILE: None})
    store.close()
    data = (tmp_path / "state").read_bytes()
    section = decode_head(data[:192], "it")[PERMANENT]
    assert decode_file(data[section.offset :][: section.length], "it", KEY) == b"one"
