"""`crbd state` and `crbd check` as processes: beside a daemon, and on what a daemon left."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from crbd.store.document import FILE_NAME
from tests.engine import commands as c

from .process import CRBD, PATIENCE, ask, crbd, end, serving
from .states import golden, put

pytestmark = pytest.mark.slow


def options(place: Path) -> list[str]:
    return ["--state", f"{place}/state", "--data", f"unix:{place}/data", "--flags", "startup-clear"]


def test_a_daemons_state_is_refused_while_it_runs_and_served_again_afterwards(tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out"
    with serving(tmp_path, *options(tmp_path), "--create", "--name", "vm1") as process:
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 10 + 5 + 4)) == c.SUCCESS
        commands: list[list[str | Path]] = [
            ["check", state],
            ["state", "inspect", state],
            ["state", "export", state, "--out", out],
            ["state", "rollback", state, "--allow-rollback"],
            ["state", "upgrade", state],
            ["state", "prune", state],
            ["state", "convert", state, "--to", "swtpm", "--out", out],
        ]
        for arguments in commands:
            done = crbd(*arguments)
            assert done.returncode == 15, done
            assert done.stderr.count("\n") == 1
            assert f"in use by process {process.pid}" in done.stderr
        assert end(process) == (0, "")
    assert not out.exists()
    assert crbd("check", state).returncode == 0
    assert json.loads(crbd("state", "inspect", state, "--json").stdout)["current"]["name"] == "vm1"
    assert crbd("state", "export", state, "--out", out).returncode == 0
    assert crbd("state", "convert", state, "--to", "swtpm", "--in-place").returncode == 0
    with serving(tmp_path, *options(tmp_path)) as process:
        assert ask(tmp_path / "data", c.nv_define(8), 10)[6:] == bytes.fromhex("0000014c"), "TPM_RC_NV_DEFINED"
        assert end(process) == (0, "")


def test_a_slot_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    put(tmp_path / "state", golden(2), golden(3))
    with (tmp_path / "state" / FILE_NAME).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    done = crbd("check", tmp_path / "state")
    assert done.returncode == 0
    assert done.stderr.startswith("crbd: WARNING: ")
    assert "generation 3 may have been lost" not in done.stdout
    assert done.stdout.count("\n") == done.stderr.count("\n") == 1


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    put(tmp_path / "one", golden(1))
    put(tmp_path / "two", golden(1))
    ours, terminal = os.openpty()
    command = [*CRBD, "state", "upgrade", str(tmp_path / "one"), str(tmp_path / "two")]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=PATIENCE)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(terminal)
        os.close(ours)
    assert f"1 of 2: {tmp_path}/one" in shown
    assert f"2 of 2: {tmp_path}/two" in shown
    assert shown.endswith("\r\x1b[K"), "nothing of it stays"
    assert done.stdout.endswith("2 upgraded\n")


def test_help() -> None:
    done = crbd("state", "--help")
    assert done.returncode == 0
    assert "snapshot and restore also work on a running one" in " ".join(done.stdout.split())
    names = ("inspect", "verify", "export", "import", "convert", "clone", "rekey", "rollback", "restore", "upgrade")
    for name in (*names, "prune", "snapshot"):
        assert f"\n    {name} " in done.stdout
        assert crbd("state", name, "--help").returncode == 0
    assert crbd("state").returncode == 2
    assert crbd("state", "nonsense").returncode == 2
