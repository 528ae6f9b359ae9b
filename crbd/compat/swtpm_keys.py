"""`--key` and `--migration-key` of the swtpm command (swtpm 0.11: common.c, key.c)."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from crbd.compat.swtpm_grammar import Values
from crbd.errors import UsageError
from crbd.state.swtpm_sealing import Kdf, SwtpmKey

MAX_SIZE = 1024 * 1024
"""Bytes of a key or passphrase file at most; swtpm has no limit."""
_SIZES = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}
_KDFS: dict[str, Kdf] = {"pbkdf2": "pbkdf2", "sha512": "sha512"}
_SOURCES = ("file", "fd", "pwdfile", "pwdfd")


def read_key(values: Values) -> SwtpmKey:
    """The key; a descriptor is closed, and a file removed where `remove` asks for that. Raises UsageError."""
    source = next((name for name in _SOURCES if _where(values, name) is not None), None)
    if source is None:
        raise UsageError("Either file=, fd=, pwdfile=, or pwdfd= is required for key option")
    form = values.string("format") or "hex"
    if form not in ("hex", "binary"):
        raise UsageError(f"Unknown key format '{form}'.")
    mode = values.string("mode") or "aes-128-cbc"
    if mode not in _SIZES:
        raise UsageError(f"Unknown encryption mode '{mode}'.")
    kdf = values.string("kdf") or "pbkdf2"
    if source.startswith("pwd") and kdf not in _KDFS:
        raise UsageError(f"Unknown kdf '{kdf}'.")
    found = _read(values, source)
    if source.startswith("pwd"):
        key = SwtpmKey.from_passphrase(found, _SIZES[mode], _KDFS[kdf])
    elif form == "binary":
        key = SwtpmKey.from_binary(found, _SIZES[mode])
    else:
        _check_hex(found, _SIZES[mode])
        key = SwtpmKey.from_hex(found, _SIZES[mode])
    if values.flag("remove"):
        for name in ("file", "pwdfile"):
            path = values.string(name)
            if path is not None:
                with suppress(OSError):  # swtpm promises to try, no more
                    os.unlink(path)
    return key


def _check_hex(text: bytes, size: int) -> None:
    match = re.match(rb"(?:0x)?([0-9a-fA-F]*)", text)
    digits = 0 if match is None else len(match[1])
    if digits > 2 * size:
        raise UsageError(f"Could not parse key hex string into {size} byte buffer.")
    if digits not in (32, 64):
        raise UsageError(f"Unsupported key length with {digits} digits.")
    if digits < 2 * size:
        raise UsageError(f"The provided key is too short. Got {digits // 2} bytes, need {size}.")


def _where(values: Values, source: str) -> str | int | None:
    return values.descriptor(source) if source.endswith("fd") else values.string(source)


def _read(values: Values, source: str) -> bytes:
    path = values.string(source)
    descriptor = values.descriptor(source)
    if path is not None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            # swtpm writes a blank before the one colon and none before the other.
            blank = " " if source == "pwdfile" else ""
            raise UsageError(f"Unable to open file {path}{blank}: {error.strerror}") from error
    try:
        with open(descriptor or 0, "rb") as file:
            found = file.read(MAX_SIZE + 1)
    except OSError as error:
        what = "passphrase" if source.startswith("pwd") else "key"
        raise UsageError(f"Unable to read {what}: {error.strerror}") from error
    if len(found) > MAX_SIZE:
        raise UsageError(f"Key is larger than buffer ({len(found)} > {MAX_SIZE}).")
    return found
