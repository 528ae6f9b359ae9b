"""Sealing: which keys open what, that nothing is authentic but what was sealed, and that no nonce comes twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from crbd.errors import (
    StateDamagedError,
    StateIdentityError,
    StateSealedError,
    StateUnsealedError,
    StateWrongKeyError,
    UsageError,
)
from crbd.state.document import decode, encode, key_slots, open_seal, rewrap
from crbd.state.header import DIGEST_SIZE
from crbd.state.keys import MAX_SLOTS, KeySlot, Passphrase, RawKey, ScryptCost
from crbd.state.sealing import Seal

from . import samples as s

HEADER_SIZE = 69 + len(s.WRITER)
DOCUMENT = s.sample()


def area_size(data: bytes) -> int:
    return int.from_bytes(data[HEADER_SIZE : HEADER_SIZE + 4], "little")


def body(data: bytes) -> bytes:
    """A sealed document's stored body: salt, nonce, ciphertext and tag."""
    return data[HEADER_SIZE + area_size(data) : -DIGEST_SIZE]


def salt_and_nonce(data: bytes) -> tuple[bytes, bytes]:
    return body(data)[:32], body(data)[32:44]


def test_any_of_the_keys_opens() -> None:
    data = encode(DOCUMENT, Seal.create(s.UUID_A, [s.key(), s.passphrase()]))
    assert decode(data, [s.key()]) == DOCUMENT
    assert decode(data, [s.passphrase()]) == DOCUMENT
    assert decode(data, [s.other_key(), s.passphrase(b"wrong"), s.key()]) == DOCUMENT
    assert decode(data, (key for key in [s.key()])) == DOCUMENT


def test_nothing_of_the_state_shows() -> None:
    data = encode(DOCUMENT, Seal.create(s.UUID_A, [s.key()]))
    for secret in (b"permanent", b"volatile", b"vm-1", b"identity", s.KEY):
        assert secret not in data


@pytest.mark.parametrize(
    "keys", [[s.other_key()], [s.passphrase(b"correct horsf")], [s.passphrase(b"correct horse\n")], [RawKey(bytes(32))]]
)
def test_wrong_keys(keys: list[RawKey | Passphrase]) -> None:
    data = encode(DOCUMENT, Seal.create(s.UUID_A, [s.key(), s.passphrase()]))
    with pytest.raises(StateWrongKeyError, match="give key file 'key' or passphrase 'passphrase'"):
        decode(data, keys, "f")


def test_the_seal_of_another_document_opens_nothing() -> None:
    data = encode(DOCUMENT, Seal.create(s.UUID_A, [s.key()]))
    with pytest.raises(StateWrongKeyError):
        decode(data, Seal.create(s.UUID_A, [s.key()]))
    with pytest.raises(StateIdentityError):
        decode(data, Seal.create(s.UUID_B, [s.key()]))
    with pytest.raises(StateUnsealedError):
        decode(encode(DOCUMENT), Seal.create(s.UUID_A, [s.key()]))
    with pytest.raises(StateUnsealedError):
        open_seal(encode(DOCUMENT), [s.key()])
    with pytest.raises(StateSealedError, match="no key was given"):
        open_seal(data, [])


def test_parts_of_two_documents_of_one_instance_do_not_mix() -> None:
    """Header, key slots and body under the same data key: only header and body of one document belong together."""
    seal = Seal.create(s.UUID_A, [s.key()])
    old, new = encode(s.sample(generation=1), seal), encode(s.sample(generation=2), seal)
    mixed = s.resummed(old[:HEADER_SIZE] + new[HEADER_SIZE:])
    with pytest.raises(StateDamagedError, match="not authentic"):
        decode(mixed, [s.key()])
    with pytest.raises(StateDamagedError, match="not authentic"):
        decode(mixed, seal)


def test_a_body_too_short_for_its_tag() -> None:
    seal = Seal.create(s.UUID_A, [s.key()])
    data = encode(DOCUMENT, seal)
    head = data[:16] + (44 + 15).to_bytes(4, "little") + data[20:HEADER_SIZE]
    with pytest.raises(StateDamagedError, match="not authentic"):
        decode(s.with_digest(head + seal.encode_area() + bytes(44 + 15)), [s.key()])


def test_a_slot_taken_out_is_noticed() -> None:
    seal = Seal.create(s.UUID_A, [s.key(), s.other_key()])
    data = encode(DOCUMENT, seal)
    seal.remove("other")
    fewer = data[:HEADER_SIZE] + seal.encode_area()[:-32] + bytes(32) + body(data)
    with pytest.raises(StateDamagedError, match="key slots: are not authentic"):
        decode(s.with_digest(fewer), [s.key()])


def test_slots_do_not_open_another_instance() -> None:
    seal = Seal.create(s.UUID_A, [s.key()])
    data = encode(DOCUMENT, seal)
    foreign = encode(s.sample(s.UUID_B), Seal.create(s.UUID_B, [s.key()]))
    size = area_size(data)
    mixed = foreign[:HEADER_SIZE] + data[HEADER_SIZE : HEADER_SIZE + size] + body(foreign)
    with pytest.raises(StateWrongKeyError):
        decode(s.with_digest(mixed), [s.key()])


def test_rekey_leaves_header_and_body_as_they_are() -> None:
    data = encode(DOCUMENT, Seal.create(s.UUID_A, [s.key()]))
    seal = open_seal(data, [s.key()])
    seal.add(s.passphrase())
    seal.remove("key")
    rekeyed = rewrap(data, seal, "f")
    assert rekeyed[:HEADER_SIZE] == data[:HEADER_SIZE]
    assert body(rekeyed) == body(data)
    assert decode(rekeyed, [s.passphrase()]) == DOCUMENT
    with pytest.raises(StateWrongKeyError):
        decode(rekeyed, [s.key()])
    assert decode(data, [s.key()]) == DOCUMENT, "the old copy opens with the old key, as the theory says"
    assert decode(encode(DOCUMENT, seal), [s.passphrase()]) == DOCUMENT
    with pytest.raises(StateWrongKeyError):
        rewrap(data, Seal.create(s.UUID_A, [s.key()]), "f")
    with pytest.raises(StateUnsealedError):
        rewrap(encode(DOCUMENT), seal, "f")


def test_slots_are_up_to_eight_with_labels_of_their_own() -> None:
    keys = [RawKey(bytes((number,)) * 32, f"key {number}") for number in range(MAX_SLOTS)]
    seal = Seal.create(s.UUID_A, keys)
    with pytest.raises(UsageError, match="all 8"):
        seal.add(s.passphrase())
    for key in keys:
        assert decode(encode(DOCUMENT, seal), [key]) == DOCUMENT
    seal.remove("key 3")
    with pytest.raises(UsageError, match="'key 4' already"):
        seal.add(RawKey(s.KEY, "key 4"))
    with pytest.raises(UsageError, match="no key slot 'key 3'"):
        seal.remove("key 3")
    seal = Seal.create(s.UUID_A, [s.key()])
    with pytest.raises(UsageError, match="last"):
        seal.remove("key")
    with pytest.raises(UsageError, match="no key to seal"):
        Seal.create(s.UUID_A, [])


def test_slots_are_exchanged_in_one_step_or_not_at_all() -> None:
    keys = [RawKey(bytes((number,)) * 32, f"key {number}") for number in range(MAX_SLOTS)]
    seal = Seal.create(s.UUID_A, keys)
    for labels, new, words in (
        (["key 1"], [s.key(), s.other_key()], "all 8"),
        (["key 1", "key 9"], [s.key()], "'key 1' and 'key 9'.*there are key file 'key 0'"),
        (["key 1"], [RawKey(s.KEY, "key 2")], "'key 2' already"),
        ([key.label for key in keys], [], "are all key slots"),
    ):
        before = seal.slots
        with pytest.raises(UsageError, match=words):
            seal.exchange(labels, new)
        assert seal.slots == before
    seal.exchange(["key 1"], [s.key()])
    data = encode(DOCUMENT, seal)
    assert decode(data, [s.key()]) == decode(data, [keys[7]]) == DOCUMENT
    with pytest.raises(StateWrongKeyError):
        decode(data, [keys[1]])
    seal.exchange([slot.label for slot in seal.slots], [s.passphrase()])
    assert [slot.label for slot in seal.slots] == ["passphrase"]


def test_a_slot_of_an_unknown_kind_is_kept_and_not_opened() -> None:
    seal = Seal.create(s.UUID_A, [s.key()])
    stranger = KeySlot(200, "kms", b"whatever")
    seal = Seal(s.UUID_A, bytearray(seal._data_key), (stranger, *seal.slots), s.counting_entropy())
    data = encode(DOCUMENT, seal)
    assert decode(data, [s.key()]) == DOCUMENT
    assert key_slots(rewrap(data, open_seal(data, [s.key()]), "f"))[0] == stranger
    with pytest.raises(StateWrongKeyError, match="key of kind 200 'kms'"):
        decode(data, [s.other_key()])


# -- nonces


def test_no_key_and_nonce_comes_twice() -> None:
    """Over many documents of one process, of further processes, after a restore, and in a clone."""
    first = Seal.create(s.UUID_A, [s.key()])
    snapshot = encode(DOCUMENT, first)
    seen = [salt_and_nonce(snapshot)]
    seen += [salt_and_nonce(encode(DOCUMENT, first)) for _ in range(50)]
    for _ in range(5):
        # A process that starts, or goes back to the snapshot: the same data key, from the same bytes.
        restored = open_seal(snapshot, [s.key()])
        seen += [salt_and_nonce(encode(DOCUMENT, restored)) for _ in range(10)]
    salts = [salt for salt, _ in seen]
    assert len(set(seen)) == len(seen)
    assert len({nonce for _, nonce in seen}) == len(seen)
    assert len(set(salts)) == 6, "each process has a body key of its own"
    assert len(set(salts[:51])) == 1


def test_a_clone_has_another_data_key() -> None:
    original = Seal.create(s.UUID_A, [s.key()])
    copy = Seal.create(s.UUID_A, [s.key()])
    replaced = Seal.create(s.UUID_B, [s.key()])
    assert len({bytes(seal._data_key) for seal in (original, copy, replaced)}) == 3
    assert decode(encode(s.sample(s.UUID_B), replaced), [s.key()]) == s.sample(s.UUID_B)


def test_a_body_key_is_used_up() -> None:
    seal = Seal.create(s.UUID_A, [s.key()], limit=3)
    salts = [salt_and_nonce(encode(DOCUMENT, seal))[0] for _ in range(8)]
    assert [salts.index(salt) for salt in salts] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert all(decode(encode(DOCUMENT, seal), [s.key()]) == DOCUMENT for _ in range(4))


def test_one_document_has_one_nonce_even_where_nothing_changed() -> None:
    seal = Seal.create(s.UUID_A, [s.key()])
    assert body(encode(DOCUMENT, seal)) != body(encode(DOCUMENT, seal))


# -- the primitives, by an independent road


def test_the_body_by_hand() -> None:
    """What docs/state-format.md says, with nothing but a cipher and a hash."""
    seal = Seal.create(s.UUID_A, [s.key()], entropy=s.counting_entropy())
    data = encode(DOCUMENT, seal)
    salt, nonce = salt_and_nonce(data)
    key = hkdf(bytes(seal._data_key), salt, b"crbd body")
    clear = AESGCM(key).decrypt(nonce, body(data)[44:], data[:HEADER_SIZE])
    plain = encode(DOCUMENT)
    assert clear == plain[HEADER_SIZE:-DIGEST_SIZE]


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, info).derive(key)


def test_keys_are_wiped() -> None:
    key, phrase = s.key(), s.passphrase()
    seal = Seal.create(s.UUID_A, [key, phrase])
    key.wipe()
    phrase.wipe()
    assert not any(key._key)
    assert not any(phrase._text)
    data_key = seal._data_key
    assert any(data_key)
    seal.wipe()
    assert not any(data_key)
    with pytest.raises(ValueError, match="wiped"):
        encode(DOCUMENT, seal)


def test_keys_do_not_show_in_messages() -> None:
    for key in (s.key(), s.passphrase(b"secretword")):
        assert "secretword" not in repr(key)
        assert s.KEY.hex() not in repr(key)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_has_32_bytes(size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes"):
        RawKey(bytes(size))


def test_passphrase_and_cost_have_bounds() -> None:
    with pytest.raises(UsageError, match="empty"):
        Passphrase(b"")
    with pytest.raises(ValueError, match="MiB"):
        ScryptCost(log2_n=20, r=8, p=1)
    with pytest.raises(ValueError, match="log2 N 0"):
        ScryptCost(log2_n=0)
    with pytest.raises(ValueError, match="label"):
        Seal.create(s.UUID_A, [RawKey(s.KEY, "")])


def test_the_default_cost_opens_again() -> None:
    data = encode(DOCUMENT, Seal.create(s.UUID_A, [Passphrase(b"x")]))
    assert decode(data, [Passphrase(b"x")]) == DOCUMENT


def test_plain_documents_need_no_cryptography() -> None:
    """The serving path stays light: the package is loaded by the first key, not before."""
    code = """if True:
        import sys
        from crbd.state import document, sealing, swtpm
        from tests.state import samples
        assert document.decode(document.encode(samples.sample())) == samples.sample()
        assert swtpm.decode_file(swtpm.encode_file(b"x"), "f") == b"x"
        assert "cryptography" not in sys.modules
        sealing.Seal.create(samples.UUID_A, [samples.key()])
        assert "cryptography" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
