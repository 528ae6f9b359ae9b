"""swtpm's saved form of one state blob: what lies in `tpm2-00.permall` and what travels in a migration.

Layout (swtpm 0.7 to 0.11), big-endian:

    u8 version, u8 min_version, u16 head size (10), u16 flags, u32 total length (head included)
    then TLVs: u16 tag, u32 length, data

A reader refuses a blob whose `min_version` is above what it knows, skips head bytes past the ten it knows, and skips
tags it does not know. In a file the state lies in one DATA TLV. In a migration blob a MIGRATION_DATA TLV holds the
DATA TLV. Either level may be encrypted instead (flags ENCRYPTED, MIGRATION_ENCRYPTED); this module names the
encryption and refuses it, as crbd has no key of swtpm's form yet. Before version 1 of the head existed there were
files without one; none was written for a TPM 2.0.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

from crbd.errors import StateDamagedError, StateNewerError, StateSealedError

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


def encode_file(state: bytes) -> bytes:
    """The plain file form of an engine's state."""
    return _with_head(_tlv(BlobTag.DATA, state), BlobFlag(0))


def decode_file(blob: bytes, name: str) -> bytes:
    """The engine's state out of a file's bytes; `name` (the path) goes into the errors.

    Raises StateDamagedError, StateNewerError or StateSealedError.
    """
    flags, body = _without_head(blob, name)
    if flags & BlobFlag.ENCRYPTED:
        raise StateSealedError(
            f"{name} is encrypted", "crbd cannot read swtpm's encrypted state yet; run swtpm with its key"
        )
    return _find(body, BlobTag.DATA, name)


def encode_migration(state: bytes) -> bytes:
    """The plain migration form of an engine's state, as GET_STATEBLOB returns it."""
    return _with_head(_tlv(BlobTag.MIGRATION_DATA, _tlv(BlobTag.DATA, state)), BlobFlag.MIGRATION_DATA)


def decode_migration(blob: bytes, name: str) -> bytes:
    """The engine's state out of a blob that SET_STATEBLOB brought;

    `name` goes into the errors. Raises as `decode_file`.
    """
    flags, body = _without_head(blob, name)
    if flags & BlobFlag.MIGRATION_ENCRYPTED:
        raise StateSealedError(f"{name} is encrypted with a migration key", "start the source without a migration key")
    if flags & BlobFlag.ENCRYPTED:
        raise StateSealedError(f"{name} is encrypted with a state key", "start the source without a state key")
    return _find(_find(body, BlobTag.MIGRATION_DATA, name), BlobTag.DATA, name)


def _tlv(tag: BlobTag, data: bytes) -> bytes:
    return _TLV.pack(tag, len(data)) + data


def _with_head(body: bytes, flags: BlobFlag) -> bytes:
    return _HEAD.pack(VERSION, MIN_VERSION, _HEAD.size, flags, _HEAD.size + len(body)) + body


def _without_head(blob: bytes, name: str) -> tuple[BlobFlag, bytes]:
    if len(blob) > MAX_BLOB:
        raise StateDamagedError(
            f"{name} is {len(blob)} bytes long, more than any TPM state", "restore it from a backup"
        )
    if len(blob) < _HEAD.size:
        raise StateDamagedError(f"{name} is cut short: {len(blob)} bytes", "restore it from a backup")
    _, min_version, head_size, flags, total = _HEAD.unpack_from(blob)
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
    return BlobFlag(flags), blob[head_size:]


def _find(body: bytes, wanted: BlobTag, name: str) -> bytes:
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
    raise StateDamagedError(f"{name} holds no {wanted.name} tag", "restore it from a backup")
