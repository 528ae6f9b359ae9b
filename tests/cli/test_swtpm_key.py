"""swtpm's spelling of keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crbd.cli.swtpm_key import read_swtpm_key
from crbd.errors import UsageError
from crbd.state.swtpm import decode_file, encode_file
from crbd.state.swtpm_sealing import SwtpmKey

RAW = bytes(range(100, 132))
PHRASE = b"a passphrase with a line end\n"
FORMS: dict[str, tuple[bytes, str, SwtpmKey]] = {
    "hex": (RAW[:16].hex().encode() + b"\n", "file={}", SwtpmKey(RAW[:16])),
    "hex by name": (RAW[:16].hex().encode(), "file={},mode=aes-128-cbc,format=hex", SwtpmKey(RAW[:16])),
    "hex 256": (RAW.hex().encode(), "mode=aes-256-cbc,file={}", SwtpmKey(RAW)),
    "binary": (RAW[:16], "file={},format=binary,mode=aes-cbc", SwtpmKey(RAW[:16])),
    "binary 256": (RAW, "file={},format=binary,mode=aes-256-cbc", SwtpmKey(RAW)),
    "pbkdf2": (PHRASE, "pwdfile={}", SwtpmKey.from_passphrase(PHRASE, 16)),
    "pbkdf2 256": (PHRASE, "pwdfile={},mode=aes-256-cbc,kdf=pbkdf2", SwtpmKey.from_passphrase(PHRASE, 32)),
    "sha512": (PHRASE, "pwdfile={},kdf=sha512", SwtpmKey.from_passphrase(PHRASE, 16, "sha512")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path: Path, form: str) -> None:
    contents, text, key = FORMS[form]
    (tmp_path / "key").write_bytes(contents)
    sealed = encode_file(b"state", key)
    assert decode_file(sealed, "", read_swtpm_key(text.format(tmp_path / "key"), "--swtpm-key")) == b"state"
    descriptor = os.open(tmp_path / "key", os.O_RDONLY)
    by_descriptor = text.replace("file={}", f"fd={descriptor}")
    assert decode_file(sealed, "", read_swtpm_key(by_descriptor, "--swtpm-key")) == b"state"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("means nothing", ""),
        ("means nothing", "nonsense"),
        ("means nothing", "file="),
        ("means nothing", "file=key,remove=true"),
        ("means nothing", "file=key,file=key"),
        ("names 0 sources", "mode=aes-cbc"),
        ("names 2 sources", "file=key,pwdfile=key"),
        ("there is no mode=aes", "file=key,mode=aes"),
        ("there is no format=text", "file=key,format=text"),
        ("there is no kdf=md5", "pwdfile=key,kdf=md5"),
        ("goes without kdf=", "file=key,kdf=sha512"),
        ("goes without format=", "pwdfile=key,format=hex"),
        ("is no descriptor", "fd=x"),
        ("Bad file descriptor", "fd=999"),
        ("No such file", "file=absent"),
        ("holds nothing", "file=/dev/null"),
        ("holds nothing, or more", "file=/dev/zero"),
        ("not what its mode wants", "file=key,mode=aes-256-cbc"),
        ("has 32 bytes", "file=key,format=binary"),
    ],
)
def test_what_names_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_bytes(RAW[:16].hex().encode())
    with pytest.raises(UsageError, match=why):
        read_swtpm_key(text, "--swtpm-key")
