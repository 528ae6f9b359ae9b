"""`--key`: every form, and every complaint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from crbd.compat.swtpm_grammar import parse_values
from crbd.compat.swtpm_keys import read_key
from crbd.compat.swtpm_options import KEY_TABLE
from crbd.errors import UsageError
from crbd.state.swtpm_sealing import SwtpmKey

KEY = bytes(range(32))
VECTOR = bytes(32)


def read(text: str) -> SwtpmKey:
    return read_key(parse_values(text, KEY_TABLE, "key"))


def same(one: SwtpmKey, other: SwtpmKey) -> bool:
    return one.size == other.size and one.encrypt(b"state", VECTOR) == other.encrypt(b"state", VECTOR)


@pytest.mark.parametrize(
    ("content", "options", "key"),
    [
        (KEY[:16].hex().encode(), "", KEY[:16]),
        (b"0x" + KEY[:16].hex().encode() + b"\n", ",mode=aes-cbc", KEY[:16]),
        (KEY[:16].hex().upper().encode(), ",mode=aes-128-cbc,format=hex", KEY[:16]),
        (KEY.hex().encode(), ",mode=aes-256-cbc", KEY),
        (KEY[:16], ",format=binary", KEY[:16]),
        (KEY, ",format=binary,mode=aes-256-cbc", KEY),
    ],
)
def test_keys(tmp_path: Path, content: bytes, options: str, key: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    assert same(read(f"file={path}{options}"), SwtpmKey(key))
    number = os.open(path, os.O_RDONLY)
    assert same(read(f"fd={number}{options}"), SwtpmKey(key))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("size", [16, 32])
def test_passphrases(tmp_path: Path, size: int) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"pass\n")
    mode = f"mode=aes-{size * 8}-cbc"
    pbkdf2 = SwtpmKey(hashlib.pbkdf2_hmac("sha512", b"pass\n", b"swtpm", 1000, size))
    sha512 = SwtpmKey(hashlib.sha512(b"pass\n").digest()[:size])
    assert same(read(f"pwdfile={path},{mode}"), pbkdf2)
    assert same(read(f"pwdfile={path},{mode},kdf=pbkdf2"), pbkdf2)
    assert same(read(f"pwdfile={path},{mode},kdf=sha512"), sha512)
    reading, writing = os.pipe()
    os.write(writing, b"pass\n")
    os.close(writing)
    assert same(read(f"pwdfd={reading},{mode}"), pbkdf2)


def test_remove(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for option, stays in ((",remove=false", True), ("", True), (",remove", False)):
        path.write_text("00" * 16)
        read(f"file={path}{option}")
        assert path.exists() is stays
    path.write_text("not a key")
    with pytest.raises(UsageError):
        read(f"file={path},remove")
    assert path.exists()


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        (b"1234", "", "Unsupported key length with 4 digits."),
        (b"", "", "Unsupported key length with 0 digits."),
        (KEY.hex().encode(), "", "Could not parse key hex string into 16 byte buffer."),
        (KEY[:16].hex().encode(), ",mode=aes-256-cbc", "The provided key is too short. Got 16 bytes, need 32."),
        (KEY, ",format=binary", "the key has 32 bytes"),
        (KEY[:15], ",format=binary", "the key has 15 bytes"),
        (b"x" * (1024 * 1024 + 1), ",format=binary", "Key is larger than buffer"),
    ],
)
def test_what_is_no_key(tmp_path: Path, content: bytes, options: str, complaint: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(f"file={path}{options}")
    assert str(caught.value).startswith(complaint)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for text, complaint in (
        (f"pwdfile={tmp_path / 'no'}", f"Unable to open file {tmp_path / 'no'} : No such file or directory"),
        (f"file={tmp_path / 'no'}", f"Unable to open file {tmp_path / 'no'}: No such file or directory"),
        (f"file={tmp_path}", "Unable to read key: Is a directory"),
        ("pwdfd=9999", "Unable to read passphrase: Bad file descriptor"),
    ):
        with pytest.raises(UsageError) as caught:
            read(text)
        assert str(caught.value) == complaint
