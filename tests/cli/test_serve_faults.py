"""`crbd serve --faults`: a TPM that fails on purpose, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import commands as c

from .process import ask, crbd, end, serving

LOCKOUT = 0x921


def options(place: Path) -> list[str]:
    state = ["--state", f"{place}/state", "--create"]
    return [*state, "--ctrl", f"unix:{place}/ctrl", "--data", f"unix:{place}/data", "--flags", "startup-clear"]


def test_commands_fail_as_they_are_told_to(tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.write_text("# all but what crbd sends itself\n*:2=lockout\nstore:1=enospc\n")
    with serving(tmp_path, *options(tmp_path), "--faults", str(faults)) as process:
        data = tmp_path / "data"
        assert len(ask(data, c.GET_RANDOM, 28)) == 28
        assert c.code(ask(data, c.GET_RANDOM, 10)) == LOCKOUT
        assert c.code(ask(data, c.nv_define(8), 10)) == c.FAILURE
        assert len(ask(data, c.GET_RANDOM, 28)) == 28
        status, said = end(process)
    assert status == 0
    assert f"{faults}: this TPM fails on purpose, in 2 ways" in said
    assert "No space left on device (an injected fault)" in said
    with serving(tmp_path, *options(tmp_path)) as process:
        assert len(ask(tmp_path / "data", c.GET_RANDOM, 28)) == 28
        assert c.code(ask(tmp_path / "data", c.nv_define(8), 10)) == 0x14C, "defined, and stored after all"
        assert end(process) == (0, "")


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ("GetRandom:1=", "--faults: 'GetRandom:1=' is no fault"),
        ("absent", "--faults absent: No such file or directory"),
    ],
)
def test_what_is_no_fault_ends_the_start(tmp_path: Path, faults: str, said: str) -> None:
    done = crbd("serve", *options(tmp_path), "--faults", faults)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
