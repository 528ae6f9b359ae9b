"""The two-slot file: how a slot is laid out, and which of two slots holds the state. Bytes only; crbd.store.slots does
the reading and writing. Specified byte by byte in docs/slot-file.md.

Theory. A file has two slots at fixed places, and commits go into them in turn: a commit overwrites the older one and
leaves the newer alone, so one of the two is intact at every moment. The intact slot with the higher generation is the
state, and the other the undo. A slot is intact when its head is and the payload has the SHA-256 that the head says;
whatever sectors of a write are missing, it has not. That is the payload's own SHA-256 and nothing else's, so that who
hashed the payload already, as the document's encoder did, need not hash anything for a commit
(docs/decisions/0003-one-hash.md). A head is intact when its CRC holds and what it says stands in it twice, at its
beginning and at its end: a sector that is torn, old bytes up to some place and new ones from there, does not say the
same twice. Version 1 said it once, with a SHA-256 over that and the payload; such slots are read.

What can be told from two slots, and what cannot. Each head names its own generation G and the generation its writer
built upon, its base. Where the other slot holds that base, intact, nothing is missing: either G is the last commit, or
a later commit was begun and not one of its sectors arrived. Where the other slot is unreadable, it was one of three:

- a commit of G+1 that a crash cut off before it was acknowledged: the usual case, and nothing is lost;
- a commit of G+1 that was acknowledged and has been damaged since: *a loss*;
- the undo, damaged at rest: nothing but the undo is lost.

No reader can tell these apart. Telling the first from the second takes a mark on the disk, written and synced after
the commit and before its acknowledgement: a second sync, twice the price of a commit. And a cut-off write whose head
sector did not arrive looks like a damaged undo. So using the remaining slot is never silent: `Choice.fell_back` says
so, with the generation that the unreadable slot claims, where its head can still be read.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from struct import Struct

from crbd.errors import StateDamagedError, StateEmptyError, StateForeignError, StateNewerError

MAGIC = b"crbdslot"
VERSION = 2
OLDEST_READER = 2

SECTOR = 512
"""Bytes that a disk writes whole. A head is one sector."""

BLOCK = 4096
"""Bytes of a file system's block; slots begin at and are written in whole blocks."""

MAX_PAYLOAD = 4 * 1024 * 1024
"""Bytes; a longer one is refused before it is read."""

SLOT_SIZE = MAX_PAYLOAD + BLOCK
"""Bytes that a slot may at most take up: its head, the largest payload, and zeros to the end of the block."""

SLOT_OFFSETS = (0, SLOT_SIZE)
"""Where the slots begin. They never move, so a file grows without anything being moved."""

MAX_GENERATION = (1 << 63) - 1

_HEAD = Struct(">8sHHIQQ16sI")
_DIGEST_AT = _HEAD.size
_CRC = Struct(">I")
_CRC_AT = SECTOR - _CRC.size
_DIGEST_SIZE = sha256().digest_size
_SAID = _DIGEST_AT + _DIGEST_SIZE
"""Bytes of what a head says."""
_AGAIN_AT = _CRC_AT - _SAID
_GAP = bytes(_AGAIN_AT - _SAID)
_ONCE = 1
"""The slot format version that says it once, with a digest over that and the payload."""

_RESTORE = "restore it from a backup"
_SWTPM_LINEAR_MAGIC = b"nilmptws"


@dataclass(frozen=True, slots=True)
class SlotHead:
    """What a head says. `base` is the generation its writer built upon, 0 for none; `length` is the payload's."""

    generation: int
    base: int
    writer_id: bytes
    length: int
    digest: bytes
    """SHA-256 of the payload (format version 1: of the fields before it and the payload)."""
    version: int
    """Slot format version that the slot was written in."""


class Condition(Enum):
    """What became of a slot."""

    INTACT = "intact"
    BLANK = "never written"
    CUT = "missing, as the file ends before it,"
    DAMAGED = "damaged"
    FOREIGN = "not a slot"
    NEWER = "written by a newer release"


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as it was found. `head` is there when its checksum holds, whatever became of the payload."""

    condition: Condition
    head: SlotHead | None = None
    oldest_reader: int = 0
    """For NEWER: the slot format version that a reader needs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which slot holds the state (0 or 1), and what its operator must know."""

    current: int
    has_undo: bool
    """The other slot holds the generation that the current one was built upon."""
    fell_back: bool
    """The other slot is unreadable and may have held a newer generation."""
    complaint: str
    """One line for the log, naming both generations; empty where all is as it should be."""


def encode_head(generation: int, base: int, writer_id: bytes, length: int, payload_digest: bytes) -> bytes:
    """A head of one sector for a payload of `length` bytes, at most MAX_PAYLOAD, with that SHA-256.

    `writer_id` is 16 bytes. Raises ValueError.
    """
    fits = 0 <= length <= MAX_PAYLOAD and 0 <= base < generation <= MAX_GENERATION
    if not fits or len(writer_id) != 16 or len(payload_digest) != _DIGEST_SIZE:
        raise ValueError(f"no slot holds generation {generation} on {base} with {length} bytes")
    said = _HEAD.pack(MAGIC, VERSION, OLDEST_READER, 0, generation, base, writer_id, length) + payload_digest
    head = said + _GAP + said
    return head + _CRC.pack(zlib.crc32(head))


def encode_slot(generation: int, base: int, writer_id: bytes, payload: bytes) -> bytes:
    """Head and payload. Raises ValueError as `encode_head` does."""
    return encode_head(generation, base, writer_id, len(payload), sha256(payload).digest()) + payload


def decode_head(sector: bytes) -> Slot:
    """Judge a slot by its first sector; INTACT then means: so far, now `check_payload`.

    Never raises: what cannot be used is a condition.
    """
    if not any(sector):
        return Slot(Condition.BLANK if len(sector) == SECTOR else Condition.CUT)
    if not sector.startswith(MAGIC):
        return Slot(Condition.FOREIGN)
    if len(sector) < SECTOR or _CRC.unpack_from(sector, _CRC_AT)[0] != zlib.crc32(sector[:_CRC_AT]):
        return Slot(Condition.DAMAGED)
    _, version, oldest_reader, _, generation, base, writer_id, length = _HEAD.unpack_from(sector)
    if oldest_reader > VERSION:
        return Slot(Condition.NEWER, oldest_reader=oldest_reader)
    if version != _ONCE and sector[:_SAID] != sector[_AGAIN_AT:_CRC_AT]:
        return Slot(Condition.DAMAGED)
    if length > MAX_PAYLOAD or not base < generation <= MAX_GENERATION:
        return Slot(Condition.DAMAGED)
    digest = sector[_DIGEST_AT : _DIGEST_AT + _DIGEST_SIZE]
    return Slot(Condition.INTACT, SlotHead(generation, base, writer_id, length, digest, version))


def check_payload(sector: bytes, head: SlotHead, payload: bytes) -> Slot:
    """INTACT if `payload` is what `head`, decoded from `sector`, was written with; else DAMAGED."""
    digest = sha256(sector[:_DIGEST_AT] if head.version == _ONCE else b"")
    digest.update(payload)
    whole = len(payload) == head.length and digest.digest() == head.digest
    return Slot(Condition.INTACT if whole else Condition.DAMAGED, head)


def choose(slots: tuple[Slot, Slot], first_bytes: bytes, name: str) -> Choice:
    """Which slot to use. `first_bytes` are the first of the file, to name what it may be instead; `name` is its path.

    Raises StateNewerError if either slot needs a newer reader, even though the other could be read: going back behind
    what a newer release wrote is not this one's to decide. Where neither is intact, StateDamagedError,
    StateForeignError or StateEmptyError.
    """
    for slot in slots:
        if slot.condition is Condition.NEWER:
            raise StateNewerError(
                f"{name} asks for a reader of slot format {slot.oldest_reader}, this release reads up to {VERSION}",
                "use the release of crbd that wrote it, or a newer one",
            )
    first, second = (slot.head if slot.condition is Condition.INTACT else None for slot in slots)
    if first is None and second is None:
        raise _unusable(slots, first_bytes, name)
    if first is not None and second is not None and first.generation == second.generation:
        raise StateDamagedError(
            f"{name} holds generation {first.generation} twice, so two programs wrote it at once or it was patched",
            _RESTORE,
        )
    if second is None or (first is not None and first.generation > second.generation):
        assert first is not None
        return _choice(0, first, slots[1])
    return _choice(1, second, slots[0])


def _choice(current: int, head: SlotHead, other: Slot) -> Choice:
    if other.condition is Condition.INTACT and other.head is not None:
        if other.head.generation == head.base:
            return Choice(current, True, False, "")
        # Nothing newer can have been there, but a write that was called durable was not: the disk is not honest.
        complaint = (
            f"generation {head.generation} was built upon generation {head.base}, "
            f"but the other slot holds {other.head.generation}: there is no undo"
        )
        return Choice(current, False, False, complaint)
    if other.condition is Condition.BLANK and head.base == 0:
        return Choice(current, False, False, "")
    claim = f"claims generation {other.head.generation}" if other.head is not None else "does not say its generation"
    complaint = (
        f"one slot is {other.condition.value} and {claim}; generation {head.generation} of the other is used: if the "
        f"last run did not end in the middle of a write, generation {head.generation + 1} may have been lost"
    )
    return Choice(current, False, True, complaint)


def _unusable(
    slots: tuple[Slot, Slot], first_bytes: bytes, name: str
) -> StateDamagedError | StateEmptyError | StateForeignError:
    conditions = {slot.condition for slot in slots}
    if Condition.DAMAGED in conditions:
        return StateDamagedError(f"{name} is damaged: neither of its two slots is intact", _RESTORE)
    if Condition.FOREIGN not in conditions:
        what = "holds nothing but zeros" if first_bytes else "is empty"
        return StateEmptyError(f"{name} {what}", _EMPTY_REMEDY)
    if first_bytes.startswith(_SWTPM_LINEAR_MAGIC):
        return StateForeignError(f"{name} is swtpm's linear file", "open it in that layout, or convert it")
    return StateForeignError(f"{name} is not crbd's state", "check the path; nothing was changed")


_EMPTY_REMEDY = "restore it from a backup; where there never was a TPM, remove the file and use --create"
