"""`crbd state upgrade` and `prune`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from crbd.state.document import decode, verify
from crbd.state.keys import RawKey
from crbd.store.document import FILE_NAME
from crbd.store.lockfile import LockFile
from tests.state import samples as s

from .states import blobs, contents, crbd, document, golden, held, key_file, put, put_swtpm, refuse, state


@pytest.mark.parametrize("version", [1, 2])
def test_upgrade(tmp_path: Path, version: int) -> None:
    made = put(tmp_path / "tpm", golden(version))
    assert f"from format version {version} to 3" in state("upgrade", made)
    assert verify(held(made)).format_version == 3
    assert (made / f"tpm.crbd.format-{version}").read_bytes() == golden(version)
    assert (made / f"tpm.crbd.format-{version}").stat().st_mode & 0o777 == 0o600
    old, new = decode(golden(version)), document(made)
    assert new.identity.generation == old.identity.generation + 1
    assert (blobs(new), new.crb, new.session) == (blobs(old), old.crb, old.session)
    before = contents(made)
    assert "already" in state("upgrade", made)
    assert contents(made) == before


def test_upgrade_of_sealed_state(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(1, "sealed"))
    done = crbd("state", "upgrade", made)
    assert (done.status, done.err.count("\n")) == (14, 1)
    assert list(contents(made)) == [FILE_NAME]
    state("upgrade", made, "--key", key_file(tmp_path))
    assert blobs(document(made, s.KEY)) == blobs(decode(golden(1)))
    assert decode(held(made), [s.passphrase()]) == decode(held(made), [RawKey(s.KEY)]), "all key slots stay"


def fleet(place: Path) -> list[Path]:
    put(place / "one", golden(1))
    put(place / "damaged", golden(1)[:-1])
    put(place / "two", golden(2))
    put(place / "new", golden(3))
    put_swtpm(place / "swtpm")
    put(place / "sealed", golden(2, "sealed"))
    put(place / "locked", golden(2))
    return [place / name for name in ("one", "damaged", "two", "new", "swtpm", "sealed", "locked", "absent")]


def test_a_fleet_goes_on_after_errors_and_ends_with_the_highest_code(tmp_path: Path) -> None:
    directories = fleet(tmp_path)
    lock = LockFile.acquire(tmp_path / "locked" / ".lock")
    done = crbd("state", "upgrade", *directories)
    lock.release()
    assert done.status == 15
    assert done.out.splitlines()[-1] == "2 upgraded, 1 up to date, 1 in swtpm's layout, 4 failed"
    assert len(done.out.splitlines()) == 5
    errors = done.err.splitlines()
    assert len(errors) == 4
    assert all(line.startswith("crbd: ") for line in errors)
    assert verify(held(tmp_path / "two")).format_version == 3
    assert held(tmp_path / "sealed") == golden(2, "sealed")
    assert held(tmp_path / "damaged") == golden(1)[:-1]


def test_a_fleet_as_json(tmp_path: Path) -> None:
    done = crbd("state", "upgrade", "--json", *fleet(tmp_path))
    assert done.status == 14
    shown = json.loads(done.out)
    assert shown["summary"] == {"upgraded": 3, "current": 1, "swtpm": 1, "failed": 3}
    results = {Path(entry["directory"]).name: (entry["result"], entry["status"]) for entry in shown["directories"]}
    assert results["one"] == ("upgraded", 0)
    assert results["damaged"] == ("failed", 12)
    assert results["sealed"] == ("failed", 14)
    assert results["absent"] == ("failed", 11)
    assert all(entry["detail"] for entry in shown["directories"])


def test_an_old_document_that_cannot_be_kept_is_not_written_over(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(1))
    (made / ".tpm.crbd.format-1.new").mkdir()
    before = contents(made)
    assert crbd("state", "upgrade", made).status == 16
    assert contents(made) == before


def test_prune_removes_what_was_kept_and_nothing_else(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3))
    kept = [
        ".tpm.crbd.converting.new",
        "tpm.crbd.before-convert",
        "tpm.crbd.converting",
        "tpm.crbd.format-1",
        "tpm.crbd.format-12",
    ]
    others = ["tpm.crbd.format-x", "tpm.crbd.format-", "notes", "before-convert"]
    for name in (*kept, *others):
        (made / name).write_bytes(b"")
    said = state("prune", made)
    assert said.splitlines() == [f"{made / name}: removed" for name in kept]
    assert sorted(contents(made)) == sorted([FILE_NAME, *others])
    assert "nothing to remove" in state("prune", made)
    swtpm = put_swtpm(tmp_path / "swtpm")
    (swtpm / "tpm.crbd.before-convert").write_bytes(b"")
    assert "removed" in state("prune", swtpm)
    assert sorted(contents(swtpm)) == ["tpm2-00.permall", "tpm2-00.volatilestate"]


def test_prune_leaves_all_where_the_state_itself_is_not_whole(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3)[:-1])
    (made / "tpm.crbd.format-1").write_bytes(golden(1))
    refuse(12, "cut short", "state", "prune", made, untouched=tmp_path)
    swtpm = put_swtpm(tmp_path / "swtpm")
    (swtpm / "tpm.crbd.before-convert").write_bytes(b"")
    (swtpm / "tpm2-00.permall").write_bytes(b"cut")
    refuse(12, "cut short", "state", "prune", swtpm, untouched=tmp_path)
    os.unlink(swtpm / "tpm2-00.permall")
    refuse(12, "is missing", "state", "prune", swtpm, untouched=tmp_path)
    refuse(11, "no TPM state", "state", "prune", tmp_path / "absent")
