"""State that is led elsewhere, goes, or is exchanged under a process that has it open: never taken for no state, and
never written over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateForeignError,
    StateLockedError,
    StoreError,
    StoreFencedError,
)
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.swtpm import decode_file
from crbd.store import lockfile
from crbd.store.directory import open_directory
from crbd.store.layout import Layout, open_state
from crbd.store.lockfile import LockFile
from crbd.store.options import FileOptions

PERMANENT, VOLATILE = StateKind.PERMANENT, StateKind.VOLATILE
FILE = "tpm2-00.permall"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With a TPM."""
    store = open_directory(tmp_path / "state", create=True)
    store.commit({PERMANENT: b"one"})
    store.close()
    return tmp_path / "state"


def on_disk(directory: Path) -> bytes:
    return decode_file((directory / FILE).read_bytes(), "the test")


# -- led elsewhere


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("target", ["nowhere", FILE, "elsewhere"], ids=["to nowhere", "in a circle", "to a TPM"])
def test_a_link_is_neither_absence_nor_state(directory: Path, target: str, create: bool) -> None:
    """What it leads to may be on a disk that is not there yet; and a commit would put a file in its place."""
    (directory / FILE).rename(directory.with_name("elsewhere"))
    (directory / FILE).symlink_to(directory.with_name(target) if target != FILE else target)
    with pytest.raises(StateForeignError, match=f"{FILE} is no file: it is a symbolic link"):
        open_directory(directory, create=create)
    assert (directory / FILE).is_symlink()


def test_a_link_of_volatile_state_is_not_absence(directory: Path) -> None:
    (directory / FILE).unlink()
    (directory / "tpm2-00.volatilestate").symlink_to("nowhere")
    with pytest.raises(StateDamagedError, match="volatilestate is there"):
        open_directory(directory, create=True)


def test_a_fifo_in_place_of_the_state_holds_nobody_up(directory: Path) -> None:
    (directory / FILE).unlink()
    os.mkfifo(directory / FILE)
    with pytest.raises(StateForeignError, match=f"{FILE} is no file"):
        open_directory(directory, create=False)


# -- gone


def test_state_that_vanishes_is_not_absent(directory: Path) -> None:
    store = open_directory(directory, create=True)
    (directory / FILE).unlink()
    with pytest.raises(StateAbsentError, match="is gone"):
        store.load(PERMANENT)
    # Nothing is there that could be overwritten, and this process has the newest state.
    store.commit({PERMANENT: b"two"})
    assert on_disk(directory) == b"two"
    store.close()


@pytest.mark.parametrize("layout", [Layout.CRBD, Layout.SWTPM])
@pytest.mark.parametrize(
    "left",
    ["tpm.crbd.before-convert", "swtpm.permall.before-convert", "tpm.crbd.converting", "tpm.crbd.format-1"],
)
def test_what_a_conversion_left_is_no_empty_directory(tmp_path: Path, left: str, layout: Layout) -> None:
    (tmp_path / left).write_bytes(b"a TPM")
    with pytest.raises(StateDamagedError, match=left):
        open_state(tmp_path, create=True, layout=layout)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == [left]


# -- exchanged


def replaced_directory(directory: Path) -> None:
    other = open_directory(directory.with_name("other"), create=True)
    other.commit({PERMANENT: b"another TPM"})
    other.close()
    directory.rename(directory.with_name("aside"))
    directory.with_name("other").rename(directory)


def restored_backup(directory: Path) -> None:
    """As `cp` does it: into the file that is there."""
    other = open_directory(directory.with_name("other"), create=True)
    other.commit({PERMANENT: b"another TPM"})
    other.close()
    (directory / FILE).write_bytes((directory.with_name("other") / FILE).read_bytes())


def another_process(directory: Path) -> None:
    """With the lock file out of the way, it is no hindrance."""
    (directory / ".lock").unlink()
    other = open_directory(directory, create=False)
    other.commit({PERMANENT: b"another TPM"})
    other.close()


@pytest.mark.parametrize("exchange", [replaced_directory, restored_backup, another_process])
@pytest.mark.parametrize("change", [{PERMANENT: b"two"}, {VOLATILE: b"v"}], ids=["permanent", "volatile"])
def test_what_another_put_there_is_not_written_over(
    directory: Path, exchange: Callable[[Path], None], change: dict[StateKind, bytes | None]
) -> None:
    store = open_directory(directory, create=False)
    store.commit({PERMANENT: b"one and a half"})
    exchange(directory)
    for _ in range(2):
        with pytest.raises(StoreFencedError, match="another"):
            store.commit(change)
    assert on_disk(directory) == b"another TPM"
    assert not (directory / "tpm2-00.volatilestate").exists()
    store.close()


def test_another_process_that_only_took_the_lock_fences_too(directory: Path) -> None:
    store = open_directory(directory, create=False)
    (directory / ".lock").unlink()
    other = open_directory(directory, create=False)
    with pytest.raises(StoreFencedError, match="lock"):
        store.commit({PERMANENT: b"two"})
    assert other.load(PERMANENT) == b"one"
    other.close()
    store.close()


def test_a_store_that_failed_half_way_is_not_fenced_by_its_own_write(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename was done and the directory not synced: the file is the new one, and the commit failed."""
    store = open_directory(directory, create=False)
    fsync, calls = os.fsync, []

    def fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", fails)
        with pytest.raises(StoreError, match="Input/output error"):
            store.commit({PERMANENT: b"two"})
    assert on_disk(directory) == b"two"
    store.commit({PERMANENT: b"three"})
    assert on_disk(directory) == b"three"
    store.close()


# -- the lock file


def test_the_lock_of_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes the lock file between its opening and its locking here: a third would lock a new one."""
    path = tmp_path / ".lock"
    path.touch()
    real = lockfile._set_lock
    removed: list[Path] = []

    def slow(descriptor: int, kind: int, name: Path) -> bool:
        if not removed:
            path.unlink()
            removed.append(path)
        return real(descriptor, kind, name)

    monkeypatch.setattr(lockfile, "_set_lock", slow)
    lock = LockFile.acquire(path)
    with pytest.raises(StateLockedError):
        LockFile.acquire(path)
    lock.release()


def test_a_full_disk_keeps_nobody_from_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the lock file is for messages alone."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    lock = LockFile.acquire(tmp_path / ".lock")
    with pytest.raises(StateLockedError, match="another process"):
        LockFile.acquire(tmp_path / ".lock")
    lock.release()
    LockFile.acquire(tmp_path / ".lock").release()


# -- the end of numbers


def test_a_document_with_the_last_generation_takes_no_commit(tmp_path: Path) -> None:
    store = open_state(tmp_path, create=True)
    store.use_engine(EngineStamp(0, 9, 2))
    store.commit({PERMANENT: b"one"})
    store.overtake(2**64 - 2)
    store.commit({PERMANENT: b"two"})
    with pytest.raises(StoreError, match="generation"):
        store.commit({PERMANENT: b"three"})
    assert store.load(PERMANENT) == b"two"
    store.close()


# -- permissions


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
def test_a_directory_that_may_not_be_searched_is_an_error(directory: Path) -> None:
    directory.chmod(0o600)
    try:
        with pytest.raises(StateAccessError, match=str(directory)):
            open_directory(directory, create=True, options=FileOptions(locking=False))
    finally:
        directory.chmod(0o700)


def test_a_disk_that_cannot_say_what_is_there_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.lstat

    def broken(path: str | Path) -> os.stat_result:
        if str(path).endswith(FILE):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "lstat", broken)
    with pytest.raises(StateAccessError, match=FILE):
        open_directory(directory, create=True)
