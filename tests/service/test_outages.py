"""A disk that refuses: the guest is told, memory and disk stay one, the operator hears of it once, and it passes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from crbd.engine.fake import FakeEngine
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from crbd.store.layout import Layout, open_state
from crbd.store.port import Store
from tests.engine import commands as c

from .instances import CREATE
from .storage import full_disk

WRITES = ("pwrite", "pwritev", "write", "fsync", "fdatasync")


@contextmanager
def failing(number: int, *calls: str) -> Iterator[None]:
    """The operating system refuses these calls."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        for call in calls:
            patch.setattr(os, call, refuse)
        yield


@contextmanager
def vanished(directory: Path) -> Iterator[None]:
    """The directory is away, and comes back."""
    aside = directory.with_name("aside")
    directory.rename(aside)
    try:
        yield
    finally:
        if directory.exists():
            shutil.rmtree(directory)
        aside.rename(directory)


OUTAGES: dict[str, Callable[[Path], AbstractContextManager[None]]] = {
    "ENOSPC": lambda _: failing(errno.ENOSPC, *WRITES, "open"),
    "EIO, at the sync": lambda _: failing(errno.EIO, "fsync", "fdatasync"),
    "EROFS": lambda _: failing(errno.EROFS, *WRITES, "open", "rename", "link", "unlink", "replace"),
    "EFBIG": lambda _: full_disk(),
    "the directory vanishes": vanished,
}


def permanent(store: Store) -> bytes | None:
    return store.load(StateKind.PERMANENT)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage(tmp_path: Path, layout: Layout, outage: str, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "home"
    home.mkdir()
    where = home / "tpm"
    store = open_state(where, create=True, layout=layout)
    instance = Instance(FakeEngine, store, CREATE)
    instance.init(delete_volatile=False)
    for command in (c.STARTUP_CLEAR, c.nv_define(8), c.nv_write(b"before..")):
        assert c.code(instance.execute(command)) == c.SUCCESS
    before = permanent(store)
    caplog.clear()
    engine = instance._engine
    assert isinstance(engine, FakeEngine)
    with OUTAGES[outage](home):
        assert c.code(instance.execute(c.nv_write(b"during.."))) == c.FAILURE
        ran = len(engine.log)
        for _ in range(3):
            assert c.code(instance.execute(c.nv_read(8))) == c.FAILURE
            assert c.code(instance.execute(c.pcr_extend(16, bytes(32)))) == c.FAILURE
        assert len(engine.log) == ran, "memory went on from what is not on disk"
        (said,) = [record.message for record in caplog.records]
        assert str(home) in said
        assert "TPM_RC_FAILURE" in said
    caplog.clear()
    assert c.nv_value(instance.execute(c.nv_read(8))) == b"during.."
    assert permanent(store) not in (None, before)
    assert [record.message for record in caplog.records] == [
        f"{store.name} takes writes again, and all that the TPM changed is stored"
    ]
    instance.close()
    again = Instance(FakeEngine, open_state(where, create=False), InstanceOptions())
    again.init(delete_volatile=False)
    assert c.code(again.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    assert c.nv_value(again.execute(c.nv_read(8))) == b"during.."
    again.close()


def test_another_reason_is_another_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_state(tmp_path, create=True)
    instance = Instance(FakeEngine, store, CREATE)
    instance.init(delete_volatile=False)
    assert c.code(instance.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    for number in (errno.ENOSPC, errno.ENOSPC, errno.EIO, errno.EIO):
        with failing(number, "pwritev", "fdatasync"):
            assert c.code(instance.execute(c.nv_define(8))) == c.FAILURE
    assert [os.strerror(errno.ENOSPC) in record.message for record in caplog.records] == [True, False]
    instance.close()
