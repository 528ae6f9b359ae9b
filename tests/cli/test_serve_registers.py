"""`crbd serve --registers`: where it listens, who powers the TPM on, and what does not go together."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.engine import commands as c
from tests.vfiouser import client
from tests.vfiouser.vmm import Vmm

from .process import crbd, end, serving

FORMS = ["vfio-user", "vfio-user:", "unix:/tmp/there", "vfio-user:/tmp/there,mode=9"]


def test_alone_it_powers_the_tpm_on_and_keeps_its_state(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--state", tmp_path / "state", "--registers", f"vfio-user:{tmp_path / 'registers'}"]
    for round_trip in range(2):
        with serving(tmp_path, *arguments, *(["--create"] if not round_trip else [])) as process:
            assert stat.S_IMODE((tmp_path / "registers").stat().st_mode) == 0o600
            with Vmm(tmp_path / "registers") as vmm:
                assert vmm.ask(client.version(1)).errno is None
                # Before any reset: it is on by itself.
                assert c.code(vmm.run(c.STARTUP_CLEAR)) == c.SUCCESS
                if not round_trip:
                    assert c.code(vmm.run(c.nv_define(8))) == c.SUCCESS
                    assert c.code(vmm.run(c.nv_write(b"12345678"))) == c.SUCCESS
                assert c.nv_value(vmm.run(c.nv_read(8))) == b"12345678"
            assert end(process)[0] == 0
        assert not (tmp_path / "registers").exists()


def test_a_killed_daemon_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--state", tmp_path / "state", "--create"]
    arguments += ["--registers", f"vfio-user:{tmp_path / 'registers'}"]
    with serving(tmp_path, *arguments) as process, Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        assert c.code(vmm.run(c.nv_define(8))) == c.SUCCESS
        assert c.code(vmm.run(c.nv_write(b"12345678"))) == c.SUCCESS
        process.kill()
        process.wait()
        with pytest.raises((EOFError, ConnectionError)):
            vmm.get(0)
    (tmp_path / "pid").unlink()
    with serving(tmp_path, *arguments), Vmm(tmp_path / "registers") as vmm:
        vmm.boot()
        assert c.nv_value(vmm.run(c.nv_read(8))) == b"12345678"


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_none(form: str) -> None:
    done = crbd("serve", "--ephemeral", "--registers", form)
    assert done.returncode == 2
    assert "--registers" in done.stderr
    assert done.stderr.count("\n") == 1


def test_migration_is_refused(tmp_path: Path) -> None:
    arguments = ["--ctrl", f"unix:{tmp_path / 'ctrl'}", "--registers", f"vfio-user:{tmp_path / 'registers'}"]
    done = crbd("serve", "--ephemeral", *arguments, "--migration", "incoming")
    assert done.returncode == 2
    assert "--migration is for --ctrl" in done.stderr
