"""swtpm's encrypted blobs and key forms: both ways, byte by byte, and every refusal."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import struct

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import (
    StateDamagedError,
    StateError,
    StateSealedError,
    StateUnsealedError,
    StateWrongKeyError,
    UsageError,
)
from crbd.state.swtpm import BlobFlag, decode_file, decode_migration, encode_file, encode_migration
from crbd.state.swtpm_sealing import SwtpmKey

from . import samples as s
from .mutations import mutations

STATE = b"state of a TPM"
KEYS = {size: SwtpmKey(bytes(range(size))) for size in (16, 32)}
OTHERS = {size: SwtpmKey(bytes(range(1, size + 1))) for size in (16, 32)}


def tlv(tag: int, data: bytes) -> bytes:
    return struct.pack(">HI", tag, len(data)) + data


def blob(body: bytes, flags: int, version: int = 2) -> bytes:
    return struct.pack(">BBHHI", version, 1, 10, flags, 10 + len(body)) + body


def by_hand(state: bytes, size: int, vector: bytes, tags: tuple[int, int]) -> bytes:
    """The TLVs of one level, with nothing of ours but the facts."""
    key = bytes(range(size))
    count = size - len(state) % size
    encryptor = Cipher(AES(key), CBC(vector[:16] or bytes(16))).encryptor()
    ciphertext = encryptor.update(state + bytes([count] * count)) + encryptor.finalize()
    mac = hmac.digest(key, ciphertext + vector, "sha256")
    return tlv(tags[0], ciphertext) + tlv(3, mac) + (tlv(tags[1], vector) if vector else b"")


@pytest.mark.parametrize(("size", "flags"), [(16, 0x01), (32, 0x09)])
def test_layout_of_a_file(size: int, flags: int) -> None:
    vector = s.counting_entropy()(size)
    expected = blob(by_hand(STATE, size, vector, (2, 6)), flags)
    assert encode_file(STATE, KEYS[size], entropy=s.counting_entropy()) == expected
    assert decode_file(expected, "f", KEYS[size]) == STATE


@pytest.mark.parametrize(("size", "flags"), [(16, 0x06), (32, 0x16)])
def test_layout_of_a_migration_blob(size: int, flags: int) -> None:
    vector = s.counting_entropy()(size)
    expected = blob(by_hand(tlv(1, STATE), size, vector, (5, 7)), flags)
    assert encode_migration(STATE, KEYS[size], entropy=s.counting_entropy()) == expected
    assert decode_migration(expected, "f", KEYS[size]) == STATE


@pytest.mark.parametrize("size", [16, 32])
def test_blobs_without_an_iv_are_read(size: int) -> None:
    old = blob(by_hand(STATE, size, b"", (2, 6)), 0x01 | (8 if size == 32 else 0))
    assert decode_file(old, "f", KEYS[size]) == STATE


def test_an_iv_longer_than_the_key_is_read() -> None:
    """swtpm keeps one IV buffer: after a key of 256 bits it stores 32 bytes for one of 128 too."""
    assert decode_file(blob(by_hand(STATE, 16, bytes(range(32)), (2, 6)), 0x01), "f", KEYS[16]) == STATE


@pytest.mark.parametrize("size", [16, 32])
def test_version_1(size: int) -> None:
    key = KEYS[size]
    encrypted = key.encrypt_version_1(STATE)
    assert decode_file(blob(STATE, 0, version=1), "f") == STATE
    assert decode_file(blob(encrypted, 1, version=1), "f", key) == STATE
    assert decode_file(blob(encrypted, 0, version=1), "f", key) == STATE, "its files said nothing of encryption"
    assert decode_migration(blob(STATE, 0, version=1), "f") == STATE
    assert decode_migration(blob(encrypted, 2, version=1), "f", key) == STATE
    twice = OTHERS[size].encrypt_version_1(encrypted)
    assert decode_migration(blob(twice, 3, version=1), "f", OTHERS[size], key) == STATE
    for wrong in (OTHERS[size], KEYS[48 - size]):
        with pytest.raises(StateWrongKeyError):
            decode_file(blob(encrypted, 1, version=1), "f", wrong)
    with pytest.raises(StateSealedError, match="state key"):
        decode_file(blob(encrypted, 1, version=1), "f")
    with pytest.raises(StateDamagedError, match="version 0"):
        decode_file(blob(STATE, 0, version=0), "f")


def test_version_1_by_hand() -> None:
    text = hashlib.sha256(STATE).digest() + STATE
    count = 16 - len(text) % 16
    encryptor = Cipher(AES(bytes(range(16))), CBC(bytes(16))).encryptor()
    assert KEYS[16].encrypt_version_1(STATE) == encryptor.update(text + bytes([count] * count))


@given(st.binary(min_size=1, max_size=100), st.sampled_from([16, 32]))
def test_files_both_ways(state: bytes, size: int) -> None:
    assert decode_file(encode_file(state, KEYS[size]), "f", KEYS[size]) == state


@pytest.mark.parametrize(("outer", "inner"), [*itertools.product([None, 16, 32], repeat=2)])
def test_migration_with_every_pair_of_keys(outer: int | None, inner: int | None) -> None:
    key = KEYS[outer] if outer else None
    file_key = OTHERS[inner] if inner else None
    encoded = encode_migration(STATE, key, file_key)
    flags = int.from_bytes(encoded[4:6], "big")
    assert bool(flags & BlobFlag.MIGRATION_ENCRYPTED) == bool(outer)
    assert bool(flags & BlobFlag.ENCRYPTED) == bool(inner)
    assert flags & BlobFlag.MIGRATION_DATA
    assert decode_migration(encoded, "f", key, file_key) == STATE
    if key is not None:
        with pytest.raises(StateSealedError, match="--migration-key"):
            decode_migration(encoded, "f", None, file_key)
    if file_key is not None:
        with pytest.raises(StateSealedError, match="--key"):
            decode_migration(encoded, "f", key, None)
    assert (STATE in encoded) == (key is None and file_key is None)


def test_a_plain_migration_blob_is_taken_although_there_is_a_key() -> None:
    assert decode_migration(encode_migration(STATE), "f", KEYS[16], KEYS[32]) == STATE


def test_the_request_may_say_that_the_state_is_encrypted() -> None:
    inner = encode_file(STATE, KEYS[16])[10:]
    unmarked = blob(tlv(4, inner), BlobFlag.MIGRATION_DATA)
    assert decode_migration(unmarked, "f", None, KEYS[16], encrypted=True) == STATE
    with pytest.raises(StateDamagedError, match="no DATA"):
        decode_migration(unmarked, "f", None, KEYS[16])


@pytest.mark.parametrize("size", [16, 32])
def test_refusals_of_a_file(size: int) -> None:
    sealed = encode_file(STATE, KEYS[size])
    with pytest.raises(StateSealedError, match="state key") as caught:
        decode_file(sealed, "/the/file")
    assert type(caught.value) is StateSealedError
    with pytest.raises(StateWrongKeyError, match="/the/file is encrypted with another key"):
        decode_file(sealed, "/the/file", OTHERS[size])
    with pytest.raises(StateWrongKeyError, match=f"{8 * size} bits, and --key gives one of {8 * (48 - size)}"):
        decode_file(sealed, "/the/file", KEYS[48 - size])
    with pytest.raises(StateUnsealedError, match="find out who replaced it"):
        decode_file(encode_file(STATE), "/the/file", KEYS[size])


def test_each_tag_is_needed_and_judged() -> None:
    vector = bytes(16)
    ciphertext, mac = KEYS[16].encrypt(STATE, vector)

    def refused(*tlvs: bytes) -> str:
        with pytest.raises(StateError) as caught:
            decode_file(blob(b"".join(tlvs), 1), "f", KEYS[16])
        return str(caught.value)

    assert "no HMAC" in refused(tlv(2, ciphertext), tlv(6, vector))
    assert "no ENCRYPTED_DATA" in refused(tlv(3, mac), tlv(6, vector))
    assert "IV has 15 bytes" in refused(tlv(2, ciphertext), tlv(3, mac), tlv(6, vector[1:]))
    assert "HMAC has 31 bytes" in refused(tlv(2, ciphertext), tlv(3, mac[1:]), tlv(6, vector))
    assert "another key" in refused(tlv(2, ciphertext), tlv(3, mac), tlv(6, b"x" + vector[1:]))
    odd = b"x" * 17
    right_mac = hmac.digest(bytes(range(16)), odd + vector, "sha256")
    assert "padding is wrong" in refused(tlv(2, odd), tlv(3, right_mac), tlv(6, vector))
    nothing = hmac.digest(bytes(range(16)), vector, "sha256")
    assert "padding is wrong" in refused(tlv(2, b""), tlv(3, nothing), tlv(6, vector))


@pytest.mark.parametrize("padding", [b"\0" * 16, b"\x11" * 16, b"\x02" * 15 + b"\x03"])
def test_padding_is_judged(padding: bytes) -> None:
    encryptor = Cipher(AES(bytes(range(16))), CBC(bytes(16))).encryptor()
    ciphertext = encryptor.update(padding)
    mac = hmac.digest(bytes(range(16)), ciphertext, "sha256")
    with pytest.raises(StateDamagedError, match="padding"):
        decode_file(blob(tlv(2, ciphertext) + tlv(3, mac), 1), "f", KEYS[16])


SEALED = encode_file(STATE, KEYS[16])
MIGRATED = encode_migration(STATE, KEYS[16], OTHERS[16])


@given(st.sampled_from([SEALED, MIGRATED, blob(KEYS[16].encrypt_version_1(STATE), 1, 1)]).flatmap(mutations))
def test_any_mutation_is_refused_or_harmless(data: bytes) -> None:
    data = data[:6] + len(data).to_bytes(4, "big") + data[10:]
    with contextlib.suppress(StateError):
        assert decode_file(data, "f", KEYS[16])
    with contextlib.suppress(StateError):
        assert decode_migration(data, "f", KEYS[16], OTHERS[16])


@pytest.mark.parametrize("head", ["0101000a00000000000a", "0201000a0000000000100001 00000000"])
def test_an_empty_state_is_none(head: str) -> None:
    data = bytes.fromhex(head)
    for decoded in (decode_file, decode_migration):
        with pytest.raises(StateDamagedError, match=r"holds an empty state|holds no"):
            decoded(data, "f")


def test_no_iv_twice() -> None:
    assert encode_file(STATE, KEYS[32]) != encode_file(STATE, KEYS[32])


# -- key forms


def opens(key: SwtpmKey, raw: bytes) -> bool:
    return decode_file(encode_file(STATE, key), "f", SwtpmKey(raw)) == STATE


def test_keys_from_text_and_bytes() -> None:
    raw = bytes(range(32))
    assert opens(SwtpmKey.from_binary(raw, 32), raw)
    assert opens(SwtpmKey.from_binary(raw[:16], 32), raw[:16])
    for text in (raw.hex(), "0x" + raw.hex(), raw.hex().upper() + "\n", raw.hex() + " and what follows"):
        assert opens(SwtpmKey.from_hex(text.encode(), 32), raw)
    assert opens(SwtpmKey.from_hex(raw[:16].hex().encode(), 16), raw[:16])
    for size in (16, 32):
        derived = hashlib.pbkdf2_hmac("sha512", b"pass\n", b"swtpm", 1000, size)
        assert opens(SwtpmKey.from_passphrase(b"pass\n", size), derived)
        assert opens(SwtpmKey.from_passphrase(b"pass\n", size, "sha512"), hashlib.sha512(b"pass\n").digest()[:size])


@pytest.mark.parametrize("text", [b"", b"0x", b"00" * 15, b"00" * 17, b"00" * 32, b"0g" * 16, b" " + b"00" * 16])
def test_wrong_hexadecimal_keys(text: bytes) -> None:
    with pytest.raises(UsageError, match="not what its mode wants"):
        SwtpmKey.from_hex(text, 16)


def test_wrong_binary_keys() -> None:
    for size, limit in ((0, 16), (15, 16), (17, 32), (32, 16), (33, 32)):
        with pytest.raises(UsageError):
            SwtpmKey.from_binary(bytes(size), limit)


def test_keys_are_wiped() -> None:
    key = SwtpmKey(b"k" * 16)
    key.wipe()
    assert not any(key._key)
