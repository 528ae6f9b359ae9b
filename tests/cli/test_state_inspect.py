"""`crbd state inspect` and `verify`, and `crbd check`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from crbd.state.document import decode, encode
from crbd.state.saved import EngineStamp, TpmState
from crbd.state.swtpm import encode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import FILE_NAME
from crbd.store.lockfile import LockFile
from tests.state import samples as s

from .states import GOLDEN, contents, crbd, golden, key_file, put, put_swtpm, refuse, state


def inspected(*arguments: str | Path) -> dict[str, object]:
    shown = json.loads(state("inspect", *arguments, "--json"))
    assert isinstance(shown, dict)
    return shown


def test_a_directory_with_both_generations_and_what_is_kept(tmp_path: Path) -> None:
    put(tmp_path, golden(1), golden(3))
    (tmp_path / "tpm.crbd.format-1").write_bytes(golden(1))
    shown = inspected(tmp_path)
    assert (shown["layout"], shown["fell_back"], shown["kept"]) == ("crbd", False, ["tpm.crbd.format-1"])
    current, previous = shown["current"], shown["previous"]
    assert isinstance(current, dict)
    assert isinstance(previous, dict)
    assert (current["slot_generation"], previous["slot_generation"]) == (2, 1)
    assert (current["format_version"], previous["format_version"]) == (3, 1)
    assert current["generation"] == 3
    assert current["uuid"] == str(s.UUID_A)
    assert (current["name"], current["writer"], current["suite"]) == ("golden 3", s.WRITER, "plain")
    assert (current["created"], current["written"]) == ("2023-11-14T22:13:20Z", "2023-11-14T22:13:23Z")
    assert current["engines"]["permanent"] == {"version": "0.9.2", "profile": None, "format_level": None}
    versions = {section["name"]: section["version"] for section in current["sections"]}
    assert versions == {"identity": 1, "tpm.permanent": 1, "tpm.volatile": 1, "crb": 3, "session": 1}
    old = {section["name"]: section["version"] for section in previous["sections"]}
    assert old["crb"] == 1, "as stored, not as read"


def test_the_same_for_people(tmp_path: Path) -> None:
    lines = state("inspect", put(tmp_path, golden(3))).splitlines()
    assert f"directory: {tmp_path}" in lines
    assert "fell back: no" in lines
    assert "previous: none" in lines
    assert "  name: golden 3" in lines
    assert any(line.startswith("    crb, version 3, size ") for line in lines)


def test_a_sealed_document_without_and_with_its_key(tmp_path: Path) -> None:
    sealed = GOLDEN / "v2-sealed.crbd"
    shown = inspected(sealed)
    assert shown["key_slots"] == ["key file 'key'", "passphrase 'passphrase'"]
    assert shown["uuid"] == str(s.UUID_A)
    assert "sections" not in shown
    assert "give the key" in str(shown["contents"])
    shown = inspected(sealed, "--key", key_file(tmp_path))
    assert shown["name"] == "golden 2"
    assert "contents" not in shown
    plain = inspected(GOLDEN / "v2-plain.crbd")
    assert shown["sections"] == plain["sections"]
    (tmp_path / "words").write_bytes(b"correct horse\n")
    assert inspected(sealed, "--passphrase", f"file:{tmp_path}/words")["name"] == "golden 2"
    refuse(40, "none of the given keys", "state", "inspect", sealed, "--key", key_file(tmp_path, s.OTHER_KEY))


def test_what_the_tpm_says_of_itself_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path / "tpm", golden(1), golden(3))
    put_swtpm(tmp_path / "swtpm")
    before = contents(tmp_path)
    for shown in (inspected(tmp_path / "tpm"), inspected(tmp_path / "swtpm"), inspected(GOLDEN / "v3-plain.crbd")):
        tpm = shown["tpm"]
        assert isinstance(tpm, dict)
        assert (tpm["endorsement_keys"], tpm["nv_indices"], tpm["persistent_keys"]) == ([], 1, 0)
        assert tpm["nv_free_bytes"] > 100_000
    assert inspected(tmp_path / "tpm", "--no-engine")["tpm"] is None
    assert contents(tmp_path) == before


def test_the_identity_names_the_endorsement_key(tmp_path: Path) -> None:
    """Where provisioning made it, and where a TPM that has one comes from swtpm's layout."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert crbd("provision", "--state", one, "--ek", "ecc_nist_p384", "--certificates", "none").status == 0
    state("convert", one, "--to", "swtpm", "--out", two)
    state("convert", two, "--to", "crbd", "--out", three)
    for place in (one, three):
        shown = inspected(place)
        tpm, current = shown["tpm"], shown["current"]
        assert isinstance(tpm, dict)
        assert isinstance(current, dict)
        (key,) = tpm["endorsement_keys"]
        assert key["name"] == "0x81010016"
        assert current["ek_fingerprint"] == key["fingerprint"]


def test_a_tpm_that_cannot_be_asked_is_shown_all_the_same(tmp_path: Path) -> None:
    assert "encrypted" in str(inspected(GOLDEN / "v3-sealed.crbd")["tpm"])
    shown = inspected(put(tmp_path, golden(3)), "--libtpms", tmp_path / "absent.so")
    assert "libtpms cannot be loaded" in str(shown["tpm"])
    document = decode(golden(3))
    (tmp_path / "broken").write_bytes(
        encode(dataclasses.replace(document, permanent=TpmState(b"?", EngineStamp(0, 9, 2))))
    )
    assert "does not run the TPM" in str(inspected(tmp_path / "broken")["tpm"])


def test_swtpms_layout(tmp_path: Path) -> None:
    put_swtpm(tmp_path / "plain")
    put_swtpm(tmp_path / "sealed", key=s_key())
    for name in ("plain", "sealed"):
        shown = inspected(tmp_path / name)
        assert shown["layout"] == "swtpm"
        files = shown["files"]
        assert isinstance(files, list)
        assert [file["name"] for file in files] == ["tpm2-00.permall", "tpm2-00.volatilestate"]
        assert [file["encrypted"] for file in files] == [name == "sealed"] * 2
    assert "libtpms" in state("verify", tmp_path / "plain", "--engine")
    assert "encrypted" in state("verify", tmp_path / "sealed")
    refuse(2, "swtpm layout", "state", "verify", tmp_path / "plain", "--key", key_file(tmp_path))


def s_key() -> SwtpmKey:
    return SwtpmKey(bytes(32))


def test_a_slot_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    put(tmp_path, golden(2), golden(3))
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert inspected(tmp_path)["fell_back"] is True


@pytest.mark.parametrize("operation", ["inspect", "verify"])
def test_what_is_no_state_is_refused(tmp_path: Path, operation: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(golden(3)[:-40])
    (tmp_path / "linear").write_bytes(b"nilmptws" + bytes(1000))
    (tmp_path / "long").write_bytes(golden(3) + bytes(5 * 1024 * 1024))
    (tmp_path / "none").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / f".{FILE_NAME}.new").write_bytes(bytes(100))
    put(tmp_path / "good", golden(3))
    for code, name in (
        (11, "absent"),
        (11, "none"),
        (12, "cut"),
        (12, "long"),
        (17, "empty"),
        (18, "unfinished"),
        (19, "linear"),
        (19, "/dev/null"),
        (19, f"good/{FILE_NAME}"),
    ):
        refuse(code, name, "state", operation, tmp_path / name, untouched=tmp_path)
    assert not (tmp_path / "none" / ".lock").exists()
    lock = LockFile.acquire(tmp_path / "good" / ".lock")
    refuse(15, "in use by process", "state", operation, tmp_path / "good")
    lock.release()


def test_verify_says_what_it_saw(tmp_path: Path) -> None:
    put(tmp_path / "plain", golden(1), golden(3))
    assert state("verify", tmp_path / "plain") == f"{tmp_path}/plain: generation 3 is whole\n"
    assert "libtpms 0." in state("verify", tmp_path / "plain", "--engine")
    put(tmp_path / "sealed", golden(3, "sealed"))
    assert "for want of the key" in state("verify", tmp_path / "sealed")
    key = ["--key", key_file(tmp_path)]
    assert "libtpms 0." in state("verify", tmp_path / "sealed", "--engine", *key)
    refuse(2, "give its key", "state", "verify", tmp_path / "sealed", "--engine")
    refuse(43, "is not encrypted", "state", "verify", tmp_path / "plain", *key)


def test_verify_looks_at_everything(tmp_path: Path) -> None:
    put(tmp_path / "undo", b"no document", golden(3))
    refuse(12, "the generation before", "state", "verify", tmp_path / "undo")
    put(tmp_path / "kept", golden(3))
    (tmp_path / "kept" / "tpm.crbd.format-2").write_bytes(golden(2)[:-1])
    refuse(12, "format-2", "state", "verify", tmp_path / "kept")
    (tmp_path / "engine").write_bytes(encode(s.sample()))
    assert "is whole" in state("verify", tmp_path / "engine")
    refuse(13, "libtpms 0.10", "state", "verify", tmp_path / "engine", "--engine")


def test_the_marker_of_an_interrupted_manufacture_is_no_tpm(tmp_path: Path) -> None:
    marker = encode(dataclasses.replace(s.sample(), permanent=None))
    (tmp_path / "file").write_bytes(marker)
    put(tmp_path / "tpm", golden(3), marker)
    for path in (tmp_path / "file", tmp_path / "tpm"):
        refuse(18, "holds no TPM yet", "state", "verify", path)
    refuse(18, "holds no TPM yet", "state", "export", tmp_path / "tpm", "--out", tmp_path / "out", untouched=tmp_path)
    refuse(18, "holds no TPM yet", "check", tmp_path / "tpm")


def test_check(tmp_path: Path) -> None:
    put(tmp_path / "plain", golden(3))
    done = crbd("check", tmp_path / "plain")
    assert (done.status, done.out.count("\n"), done.err) == (0, 1, "")
    assert "generation 3; libtpms" in done.out
    put_swtpm(tmp_path / "swtpm")
    assert "swtpm's layout; libtpms" in crbd("check", tmp_path / "swtpm").out
    put(tmp_path / "sealed", golden(3, "sealed"))
    assert crbd("check", tmp_path / "sealed", "--key", key_file(tmp_path)).status == 0


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    put(tmp_path / "sealed", golden(3, "sealed"))
    refuse(14, "no key", "check", tmp_path / "sealed")
    refuse(11, "no TPM state", "check", tmp_path / "absent")
    rejected = s.sample()
    put(tmp_path / "newer", encode(rejected))
    refuse(13, "libtpms 0.10", "check", tmp_path / "newer")
    (tmp_path / "rejected").mkdir()
    (tmp_path / "rejected" / "tpm2-00.permall").write_bytes(encode_file(b"no TPM"))
    refuse(12, "rejects the permanent state", "check", tmp_path / "rejected")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "tpm2-00.other").write_bytes(b"")
    refuse(11, "no TPM state", "check", tmp_path / "odd")
    refuse(20, "libtpms", "check", tmp_path / "rejected", "--libtpms", "/no/such/libtpms.so")
