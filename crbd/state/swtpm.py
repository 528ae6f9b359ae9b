"""swtpm's saved form of one state blob: what lies in `tpm2-00.permall` and what travels in a migration.

Layout (swtpm 0.1 to 0.11), big-endian:

    u8 version, u8 min_version, u16 head size (10), u16 flags, u32 total length (head included)
    then TLVs: u16 tag, u32 length, data

A reader refuses a blob whose `min_version` is above what it knows, skips head bytes past the ten it knows, and skips
tags it does not know. In a file the state lies in one DATA TLV. In a migration blob a MIGRATION_DATA TLV holds the
DATA TLV. Either level may be encrypted instead (flags ENCRYPTED, MIGRATION_ENCRYPTED): ciphertext, HMAC and IV take
the TLV's place (`crbd.state.swtpm_sealing`). Version 1 has no TLVs: the state, or its ciphertext, follows the head.
Before there was a head there were files without one; no release wrote them for a TPM 2.0.

Keys. A file read with a key must be encrypted (swtpm: the same): a plain one may have been put there by someone
without the key. A migration blob may be plain although there is a migration key (swtpm: the same, so that a running
TPM can be moved to a host that encrypts).
"""

from __future__ import annotations

import secrets
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple

from crbd.errors import (
    StateDamagedError,
    StateNewerError,
    StateSealedError,
    StateUnsealedError,
    StateWrongKeyError,
)
from crbd.state.saved import Session
from crbd.state.swtpm_sealing import Entropy, SwtpmKey
from crbd.state.swtpm_session import SESSION_TAG, decode_carried, encode_carried

MAX_BLOB = 512 * 1024
"""Bytes; swtpm's own upper bound for a state blob (SET_STATEBLOB). A TPM 2.0 has about 1 to 150 kB."""

VERSION = 2
MIN_VERSION = 1
_HEAD = Struct(">BBHHI")
_TLV = Struct(">HI")


class BlobFlag(IntFlag):
    """What a blob's head says of its contents."""

    ENCRYPTED = 0x01
    MIGRATION_ENCRYPTED = 0x02
    MIGRATION_DATA = 0x04
    ENCRYPTED_256BIT_KEY = 0x08
    MIGRATION_256BIT_KEY = 0x10


class BlobTag(IntEnum):
    """Tags of the TLVs."""

    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    MIGRATION_DATA = 4
    ENCRYPTED_MIGRATION_DATA = 5
    IVEC_ENCRYPTED_DATA = 6
    IVEC_ENCRYPTED_MIGRATION_DATA = 7


class _Level(NamedTuple):
    """One of the two levels at which a blob may be encrypted: its tags, its flags, and its key's name."""

    plain: BlobTag
    encrypted: BlobTag
    vector: BlobTag
    flag: BlobFlag
    long_key: BlobFlag
    key: str
    option: str


_FILE: Final = _Level(
    BlobTag.DATA,
    BlobTag.ENCRYPTED_DATA,
    BlobTag.IVEC_ENCRYPTED_DATA,
    BlobFlag.ENCRYPTED,
    BlobFlag.ENCRYPTED_256BIT_KEY,
    "state key",
    "--key",
)
_MIGRATION: Final = _Level(
    BlobTag.MIGRATION_DATA,
    BlobTag.ENCRYPTED_MIGRATION_DATA,
    BlobTag.IVEC_ENCRYPTED_MIGRATION_DATA,
    BlobFlag.MIGRATION_ENCRYPTED,
    BlobFlag.MIGRATION_256BIT_KEY,
    "migration key",
    "--migration-key",
)


class MigrationState(NamedTuple):
    """What a migration blob holds."""

    state: bytes
    """The engine's state."""
    session: Session | None
    """What crbd sent along with volatile state; swtpm sends none."""


class _Blob(NamedTuple):
    version: int
    flags: BlobFlag
    body: bytes


def encode_file(state: bytes, key: SwtpmKey | None = None, *, entropy: Entropy = secrets.token_bytes) -> bytes:
    """The file form of an engine's state, encrypted where there is a key."""
    body, flags = _wrapped(state, _FILE, key, entropy)
    return _with_head(body, flags)


def decode_file(blob: bytes, name: str, key: SwtpmKey | None = None) -> bytes:
    """The engine's state out of a file's bytes; `name` (the path) goes into the errors.

    Raises StateDamagedError, StateNewerError, StateSealedError for want of a key, StateWrongKeyError, or
    StateUnsealedError for a plain file where there is a key.
    """
    found = _without_head(blob, name)
    if key is not None and found.version > 1 and not found.flags & BlobFlag.ENCRYPTED:
        raise StateUnsealedError(
            f"{name} is not encrypted, and a key was given for it",
            "if it should be encrypted, find out who replaced it; if not, leave the key away",
        )
    # Version 1's files say nothing of encryption: whoever has a key means it.
    encrypted = bool(found.flags & BlobFlag.ENCRYPTED) or (found.version == 1 and key is not None)
    return _some(_unwrapped(found, _FILE, key if encrypted else None, encrypted, name), name)


def encode_migration(
    state: bytes,
    key: SwtpmKey | None = None,
    file_key: SwtpmKey | None = None,
    *,
    session: Session | None = None,
    entropy: Entropy = secrets.token_bytes,
) -> bytes:
    """The migration form of an engine's state, as GET_STATEBLOB returns it.

    `key` is the migration key. `file_key` is given where the client did not ask for decrypted state: the state is
    encrypted by it inside. `session` goes along with volatile state (`crbd.state.swtpm_session`).
    """
    inner, flags = _wrapped(state, _FILE, file_key, entropy)
    if session is not None:
        inner += _tlv(SESSION_TAG, encode_carried(session))
    body, outer = _wrapped(inner, _MIGRATION, key, entropy)
    return _with_head(body, flags | outer | BlobFlag.MIGRATION_DATA)


def decode_migration(
    blob: bytes, name: str, key: SwtpmKey | None = None, file_key: SwtpmKey | None = None, *, encrypted: bool = False
) -> bytes:
    """The engine's state out of a blob that SET_STATEBLOB brought; `name` goes into the errors.

    `encrypted` is the request's own flag: it says that the file key encrypted the state, as the head's flag does.
    Raises as `decode_file`, but for a plain blob: that is taken although there is a key.
    """
    return open_migration(blob, name, key, file_key, encrypted=encrypted).state


def open_migration(
    blob: bytes, name: str, key: SwtpmKey | None = None, file_key: SwtpmKey | None = None, *, encrypted: bool = False
) -> MigrationState:
    """`decode_migration`, with what crbd sent along."""
    found = _without_head(blob, name)
    outer = bool(found.flags & BlobFlag.MIGRATION_ENCRYPTED)
    inner = encrypted or bool(found.flags & BlobFlag.ENCRYPTED)
    body = _unwrapped(found, _MIGRATION, key, outer, name)
    state = _some(_unwrapped(found._replace(body=body), _FILE, file_key, inner, name), name)
    carried = _find_or_none(body, SESSION_TAG, name) if found.version > 1 else None
    return MigrationState(state, None if carried is None else decode_carried(carried, name))


def _some(state: bytes, name: str) -> bytes:
    """An empty state is none: no engine writes one, and libtpms would take it for the wish to have none."""
    if not state:
        raise StateDamagedError(f"{name} holds an empty state", "restore it from a backup")
    return state


def _wrapped(data: bytes, level: _Level, key: SwtpmKey | None, entropy: Entropy) -> tuple[bytes, BlobFlag]:
    """The TLVs of one level, and the flags that they bring."""
    if key is None:
        return _tlv(level.plain, data), BlobFlag(0)
    vector = entropy(key.size)
    ciphertext, mac = key.encrypt(data, vector)
    flags = level.flag | (level.long_key if key.size == 32 else BlobFlag(0))
    return _tlv(level.encrypted, ciphertext) + _tlv(BlobTag.HMAC, mac) + _tlv(level.vector, vector), flags


def _unwrapped(blob: _Blob, level: _Level, key: SwtpmKey | None, encrypted: bool, name: str) -> bytes:
    """What one level holds. Raises a StateError."""
    if not encrypted:
        return blob.body if blob.version == 1 else _find(blob.body, level.plain, name)
    if key is None:
        raise StateSealedError(
            f"{name} is encrypted with a {level.key}", f"give the key swtpm was started with, by {level.option}"
        )
    if blob.version == 1:
        return key.decrypt_version_1(blob.body, name)
    bits = 256 if blob.flags & level.long_key else 128
    if bits != 8 * key.size:
        raise StateWrongKeyError(
            f"{name} is encrypted with a {level.key} of {bits} bits, and {level.option} gives one of {8 * key.size}",
            f"choose the mode swtpm was started with: {'aes-256-cbc' if bits == 256 else 'aes-cbc'}",
        )
    mac = _find(blob.body, BlobTag.HMAC, name)
    vector = _find_or_none(blob.body, level.vector, name)
    return key.decrypt(_find(blob.body, level.encrypted, name), mac, vector, name)


def _tlv(tag: int, data: bytes) -> bytes:
    return _TLV.pack(tag, len(data)) + data


def _with_head(body: bytes, flags: BlobFlag) -> bytes:
    return _HEAD.pack(VERSION, MIN_VERSION, _HEAD.size, flags, _HEAD.size + len(body)) + body


def _without_head(blob: bytes, name: str) -> _Blob:
    if len(blob) > MAX_BLOB:
        raise StateDamagedError(
            f"{name} is {len(blob)} bytes long, more than any TPM state", "restore it from a backup"
        )
    if len(blob) < _HEAD.size:
        raise StateDamagedError(f"{name} is cut short: {len(blob)} bytes", "restore it from a backup")
    version, min_version, head_size, flags, total = _HEAD.unpack_from(blob)
    if not _HEAD.size <= head_size <= len(blob):
        raise StateDamagedError(f"{name} has a head of {head_size} bytes", "restore it from a backup")
    if total != len(blob):
        raise StateDamagedError(f"{name} should be {total} bytes long and is {len(blob)}", "restore it from a backup")
    # After the length: of bytes that are no blob at all nobody should be told to look for a newer release.
    if min_version > VERSION:
        raise StateNewerError(
            f"{name} asks for a reader of blob version {min_version}, this release reads up to {VERSION}",
            "use the release of swtpm or crbd that wrote it, or a newer one",
        )
    if version == 0:
        raise StateDamagedError(f"{name} has blob version 0", "restore it from a backup")
    return _Blob(version, BlobFlag(flags), blob[head_size:])


def _find(body: bytes, wanted: BlobTag, name: str) -> bytes:
    found = _find_or_none(body, wanted, name)
    if found is None:
        raise StateDamagedError(f"{name} holds no {wanted.name} tag", "restore it from a backup")
    return found


def _find_or_none(body: bytes, wanted: int, name: str) -> bytes | None:
    offset = 0
    while offset < len(body):
        if len(body) - offset < _TLV.size:
            raise StateDamagedError(f"{name} ends inside a tag", "restore it from a backup")
        tag, length = _TLV.unpack_from(body, offset)
        offset += _TLV.size
        if length > len(body) - offset:
            raise StateDamagedError(f"{name} has a tag {tag} that is longer than the file", "restore it from a backup")
        if tag == wanted:
            return body[offset : offset + length]
        offset += length
    return None
