"""What a start finds and says: a TPM that was not shut down, one whose backup has to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import StateDamagedError
from crbd.service.instance import Instance
from crbd.service.options import CheckpointPolicy, InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.state.swtpm import encode_file
from crbd.store.directory import open_directory
from crbd.store.layout import Layout, open_state
from crbd.store.options import FileOptions
from crbd.store.port import Store
from tests.engine import commands as c

CREATE = InstanceOptions(may_manufacture=True)
BACKUP = FileOptions(backup=True)
Open = Callable[[], Store]
LIVES: list[Instance] = []


@pytest.fixture(autouse=True)
def _end() -> Iterator[None]:
    yield
    while LIVES:
        die(LIVES[-1])


def die(instance: Instance) -> None:
    """As by SIGKILL."""
    LIVES.remove(instance)
    instance._engine.close()
    instance._store.close()


def live(store: Store, options: InstanceOptions = CREATE) -> Instance:
    instance = Instance(LibtpmsEngine, store, options)
    LIVES.append(instance)
    instance.check()
    return instance


def started(store: Store, options: InstanceOptions = CREATE) -> Instance:
    instance = live(store, options)
    instance.init(delete_volatile=False)
    assert c.code(instance.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    return instance


def close(instance: Instance) -> None:
    LIVES.remove(instance)
    instance.close()


@pytest.fixture(params=list(Layout))
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    layout: Layout = request.param
    where = tmp_path / "tpm" if layout is Layout.LINEAR else tmp_path
    return lambda: open_state(where, create=True, layout=layout)


def test_a_tpm_that_was_not_shut_down_is_told_of(opening: Open, caplog: pytest.LogCaptureFixture) -> None:
    first = started(opening())
    commits = first._state.commits
    die(first)
    second = live(opening())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "was not shut down (last written 2" in record.message
    assert "volatile state (PCRs, sessions, loaded objects) is lost" in record.message
    assert second._state.commits == 0 < commits, "looking changes nothing"
    second.init(delete_volatile=False)
    assert c.code(second.execute(c.pcr_read(16))) == c.INITIALIZE
    assert c.code(second.execute(c.STARTUP_CLEAR)) == c.SUCCESS


def test_one_that_was_shut_down_is_not(opening: Open, caplog: pytest.LogCaptureFixture) -> None:
    first = started(opening())
    close(first)
    for _ in range(2):
        die(live(opening()))
    close(started(opening()))
    die(live(opening()))
    assert not caplog.records


def test_nor_is_a_new_one(opening: Open, caplog: pytest.LogCaptureFixture) -> None:
    first = live(opening())
    first.init(delete_volatile=False)
    die(first)
    live(opening())
    assert not caplog.records


def test_what_follows_is_told(opening: Open, caplog: pytest.LogCaptureFixture) -> None:
    first = started(opening())
    first.store_volatile()
    die(first)
    live(opening())
    assert "goes on from the volatile state that was stored" in caplog.text


@pytest.mark.parametrize(
    ("startup", "said"),
    [(Startup.POWER_ON, "goes on from its checkpoint, as of its last command"), (Startup.NEED_INIT, "INIT resets it")],
)
def test_a_checkpoint_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, startup: Startup, said: str) -> None:
    every = replace(CREATE, checkpoint=CheckpointPolicy(every_command=True))
    die(started(open_state(tmp_path, create=True), every))
    die(live(open_state(tmp_path, create=False), replace(every, startup=startup)))
    assert said in caplog.text


# -- swtpm's backup


@pytest.fixture
def backed_up(tmp_path: Path) -> Path:
    """A directory with a TPM that has an NV index, and the backup from before that."""
    instance = started(open_directory(tmp_path, create=True, options=BACKUP))
    assert c.code(instance.execute(c.nv_define(8))) == c.SUCCESS
    die(instance)
    assert (tmp_path / "tpm2-00.permall.bak").exists()
    return tmp_path


def test_the_backup_takes_the_place_of_what_libtpms_rejects(backed_up: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, backup = backed_up / "tpm2-00.permall", backed_up / "tpm2-00.permall.bak"
    rejected, older = encode_file(b"well formed, and no TPM at all", None), backup.read_bytes()
    state.write_bytes(rejected)
    instance = live(open_directory(backed_up, create=False, options=BACKUP))
    assert "its backup took its place" in caplog.text
    assert (state.read_bytes(), backup.read_bytes()) == (older, rejected)
    instance.init(delete_volatile=False)
    assert c.code(instance.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    assert c.code(instance.execute(c.nv_define(8))) == c.SUCCESS, "it is the TPM before the index"


def test_volatile_state_of_what_was_rejected_goes_too(backed_up: Path) -> None:
    instance = started(open_directory(backed_up, create=False, options=BACKUP))
    instance.store_volatile()
    die(instance)
    (backed_up / "tpm2-00.permall").write_bytes(encode_file(b"well formed, and no TPM at all", None))
    live(open_directory(backed_up, create=False, options=BACKUP))
    assert not (backed_up / "tpm2-00.volatilestate").exists()


def test_a_backup_that_is_no_better_stays_a_backup(backed_up: Path) -> None:
    state, backup = backed_up / "tpm2-00.permall", backed_up / "tpm2-00.permall.bak"
    for path, text in ((state, b"no TPM at all"), (backup, b"nor this")):
        path.write_bytes(encode_file(text, None))
    before = state.read_bytes(), backup.read_bytes()
    with pytest.raises(StateDamagedError, match="rejects the permanent state"):
        live(open_directory(backed_up, create=False, options=BACKUP))
    assert (state.read_bytes(), backup.read_bytes()) == before


def test_without_the_option_a_backup_is_left_alone(backed_up: Path) -> None:
    (backed_up / "tpm2-00.permall").write_bytes(encode_file(b"no TPM at all", None))
    with pytest.raises(StateDamagedError, match="rejects the permanent state"):
        live(open_state(backed_up, create=False))


def test_state_that_is_there_and_volatile_state_that_is_not_its_own(tmp_path: Path) -> None:
    """Looking at a TPM puts the question to its permanent state alone."""
    instance = started(open_state(tmp_path, create=True))
    instance.store_volatile()
    kept = instance._store.load(StateKind.VOLATILE)
    die(instance)
    again = live(open_state(tmp_path, create=False))
    assert again._store.load(StateKind.VOLATILE) == kept
