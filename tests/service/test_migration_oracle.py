"""Debian's swtpm takes our blobs as they are, with the tag that it does not know; and we take its."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.control import messages as m
from crbd.service.control import ControlService
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.swtpm import open_migration
from tests.e2e.daemon import fresh_directory
from tests.engine import commands as c
from tests.state.test_swtpm_oracle import DECRYPTED, Swtpm, key_of, option, swtpm

from .instances import Real

pytestmark = pytest.mark.e2e

DELETE = m.InitFlag.DELETE_VOLATILE
KINDS = (StateKind.PERMANENT, StateKind.VOLATILE)
KEYS = [(None, None), ("hex", None), (None, "hex"), ("hex", "pbkdf2"), ("hex 256", "sha512 256")]
"""Migration key and file key (swtpm 0.7 cannot have two lengths in one process)."""


@pytest.fixture
def directory() -> Iterator[Path]:
    with fresh_directory() as path:
        yield path


def value_of(execute: Swtpm | Real) -> bytes:
    answer = execute.execute(c.pcr_read(16)) if isinstance(execute, Swtpm) else execute.run(c.pcr_read(16))
    return c.pcr_value(answer)


@pytest.mark.parametrize("flags", [DECRYPTED, m.StateFlag(0)])
@pytest.mark.parametrize(("migration", "file"), KEYS)
def test_there_and_back(directory: Path, migration: str | None, file: str | None, flags: m.StateFlag) -> None:
    options = InstanceOptions(may_manufacture=True, migration_key=key_of(migration), file_key=key_of(file))
    ours = Real(options)
    service = ControlService(ours.instance)
    assert service.answer(m.Init(m.InitFlag(0))) == m.Done()
    ours.run(c.STARTUP_CLEAR)
    ours.run(c.pcr_extend(16, b"\x11" * 32))
    assert service.answer(m.SetLocality(3)) == m.Done()
    value = value_of(ours)
    blobs = {kind: service.answer(m.GetStateBlob(flags, kind, 0)) for kind in KINDS}
    volatile = blobs[StateKind.VOLATILE]
    assert isinstance(volatile, m.StateBlob)
    carried = open_migration(volatile.data, "blob", key_of(migration), key_of(file)).session
    assert carried == Session(3, 4096, False, 0x17E), "the tag is there that swtpm must skip"

    keys = option(directory, "--migration-key", migration) + option(directory, "--key", file)
    with swtpm(directory, *keys) as theirs:
        for kind, blob in blobs.items():
            assert isinstance(blob, m.StateBlob)
            assert theirs.oracle.ask(m.SetStateBlob(blob.flags, kind, blob.data)) == m.Done()
        assert theirs.oracle.ask(m.Init(DELETE)) == m.Done()
        assert value_of(theirs) == value
        assert c.code(theirs.execute(c.pcr_extend(16, b"\x22" * 32))) == c.SUCCESS
        value = value_of(theirs)

        assert service.answer(m.Stop()) == m.Done()
        for kind in KINDS:
            blob = theirs.oracle.ask(m.GetStateBlob(flags, kind, 0))
            assert isinstance(blob, m.StateBlob)
            assert blob.result == 0
            assert service.answer(m.SetStateBlob(blob.flags, kind, blob.data)) == m.Done()
        theirs.off()
    assert service.answer(m.Init(DELETE)) == m.Done()
    assert value_of(ours) == value
    ours.instance.close()
