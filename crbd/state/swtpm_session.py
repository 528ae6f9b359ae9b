"""What swtpm's state blobs have no room for, and how it rides along: a tag of crbd's own in the volatile blob.

libtpms' volatile state holds PCRs, sessions and loaded objects. Not in it: the locality, the buffer size, the
tpmEstablished flag and which command came last, the saved type `Session`. A migration blob of crbd carries them in one
more TLV beside the DATA TLV, inside the migration key's encryption; swtpm skips tags that it does not know
(tests/service/test_migration_oracle.py asks it).

    u16 tag 0xCBD1, u32 length (big-endian, as all TLVs), then
    4 bytes "crbd", u8 version (1), the body of the `session` section, version 1 (crbd.state.saved)

A tag of that number from somebody else, or of a later version, is skipped: the blob is then as good as swtpm's own.
"""

from __future__ import annotations

from typing import Final

from crbd.state.saved import Session, decode_session, encode_session

SESSION_TAG: Final = 0xCBD1
_MAGIC = b"crbd"
_VERSION = 1
_HEAD = len(_MAGIC) + 1


def encode_carried(session: Session) -> bytes:
    """The TLV's data."""
    return _MAGIC + bytes((_VERSION,)) + encode_session(session)


def decode_carried(data: bytes, name: str) -> Session | None:
    """What the TLV's data carry; None if that is not ours to read.

    `name` (the blob's) goes into the error: StateDamagedError where the data are ours and malformed.
    """
    if data[:_HEAD] != _MAGIC + bytes((_VERSION,)):
        return None
    return decode_session(data[_HEAD:], name)
