"""What a directory in swtpm's layout adds to test_store_contract: files, modes, locks, errors that name the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateForeignError,
    StateLockedError,
    StateSealedError,
    StoreError,
)
from crbd.state.kinds import StateKind
from crbd.store.directory import DirectoryStore, open_directory

PERMANENT, VOLATILE = StateKind.PERMANENT, StateKind.VOLATILE
AS_ROOT = os.geteuid() == 0


def test_files_and_modes(tmp_path: Path) -> None:
    store = open_directory(tmp_path / "state", create=True)
    store.commit({PERMANENT: b"one"})
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert files == {".lock": 0o600, "tpm2-00.permall": 0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    store.close()
    again = open_directory(tmp_path / "state", create=False)
    assert again.load(PERMANENT) == b"one"
    again.close()


def test_a_leftover_of_an_interrupted_commit_means_nothing(tmp_path: Path) -> None:
    (tmp_path / ".tpm2-00.permall.new").write_bytes(b"half")
    store = open_directory(tmp_path, create=False)
    assert store.load(PERMANENT) is None
    store.commit({PERMANENT: b"whole"})
    assert store.load(PERMANENT) == b"whole"
    assert not (tmp_path / ".tpm2-00.permall.new").exists()
    store.close()


def test_absent_directory(tmp_path: Path) -> None:
    with pytest.raises(StateAbsentError, match="--create"):
        open_directory(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StateAccessError, match="cannot be made"):
        open_directory(tmp_path / "no" / "where", create=True)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateAccessError, match="file cannot be opened"):
        open_directory(tmp_path / "file", create=False)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", StateDamagedError),
        (b"garbage and more", StateDamagedError),
        (b"\x02\x01\x00\x0a\x00\x01\x00\x00\x00\x0a", StateSealedError),
    ],
)
def test_unreadable_state_is_an_error_that_names_the_file(
    tmp_path: Path, content: bytes, error: type[Exception]
) -> None:
    path = tmp_path / "tpm2-00.permall"
    path.write_bytes(content)
    store = open_directory(tmp_path, create=True)
    with pytest.raises(error, match=r"tpm2-00\.permall"):
        store.load(PERMANENT)
    store.close()
    assert path.read_bytes() == content


def test_an_oversized_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "tpm2-00.permall").open("wb") as file:
        file.truncate(1 << 40)
    store = open_directory(tmp_path, create=False)
    with pytest.raises(StateDamagedError, match="more than any"):
        store.load(PERMANENT)
    store.close()


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").mkdir()
    for create in (False, True):
        with pytest.raises(StateForeignError, match="permall is no file: it is a directory"):
            open_directory(tmp_path, create=create)


def test_volatile_state_without_its_permanent_state_is_damage(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.volatilestate").write_bytes(b"x")
    with pytest.raises(StateDamagedError, match=r"permall is missing"):
        open_directory(tmp_path, create=True)
    # The refusal released its lock.
    (tmp_path / "tpm2-00.volatilestate").unlink()
    open_directory(tmp_path, create=True).close()


def test_a_failed_commit_leaves_the_old_state(tmp_path: Path) -> None:
    store = open_directory(tmp_path / "state", create=True)
    store.commit({PERMANENT: b"old"})
    # A directory where the temporary file should be: not even root can open that for writing.
    (tmp_path / "state" / ".tpm2-00.permall.new").mkdir()
    with pytest.raises(StoreError):
        store.commit({PERMANENT: b"new"})
    assert store.load(PERMANENT) == b"old"
    (tmp_path / "state" / ".tpm2-00.permall.new").rmdir()
    store.commit({PERMANENT: b"new"})
    assert store.load(PERMANENT) == b"new"
    store.close()


HOLD_AS_SWTPM = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def test_locked_by_another_crbd(tmp_path: Path) -> None:
    first = open_directory(tmp_path, create=False)
    with pytest.raises(StateLockedError, match=f"in use by process {os.getpid()}"):
        open_directory(tmp_path, create=False)
    first.close()
    open_directory(tmp_path, create=False).close()


def test_locked_by_a_process_that_locks_as_swtpm_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_AS_SWTPM, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateLockedError, match=f"in use by process {holder.pid}"):
            open_directory(tmp_path, create=False)
        holder.stdin.close()
    open_directory(tmp_path, create=False).close()


@pytest.mark.skipif(AS_ROOT, reason="root may do everything")
def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateAccessError):
        open_directory(tmp_path, create=False)


def test_the_lock_file_is_not_followed_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(StateAccessError):
        open_directory(tmp_path, create=False)
    assert (tmp_path / "target").read_text() == "precious"


def test_a_store_that_was_not_opened_by_open_directory_can_be_closed(tmp_path: Path) -> None:
    DirectoryStore(tmp_path, create=False).close()
