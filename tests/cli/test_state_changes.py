"""`crbd state rekey`, `rollback` and `restore`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from crbd.errors import StateWrongKeyError
from crbd.state.document import decode, encode, key_slots
from crbd.state.keys import RawKey
from crbd.state.sealing import Seal
from crbd.store.document import FILE_NAME
from tests.state import samples as s

from .states import blobs, contents, document, golden, held, key_file, put, refuse, state, undo


def generation(number: int, seal: Seal | None = None) -> bytes:
    """A document of the sample instance that says its generation in its permanent state."""
    sample = s.sample(generation=number)
    assert sample.permanent is not None
    permanent = dataclasses.replace(sample.permanent, data=b"state of generation %d" % number)
    return encode(dataclasses.replace(sample, permanent=permanent), seal)


def permanent(data: bytes, key: bytes | None = None) -> bytes:
    found = decode(data, None if key is None else [RawKey(key)]).permanent
    assert found is not None
    return found.data


def sealing() -> Seal:
    return Seal.create(s.UUID_A, [s.key(), s.passphrase()])


# -- rekey


def test_rekey_exchanges_the_slot_of_the_key_in_both_slots_of_the_file(tmp_path: Path) -> None:
    seal = sealing()
    made = put(tmp_path / "tpm", generation(1, seal), generation(2, seal))
    body = held(made)[-1000:-32]
    keys = ["--key", key_file(tmp_path), "--new-key", key_file(tmp_path, s.OTHER_KEY, "new")]
    said = state("rekey", made, *keys)
    assert "passphrase 'passphrase' or key file 'key 2'" in said
    for data in (held(made), undo(made)):
        assert data is not None
        assert permanent(data, s.OTHER_KEY) == b"state of generation 2"
        assert decode(data, [s.passphrase()]).identity.generation == 2
        with pytest.raises(StateWrongKeyError):
            decode(data, [s.key()])
        assert data[-1000:-32] == body, "not encrypted anew"
    again = ["--key", key_file(tmp_path, s.OTHER_KEY, "new"), "--new-key", key_file(tmp_path)]
    state("rekey", made, *again)
    assert [slot.label for slot in key_slots(held(made))] == ["passphrase", "key"]
    assert permanent(held(made), s.KEY) == b"state of generation 2"


def test_rekey_of_an_old_format_is_no_upgrade(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(1, "sealed"))
    state("rekey", made, "--key", key_file(tmp_path), "--new-key", key_file(tmp_path, s.OTHER_KEY, "new"))
    assert list(contents(made)) == [FILE_NAME], "nothing is kept that the old key opens"
    assert decode(held(made), [RawKey(s.OTHER_KEY)]) == decode(golden(1))


def test_rekey_says_what_may_still_open_by_the_old_key(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3, "sealed"))
    (made / "tpm.crbd.format-1").write_bytes(golden(1, "sealed"))
    keys = ["--key", key_file(tmp_path), "--new-key", key_file(tmp_path, s.OTHER_KEY, "new")]
    assert "tpm.crbd.format-1 may still open by the old key" in state("rekey", made, *keys)


def test_rekey_that_only_adds(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3, "sealed"))
    (tmp_path / "words").write_bytes(b"other words\n")
    state("rekey", made, "--key", key_file(tmp_path), "--new-passphrase", f"file:{tmp_path}/words", "--keep-old")
    assert [slot.label for slot in key_slots(held(made))] == ["key", "passphrase", "passphrase 2"]
    assert decode(held(made), [s.passphrase(b"other words")]) == decode(held(made), [s.key()])


def test_rekey_where_all_eight_slots_are_in_use(tmp_path: Path) -> None:
    others = [RawKey(bytes((number,)) * 32, f"other {number}") for number in range(1, 8)]
    made = put(tmp_path / "tpm", generation(1, Seal.create(s.UUID_A, [s.key(), *others])))
    keys = ["--key", key_file(tmp_path), "--new-key", key_file(tmp_path, s.OTHER_KEY, "new")]
    refuse(2, "all 8 key slots are in use", "state", "rekey", made, *keys, "--keep-old", untouched=made)
    assert "key file 'key 2'" in state("rekey", made, *keys)
    for data in (held(made), undo(made)):
        assert data is not None
        assert permanent(data, s.OTHER_KEY) == b"state of generation 1"
        assert len(key_slots(data)) == 8
        with pytest.raises(StateWrongKeyError):
            decode(data, [s.key()])
    assert permanent(held(made), bytes((7,)) * 32) == b"state of generation 1"


def test_a_new_key_that_cannot_be_read_is_called_so(tmp_path: Path) -> None:
    made, key = put(tmp_path / "tpm", golden(3, "sealed")), ["--key", key_file(tmp_path)]
    missing = f"file:{tmp_path}/missing"
    refuse(2, f"--new-key {missing}: No such file", "state", "rekey", made, *key, "--new-key", missing)
    refuse(2, f"--new-passphrase {missing}: No such", "state", "rekey", made, *key, "--new-passphrase", missing)
    refuse(2, f"--key {missing}: No such file", "state", "rekey", made, "--key", missing)
    (tmp_path / "digits").write_bytes(b"x" * 64)
    refuse(
        2, f"--new-key file:{tmp_path}/digits: 64", "state", "rekey", made, *key, "--new-key", f"file:{tmp_path}/digits"
    )


def test_rekey_refuses(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(3, "sealed"))
    plain = put(tmp_path / "plain", golden(3))
    key, other = ["--key", key_file(tmp_path)], key_file(tmp_path, s.OTHER_KEY, "other")
    refuse(2, "no new key", "state", "rekey", made, *key, untouched=tmp_path)
    refuse(14, "no key", "state", "rekey", made, "--new-key", other, untouched=tmp_path)
    refuse(40, "none", "state", "rekey", made, "--key", other, "--new-key", other, untouched=tmp_path)
    refuse(43, "not encrypted", "state", "rekey", plain, *key, "--new-key", other, untouched=tmp_path)


# -- rollback and restore


def test_rollback_writes_a_new_generation_and_keeps_the_lost_one_as_undo(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", generation(1), generation(2))
    refuse(2, "generation 1 would take the place of generation 2", "state", "rollback", made, untouched=tmp_path)
    said = state("rollback", made, "--allow-rollback")
    assert "generation 1 is the state again, as generation 3; generation 2 is lost" in said
    assert permanent(held(made)) == b"state of generation 1"
    assert document(made).identity.generation == 3
    before = undo(made)
    assert before is not None
    assert permanent(before) == b"state of generation 2"
    state("rollback", made, "--allow-rollback")
    assert (permanent(held(made)), document(made).identity.generation) == (b"state of generation 2", 4)


def test_rollback_of_sealed_state(tmp_path: Path) -> None:
    seal = sealing()
    made = put(tmp_path / "tpm", generation(1, seal), generation(2, seal))
    salt = held(made)
    refuse(14, "no key", "state", "rollback", made, "--allow-rollback", untouched=tmp_path)
    state("rollback", made, "--allow-rollback", "--key", key_file(tmp_path))
    assert permanent(held(made), s.KEY) == b"state of generation 1"
    assert key_slots(held(made)) == key_slots(salt)


def test_rollback_where_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", generation(1))
    refuse(11, "one generation", "state", "rollback", made, "--allow-rollback", untouched=tmp_path)


def test_restore(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", generation(5), generation(6))
    (tmp_path / "file").write_bytes(generation(2))
    arguments: list[str | Path] = ["restore", made, tmp_path / "file"]
    refuse(2, "generation 2 would take the place of generation 6", "state", *arguments, untouched=tmp_path)
    assert "as generation 7" in state(*arguments, "--allow-rollback")
    assert permanent(held(made)) == b"state of generation 2"
    (tmp_path / "file").write_bytes(generation(20))
    assert "as generation 21" in state(*arguments, "--allow-rollback")


def test_restore_of_an_old_format_or_over_one(tmp_path: Path) -> None:
    made = put(tmp_path / "tpm", golden(2))
    (tmp_path / "file").write_bytes(golden(1))
    state("restore", made, tmp_path / "file", "--allow-rollback")
    assert (made / "tpm.crbd.format-2").read_bytes() == golden(2)
    assert blobs(document(made)) == blobs(decode(golden(1)))
    assert document(made).identity.generation == 3


def test_restore_refuses(tmp_path: Path) -> None:
    seal = sealing()
    plain = put(tmp_path / "plain", generation(2))
    sealed = put(tmp_path / "sealed", generation(2, seal))
    allow, key = "--allow-rollback", ["--key", key_file(tmp_path)]
    (tmp_path / "stranger").write_bytes(encode(s.sample(s.UUID_B)))
    refuse(41, "belongs to instance", "state", "restore", plain, tmp_path / "stranger", allow, untouched=tmp_path)
    (tmp_path / "file").write_bytes(generation(1))
    (tmp_path / "file-sealed").write_bytes(generation(1, seal))
    refuse(43, "not encrypted", "state", "restore", sealed, tmp_path / "file", allow, *key, untouched=tmp_path)
    refuse(10, "is encrypted", "state", "restore", plain, tmp_path / "file-sealed", allow, untouched=tmp_path)
    refuse(43, "not encrypted", "state", "restore", plain, tmp_path / "file-sealed", allow, *key, untouched=tmp_path)
    (tmp_path / "cut").write_bytes(generation(1)[:-1])
    refuse(12, "cut short", "state", "restore", plain, tmp_path / "cut", allow, untouched=tmp_path)
    (tmp_path / "marker").write_bytes(encode(dataclasses.replace(s.sample(), permanent=None)))
    refuse(18, "holds no TPM yet", "state", "restore", plain, tmp_path / "marker", allow, untouched=tmp_path)
    state("restore", sealed, tmp_path / "file-sealed", allow, *key)
    assert permanent(held(sealed), s.KEY) == b"state of generation 1"
