"""Debian's swtpm before and after `crbd state convert`: its TPM becomes crbd's and its own again, whatever the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.daemon import fresh_directory
from tests.engine import commands as c
from tests.state.test_swtpm_oracle import FORMS, THEIRS, mark, option, swtpm

from .states import crbd, key_file, state

pytestmark = pytest.mark.e2e


@pytest.fixture
def directory() -> Iterator[Path]:
    with fresh_directory() as path:
        yield path


@pytest.mark.parametrize("form", [None, *FORMS])
def test_swtpms_tpm_there_and_back_again(directory: Path, form: str | None) -> None:
    theirs, back = directory / "theirs", directory / "back"
    theirs.mkdir()
    options = option(theirs, "--key", form)
    with swtpm(theirs, *options) as process:
        process.power_on()
        mark(process, THEIRS, define=True)
        process.off()
    ours = ["--swtpm-key", options[1]] if options else []
    sealing = key_file(directory)
    state("convert", theirs, "--to", "crbd", "--out", directory / "ours", "--new-key", sealing, *ours)
    assert crbd("check", directory / "ours", "--key", sealing).status == 0
    plain = [] if ours else ["--plain"]
    state("convert", directory / "ours", "--to", "swtpm", "--out", back, "--key", sealing, *ours, *plain)
    for place in (theirs, back):
        with swtpm(place, *options) as process:
            process.power_on()
            assert c.nv_value(process.execute(c.nv_read(len(THEIRS)))) == THEIRS
            process.off()


def test_swtpms_directory_in_place(directory: Path) -> None:
    with swtpm(directory) as process:
        process.power_on()
        mark(process, THEIRS, define=True)
        process.off()
    state("convert", directory, "--to", "crbd", "--in-place")
    state("prune", directory)
    state("convert", directory, "--to", "swtpm", "--in-place")
    with swtpm(directory) as process:
        process.power_on()
        assert c.nv_value(process.execute(c.nv_read(len(THEIRS)))) == THEIRS
        process.off()
