"""`crbd state convert`: both ways, sealed and plain, into another directory and in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crbd.cli.main import main
from crbd.errors import StateSealedError
from crbd.state.document import decode
from crbd.state.kinds import StateKind
from crbd.state.swtpm import decode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import FILE_NAME
from crbd.store.layout import Layout, found_in
from crbd.store.linear import encode_head
from tests.state import samples as s

from .states import blobs, contents, crbd, document, golden, key_file, put, put_swtpm, refuse, state, undo

TPM = blobs(decode(golden(1)))
BUSY_TPM = blobs(decode(golden(3)))
"""With a command under way in its registers."""
SWTPM_KEY = bytes(range(100, 132))
SWTPM_FILES = ["crbd.registers", "tpm2-00.permall", "tpm2-00.volatilestate"]


def swtpm_states(directory: Path, key: SwtpmKey | None = None) -> dict[StateKind, bytes]:
    """What swtpm's files hold."""
    paths = {kind: directory / f"tpm2-00.{kind.nvram_name}" for kind in StateKind}
    return {kind: decode_file(path.read_bytes(), "", key) for kind, path in paths.items() if path.exists()}


def swtpm_key(place: Path) -> list[str]:
    (place / "swtpm-key").write_text(SWTPM_KEY.hex())
    return ["--swtpm-key", f"file={place}/swtpm-key,mode=aes-256-cbc"]


# -- into another directory


def test_there_and_back_again(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(1))
    before = contents(made)
    said = state("convert", made, "--to", "swtpm", "--out", tmp_path / "swtpm")
    assert f"no room for: UUID {s.UUID_A}, fingerprint" in said
    assert swtpm_states(tmp_path / "swtpm") == TPM
    assert sorted(contents(tmp_path / "swtpm")) == SWTPM_FILES
    assert all((tmp_path / "swtpm" / name).stat().st_mode & 0o777 == 0o600 for name in SWTPM_FILES)
    state("convert", tmp_path / "swtpm", "--to", "crbd", "--out", tmp_path / "back", "--name", "vm7")
    back = document(tmp_path / "back")
    assert blobs(back) == TPM
    assert (back.crb, back.session) == (document(made).crb, document(made).session)
    assert (back.identity.name, back.identity.generation) == ("vm7", 1)
    assert back.identity.uuid != s.UUID_A
    assert contents(made) == before
    assert crbd("check", tmp_path / "swtpm").status == 0
    assert crbd("check", tmp_path / "back").status == 0


def test_there_and_back_again_encrypted(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(1, "sealed"))
    key, theirs = ["--key", key_file(tmp_path)], swtpm_key(tmp_path)
    state("convert", made, "--to", "swtpm", "--out", tmp_path / "swtpm", *key, *theirs)
    with pytest.raises(StateSealedError):
        swtpm_states(tmp_path / "swtpm")
    assert swtpm_states(tmp_path / "swtpm", SwtpmKey(SWTPM_KEY)) == TPM
    new = ["--new-key", key_file(tmp_path, s.OTHER_KEY, "new")]
    state("convert", tmp_path / "swtpm", "--to", "crbd", "--out", tmp_path / "back", *theirs, *new)
    assert blobs(document(tmp_path / "back", s.OTHER_KEY)) == TPM
    state("convert", tmp_path / "swtpm", "--to", "crbd", "--out", tmp_path / "plain", *theirs, "--plain")
    assert blobs(document(tmp_path / "plain")) == TPM


def test_seal_and_unseal(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3))
    key = key_file(tmp_path)
    state("convert", made, "--to", "crbd", "--out", tmp_path / "sealed", "--new-key", key)
    sealed = document(tmp_path / "sealed", s.KEY)
    assert blobs(sealed) == BUSY_TPM
    assert (sealed.identity.uuid, sealed.identity.generation) == (s.UUID_A, 4)
    state("convert", tmp_path / "sealed", "--to", "crbd", "--out", tmp_path / "plain", "--key", key, "--plain")
    assert blobs(document(tmp_path / "plain")) == BUSY_TPM
    assert (document(tmp_path / "plain").crb, document(tmp_path / "plain").identity.generation) == (sealed.crb, 5)


def test_a_linear_file_there_and_back_again(tmp_path: Path) -> None:
    made, theirs = put(tmp_path / "tpm", golden(1)), swtpm_key(tmp_path)
    state("convert", made, "--to", "linear", "--out", tmp_path / "file", *theirs)
    assert found_in(tmp_path / "file") is Layout.LINEAR
    assert crbd("check", tmp_path / "file", *theirs).status == 0
    assert crbd("check", tmp_path / "file").status == 14
    state("convert", tmp_path / "file", "--to", "swtpm", "--out", tmp_path / "swtpm", *theirs)
    assert swtpm_states(tmp_path / "swtpm", SwtpmKey(SWTPM_KEY)) == TPM
    state("convert", tmp_path / "swtpm", "--to", "linear", "--out", tmp_path / "again", *theirs)
    state("convert", tmp_path / "again", "--to", "crbd", "--out", tmp_path / "back", "--plain", *theirs)
    back = document(tmp_path / "back")
    assert blobs(back) == TPM
    assert (back.crb, back.session) == (document(made).crb, document(made).session)
    assert back.crb is not None
    out = state("upgrade", tmp_path / "file", tmp_path / "swtpm", made)
    assert "linear file, nothing to upgrade" in out
    assert "1 upgraded, 2 in swtpm's layout" in out


# -- in place


def test_swtpm_to_crbd_in_place(tmp_path: Path) -> None:
    made = put_swtpm(tmp_path / "tpm")
    before = contents(made)
    assert "prune" in state("convert", made, "--to", "crbd", "--in-place")
    kept = {"swtpm.permall.before-convert", "swtpm.volatilestate.before-convert"}
    assert set(contents(made)) == {FILE_NAME, *kept}
    assert contents(made)["swtpm.permall.before-convert"] == before["tpm2-00.permall"]
    assert found_in(made) is Layout.CRBD
    assert blobs(document(made)) == TPM
    state("prune", made)
    assert set(contents(made)) == {FILE_NAME}


def test_crbd_to_swtpm_in_place(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(1))
    before = contents(made)
    state("convert", made, "--to", "swtpm", "--in-place")
    assert sorted(contents(made)) == sorted(["tpm.crbd.before-convert", *SWTPM_FILES])
    assert contents(made)["tpm.crbd.before-convert"] == before[FILE_NAME]
    assert swtpm_states(made) == TPM
    assert found_in(made) is Layout.SWTPM


def test_sealing_in_place_leaves_nothing_plain_but_what_prune_removes(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(2), golden(3))
    secret = BUSY_TPM[StateKind.PERMANENT][100:200]
    (made / f"{FILE_NAME}.converting").write_bytes(b"left by a power cut")
    state("convert", made, "--to", "crbd", "--in-place", "--new-key", key_file(tmp_path))
    assert blobs(document(made, s.KEY)) == BUSY_TPM
    assert undo(made) is None
    assert set(contents(made)) == {FILE_NAME, f"{FILE_NAME}.before-convert"}
    arguments: list[str | Path] = [
        "convert",
        made,
        "--to",
        "crbd",
        "--in-place",
        "--key",
        key_file(tmp_path),
        "--plain",
    ]
    refuse(10, "earlier conversion", "state", *arguments, untouched=tmp_path)
    state("prune", made)
    assert not any(secret in data for data in contents(made).values())
    state(*arguments)
    assert blobs(document(made)) == BUSY_TPM


Make = Callable[[Path], Path]
IN_PLACE: dict[str, tuple[Make, list[str]]] = {
    "swtpm to crbd": (put_swtpm, ["--to", "crbd"]),
    "crbd to swtpm": (lambda place: put(place, golden(1)), ["--to", "swtpm"]),
    "crbd to crbd": (lambda place: put(place, golden(3)), ["--to", "crbd", "--new-key"]),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_conversion_in_place_that_fails_anywhere_leaves_all_as_it_was(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that can fail is made to, in turn; what is only tidying may fail unheard."""
    make, arguments = IN_PLACE[case]
    if arguments[-1] == "--new-key":
        arguments = [*arguments, key_file(tmp_path)]
    refused = 0
    for number in range(100):
        made = make(tmp_path / str(number))
        before = contents(made)
        with monkeypatch.context() as patch:
            failed = fail_once(patch, number)
            status = main(["state", "convert", str(made), *arguments, "--in-place"])
        if not failed:
            assert status == 0
            break
        if status == 0:
            assert "unlink" in failed
            continue
        assert (status in (16, 44), contents(made)) == (True, before), (status, failed)
        refused += 1
    assert refused > 5


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_conversion_into_another_directory_that_fails_anywhere_leaves_none(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, arguments = IN_PLACE[case]
    if arguments[-1] == "--new-key":
        arguments = [*arguments, key_file(tmp_path)]
    made, out = make(tmp_path / "tpm"), tmp_path / "out"
    for number in range(100):
        with monkeypatch.context() as patch:
            failed = fail_once(patch, number)
            status = main(["state", "convert", str(made), *arguments, "--out", str(out)])
        if not failed:
            assert status == 0
            break
        if status == 0:
            assert "unlink" in failed
            shutil.rmtree(out)
        else:
            assert status in (16, 44)
            assert not out.exists(), failed
    assert number > 4


def test_a_disk_that_does_not_keep_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = put(tmp_path / "tpm", golden(1))
    before = contents(made)
    write, pwrite = os.write, os.pwrite

    def lossy_write(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:-1] + bytes((data[-1] ^ 1,)))

    def lossy_pwrite(descriptor: int, data: bytes, offset: int) -> int:
        data = bytes(data)
        if len(data) < 4096:
            return pwrite(descriptor, data, offset)
        return pwrite(descriptor, data[:700] + bytes((data[700] ^ 1,)) + data[701:], offset)

    def lossy_pwritev(descriptor: int, pieces: list[bytes], offset: int) -> int:
        return lossy_pwrite(descriptor, b"".join(pieces), offset)

    monkeypatch.setattr(os, "pwritev", lossy_pwritev)
    monkeypatch.setattr(os, "write", lossy_write)
    monkeypatch.setattr(os, "pwrite", lossy_pwrite)
    key = ["--new-key", key_file(tmp_path)]
    cases: list[list[str | Path]] = [["--to", "swtpm"], ["--to", "crbd", *key]]
    for arguments in cases:
        refuse(12, "", "state", "convert", made, *arguments, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        refuse(12, "", "state", "convert", made, *arguments, "--in-place")
        assert contents(made) == before


def fail_once(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """The call `number` (from 0) of some functions of `os` fails with EIO; returns a list that will hold its name."""
    count = 0
    failed: list[str] = []

    def wrapped(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number + 1:
                failed.append(name)
                raise OSError(5, "Input/output error")
            return call(*arguments, **options)

        return run

    for name in ("fsync", "fdatasync", "link", "replace", "unlink", "rename"):
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
    return failed


# -- refusals


def test_refusals(tmp_path: Path) -> None:
    plain = put(tmp_path / "plain", golden(3))
    sealed = put(tmp_path / "sealed", golden(3, "sealed"))
    swtpm = put_swtpm(tmp_path / "swtpm")
    locked = put_swtpm(tmp_path / "encrypted", SwtpmKey(SWTPM_KEY))
    key, theirs = ["--key", key_file(tmp_path)], swtpm_key(tmp_path)
    new = ["--new-key", key_file(tmp_path)]
    out = ["--out", str(tmp_path / "out")]
    linear, to_linear = tmp_path / "linear", ["--to", "linear"]
    state("convert", swtpm, *to_linear, "--out", linear)
    blank = tmp_path / "blank"
    blank.write_bytes(encode_head({}))
    to_crbd, to_swtpm = ["--to", "crbd"], ["--to", "swtpm"]
    cases: list[tuple[int, str, list[str | Path]]] = [
        (2, "--out --in-place is required", [plain, *to_swtpm]),
        (2, "not allowed with", [plain, *to_swtpm, *out, "--in-place"]),
        (2, "in the crbd layout already, plain", [plain, *to_crbd, *out]),
        (2, "in the crbd layout already, sealed", [sealed, *to_crbd, *out, *key]),
        (2, "already, plain", [plain, *to_crbd, *out, "--plain"]),
        (2, "in the swtpm layout already", [swtpm, *to_swtpm, *out]),
        (2, "exclude each other", [sealed, *to_crbd, *out, *key, *new, "--plain"]),
        (2, "exclude each other", [sealed, *to_swtpm, *out, *key, *theirs, "--plain"]),
        (2, "use --swtpm-key", [swtpm, *to_crbd, *out, *key]),
        (2, "this is crbd's", [plain, *to_crbd, *out, *new, "--name", "n"]),
        (2, "for crbd's layout", [plain, *to_swtpm, *out, *new]),
        (14, "no key was given", [sealed, *to_swtpm, *out]),
        (14, "--swtpm-key, or --plain", [sealed, *to_swtpm, *out, *key]),
        (14, "encrypted with a state key", [locked, *to_crbd, *out]),
        (14, "--new-key, or --plain", [locked, *to_crbd, *out, *theirs]),
        (43, "is not encrypted", [swtpm, *to_crbd, *out, *theirs, *new]),
        (43, "is not encrypted", [plain, *to_swtpm, *out, *key]),
        (42, "under way", [plain, *to_swtpm, *out]),
        (10, "not empty", [plain, *to_crbd, *new, "--out", swtpm]),
        (2, "not converted in place", [linear, *to_crbd, "--in-place"]),
        (2, "not converted in place", [swtpm, *to_linear, "--in-place"]),
        (2, "in the linear layout already", [linear, *to_linear, *out]),
        (2, "use --swtpm-key, or none", [swtpm, *to_linear, *out, *key]),
        (2, "use --swtpm-key, or none", [linear, *to_swtpm, *out, "--plain"]),
        (10, "exists", [swtpm, *to_linear, "--out", linear]),
        (11, "holds no TPM yet", [blank, *to_crbd, *out]),
        (11, "holds no TPM yet", [blank, *to_swtpm, *out]),
        (43, "is not encrypted", [linear, *to_swtpm, *out, *theirs]),
        (19, "not swtpm's linear file", [plain / FILE_NAME, *to_swtpm, *out]),
        (11, "no TPM state", [tmp_path / "absent", *to_crbd, *out]),
        (20, "libtpms", [swtpm, *to_crbd, *out, "--libtpms", "/no/such/libtpms.so"]),
    ]
    for code, text, arguments in cases:
        refuse(code, text, "state", "convert", *arguments, untouched=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_libtpms_rejects_is_not_converted(tmp_path: Path) -> None:
    made = put_swtpm(tmp_path / "tpm")
    (made / "tpm2-00.volatilestate").write_bytes((made / "tpm2-00.permall").read_bytes())
    refuse(12, "rejects the volatile state", "state", "convert", made, "--to", "crbd", "--in-place", untouched=tmp_path)
