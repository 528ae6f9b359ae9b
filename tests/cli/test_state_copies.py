"""`crbd state export`, `import` and `clone`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from crbd.errors import StateWrongKeyError
from crbd.state.document import decode, verify
from crbd.state.keys import RawKey
from crbd.store.document import FILE_NAME
from tests.state import samples as s

from .states import GOLDEN, blobs, contents, crbd, document, golden, held, key_file, put, refuse, state


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return put(tmp_path / "tpm", golden(3))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_export_is_the_document_byte_for_byte(tmp_path: Path, made: Path) -> None:
    before = contents(made)
    assert "generation 3 of" in state("export", made, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == golden(3)
    assert mode(tmp_path / "out") == 0o600
    assert contents(made) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tpm"]


def test_export_never_over_a_file_unless_told(tmp_path: Path, made: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    refuse(10, "--force", "state", "export", made, "--out", tmp_path / "out", untouched=tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refuse(10, "--force", "state", "export", made, "--out", tmp_path / "dangling", untouched=tmp_path)
    state("export", made, "--out", tmp_path / "out", "--force")
    assert (tmp_path / "out").read_bytes() == golden(3)
    assert mode(tmp_path / "out") == 0o600
    refuse(16, "no/out", "state", "export", made, "--out", tmp_path / "no" / "out", untouched=tmp_path)


def test_export_that_cannot_be_written_leaves_no_file(tmp_path: Path, made: Path) -> None:
    (tmp_path / ".out.new").mkdir()
    refuse(16, "out cannot be written", "state", "export", made, "--out", tmp_path / "out", untouched=tmp_path)
    assert not (tmp_path / "out").exists()


def test_export_of_sealed_state_needs_no_key_and_stays_sealed(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3, "sealed"))
    state("export", made, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == golden(3, "sealed")
    wrong = ["--key", key_file(tmp_path, s.OTHER_KEY, "other")]
    refuse(40, "none", "state", "export", made, "--out", tmp_path / "out2", *wrong, untouched=tmp_path)


def test_export_in_an_older_format(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(2))
    state("export", made, "--out", tmp_path / "out", "--format-version", "1")
    data = (tmp_path / "out").read_bytes()
    assert verify(data).format_version == 1
    assert blobs(decode(data)) == blobs(decode(golden(2)))
    assert decode(data).crb == decode(golden(2)).crb
    assert decode(data).identity.uuid == s.UUID_A
    assert decode(data).identity.generation == 2


def test_export_in_an_older_format_where_something_would_be_lost(tmp_path: Path, made: Path) -> None:
    arguments: list[str | Path] = ["state", "export", made, "--out", tmp_path / "out", "--format-version"]
    refuse(42, "5 localities", *arguments, "2", untouched=tmp_path)
    refuse(2, "--format-version", *arguments, "4", untouched=tmp_path)


def test_export_of_sealed_state_in_an_older_format_needs_the_key(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(2, "sealed"))
    arguments: list[str | Path] = ["export", made, "--out", tmp_path / "out", "--format-version", "1"]
    refuse(14, "no key", "state", *arguments, untouched=tmp_path)
    state(*arguments, "--key", key_file(tmp_path))
    data = (tmp_path / "out").read_bytes()
    assert verify(data).sealed
    assert blobs(decode(data, [RawKey(s.KEY)])) == blobs(decode(golden(2)))


def test_export_of_a_damaged_state(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3)[:-1])
    refuse(12, "cut short", "state", "export", made, "--out", tmp_path / "out", untouched=tmp_path)


@pytest.mark.parametrize("suite", ["plain", "sealed"])
@pytest.mark.parametrize("there", [False, True])
def test_import_into_an_absent_or_an_empty_directory(tmp_path: Path, suite: str, there: bool) -> None:
    if there:
        (tmp_path / "new").mkdir(mode=0o750)
    assert str(s.UUID_A) in state("import", GOLDEN / f"v1-{suite}.crbd", tmp_path / "new")
    assert held(tmp_path / "new") == golden(1, suite)
    assert mode(tmp_path / "new" / FILE_NAME) == 0o600
    assert mode(tmp_path / "new") == (0o750 if there else 0o700)
    assert list(contents(tmp_path / "new")) == [FILE_NAME]


def test_import_refuses_and_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(golden(3)[:-1])
    refuse(12, "cut short", "state", "import", tmp_path / "bad", tmp_path / "new", untouched=tmp_path)
    refuse(11, "does not exist", "state", "import", tmp_path / "absent", tmp_path / "new", untouched=tmp_path)
    good = GOLDEN / "v3-plain.crbd"
    refuse(43, "not encrypted", "state", "import", good, tmp_path / "new", "--key", key_file(tmp_path))
    assert not (tmp_path / "new").exists()
    refuse(16, "a/b", "state", "import", good, tmp_path / "a" / "b", untouched=tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README").write_bytes(b"")
    refuse(10, "README", "state", "import", good, tmp_path / "full", untouched=tmp_path)
    assert not (tmp_path / "full" / ".lock").exists()
    put(tmp_path / "tpm", golden(1))
    refuse(10, "not empty", "state", "import", good, tmp_path / "tpm", untouched=tmp_path)


def test_a_new_directory_that_cannot_be_filled_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    refuse(44, "No space left", "state", "import", GOLDEN / "v3-plain.crbd", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    refuse(44, "No space left", "state", "import", GOLDEN / "v3-plain.crbd", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_clone_copy(tmp_path: Path, made: Path) -> None:
    before = contents(made)
    state("clone", made, tmp_path / "two", "--policy", "copy")
    assert held(tmp_path / "two") == golden(3)
    assert contents(made) == before
    refuse(2, "changes nothing", "state", "clone", made, tmp_path / "x", "--policy", "copy", "--name", "n")
    refuse(2, "--policy", "state", "clone", made, tmp_path / "x", untouched=tmp_path)
    refuse(10, "not empty", "state", "clone", made, tmp_path / "two", "--policy", "copy", untouched=tmp_path)


def test_clone_replace(tmp_path: Path, made: Path) -> None:
    state("clone", made, tmp_path / "two", "--policy", "replace", "--name", "second")
    old, new = document(made), document(tmp_path / "two")
    assert new.identity.uuid != old.identity.uuid
    assert (new.identity.name, new.identity.generation) == ("second", 1)
    assert blobs(new) == blobs(old)
    assert (new.crb, new.session) == (old.crb, old.session)
    refuse(2, "--name", "state", "clone", made, tmp_path / "x", "--policy", "replace", "--name", "a\nb")
    refuse(2, "--name", "state", "clone", made, tmp_path / "x", "--policy", "replace", "--name", "n" * 256)
    assert not (tmp_path / "x").exists()


def test_clone_replace_of_sealed_state_has_a_data_key_of_its_own(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3, "sealed"))
    refuse(14, "no key", "state", "clone", made, tmp_path / "x", "--policy", "replace", untouched=tmp_path)
    key = ["--key", key_file(tmp_path)]
    state("clone", made, tmp_path / "two", "--policy", "replace", *key)
    assert blobs(document(tmp_path / "two", s.KEY)) == blobs(decode(golden(3)))
    other = ["--new-key", key_file(tmp_path, s.OTHER_KEY, "other")]
    state("clone", made, tmp_path / "three", "--policy", "replace", *key, *other)
    assert blobs(document(tmp_path / "three", s.OTHER_KEY)) == blobs(decode(golden(3)))
    with pytest.raises(StateWrongKeyError):
        document(tmp_path / "three", s.KEY)
    state("clone", put(tmp_path / "plain", golden(3)), tmp_path / "four", "--policy", "replace", *other)
    assert document(tmp_path / "four", s.OTHER_KEY).identity.generation == 1


def test_a_clone_is_a_tpm(tmp_path: Path, made: Path) -> None:
    state("clone", made, tmp_path / "two", "--policy", "replace")
    assert crbd("check", tmp_path / "two").status == 0
