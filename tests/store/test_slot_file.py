"""The two-slot file on a real disk: what it is opened from, what it refuses, who is fenced off."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateEmptyError,
    StateError,
    StateForeignError,
    StateNewerError,
    StateUnfinishedError,
    StoreError,
    StoreFencedError,
)
from crbd.state.slots import (
    MAX_GENERATION,
    MAX_PAYLOAD,
    SECTOR,
    SLOT_OFFSETS,
    Condition,
    check_payload,
    decode_head,
    encode_slot,
)
from crbd.store.slots import Loaded, SlotFile

FIRST, SECOND = SLOT_OFFSETS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tpm.state"


def written(path: Path, *payloads: bytes) -> None:
    slots = SlotFile.open(path, create=True)
    for payload in payloads:
        slots.commit(payload)
    slots.close()


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def loaded(slots: SlotFile) -> Loaded:
    found = slots.load()
    assert found is not None
    return found


def snapshot(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.parent.iterdir() if entry.is_file()}


def test_two_lives(path: Path) -> None:
    slots = SlotFile.open(path, create=True)
    assert slots.load() is None
    assert slots.previous() is None
    assert not path.exists()
    assert [slots.commit(b"one"), slots.commit(b"two"), slots.commit(b"three")] == [1, 2, 3]
    assert loaded(slots) == Loaded(b"three", 3, slots.writer_id)
    assert slots.previous() == Loaded(b"two", 2, slots.writer_id)
    slots.close()
    slots.close()
    assert {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()} == {path.name: 0o600}
    again = SlotFile.open(path, create=False)
    assert again.writer_id != slots.writer_id
    assert loaded(again) == Loaded(b"three", 3, slots.writer_id)
    assert again.previous() == Loaded(b"two", 2, slots.writer_id)
    assert again.commit(b"four") == 4
    assert loaded(again).writer_id == again.writer_id
    again.close()


def test_a_new_file_that_never_got_a_commit_leaves_nothing(path: Path) -> None:
    SlotFile.open(path, create=True).close()
    assert list(path.parent.iterdir()) == []


def test_an_interrupted_creation_is_told_from_absence_and_from_damage(path: Path) -> None:
    with pytest.raises(StateAbsentError, match=r"tpm\.state does not exist: .*--create"):
        SlotFile.open(path, create=False)
    interrupted = SlotFile.open(path, create=True)
    assert [entry.name for entry in path.parent.iterdir()] == [".tpm.state.new"]
    with pytest.raises(StateUnfinishedError, match=r"interrupted before anything was stored in it: .*--create"):
        SlotFile.open(path, create=False)
    again = SlotFile.open(path, create=True)
    again.commit(b"made after all")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    interrupted.close()
    again.close()


def put(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def damage_both(path: Path) -> None:
    written(path, b"one", b"two")
    patch(path, FIRST + SECTOR, b"X")
    patch(path, SECOND + SECTOR, b"X")


def damage_both_heads(path: Path) -> None:
    written(path, b"one", b"two")
    patch(path, FIRST + 20, b"X")
    patch(path, SECOND, b"X")


def head_of_tomorrow(generation: int) -> bytes:
    """A version-3 head that wants a version-3 reader: the first 12 bytes and the checksum are the same for ever."""
    head = bytearray(encode_slot(generation, generation - 1, bytes(16), b"")[:SECTOR])
    struct.pack_into(">HH", head, 8, 3, 3)
    struct.pack_into(">I", head, 508, zlib.crc32(head[:508]))
    return bytes(head)


def upgrade(path: Path) -> None:
    written(path, b"one", b"two", b"three")
    patch(path, SECOND, head_of_tomorrow(4))


def one_generation_twice(path: Path) -> None:
    written(path, b"one", b"two")
    patch(path, FIRST, encode_slot(2, 1, bytes(16), b"other"))


UNUSABLE: dict[str, tuple[Callable[[Path], object], type[StateError], str]] = {
    "empty": (put(b""), StateEmptyError, "is empty"),
    "a few zeros": (put(bytes(100)), StateEmptyError, "nothing but zeros"),
    "zeros": (put(bytes(SECOND + SECTOR)), StateEmptyError, "nothing but zeros"),
    "another program's": (put(b"\x7fELF" + bytes(10_000_000)), StateForeignError, "not crbd's state"),
    "short text": (put(b"hello"), StateForeignError, "not crbd's state"),
    "swtpm's linear file": (put(b"nilmptws" + bytes(1000)), StateForeignError, "swtpm's linear file"),
    "both payloads damaged": (damage_both, StateDamagedError, "neither of its two slots"),
    "both heads damaged": (damage_both_heads, StateDamagedError, "neither of its two slots"),
    "cut within the first head": (put(encode_slot(1, 0, bytes(16), b"")[:300]), StateDamagedError, "neither"),
    "one generation twice": (one_generation_twice, StateDamagedError, "generation 2 twice"),
    "newer format": (upgrade, StateNewerError, "slot format 3, this release reads up to 2: use the release"),
    "newer format alone": (put(head_of_tomorrow(1)), StateNewerError, "slot format 3"),
    "no file": (lambda path: path.mkdir(), StateAccessError, "cannot be opened"),
    "a pipe": (os.mkfifo, StateForeignError, "is no file"),
    "a link": (lambda path: path.symlink_to("/dev/null"), StateAccessError, "cannot be opened"),
    "no directory": (lambda path: path.parent.rmdir(), StateAbsentError, "does not exist"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("create", [False, True])
def test_refusals_name_the_file_and_change_nothing(path: Path, case: str, create: bool) -> None:
    make, kind, message = UNUSABLE[case]
    make(path)
    if case == "no directory":
        kind, message = (StateAccessError, "cannot be made") if create else (kind, message)
        with pytest.raises(kind, match=message):
            SlotFile.open(path, create=create)
        return
    before = snapshot(path)
    with pytest.raises(StateError, match=message) as refusal:
        SlotFile.open(path, create=create)
    assert type(refusal.value) is kind
    assert str(path) in str(refusal.value)
    assert refusal.value.remedy
    assert snapshot(path) == before


@pytest.mark.parametrize(
    ("place", "survivor", "claim"),
    [
        ((FIRST + SECTOR, b"X"), 2, "claims generation 3"),
        ((FIRST + 100, b"X"), 2, "does not say"),
        ((FIRST, b"X"), 2, "not a slot"),
        ((FIRST, bytes(SECTOR)), 2, "never written"),
        ((SECOND + SECTOR, b"X"), 3, "claims generation 2"),
        ((SECOND, bytes(SECTOR)), 3, "never written"),
    ],
)
def test_one_damaged_slot_is_survived_but_not_in_silence(
    path: Path, caplog: pytest.LogCaptureFixture, place: tuple[int, bytes], survivor: int, claim: str
) -> None:
    written(path, b"one", b"two", b"three")
    patch(path, *place)
    slots = SlotFile.open(path, create=False)
    found = loaded(slots)
    assert (found.generation, found.fell_back) == (survivor, True)
    assert slots.previous() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert claim in record.getMessage()
    assert f"generation {survivor} of the other is used" in record.getMessage()
    assert f"generation {survivor + 1} may have been lost" in record.getMessage()
    assert str(path) in record.getMessage()
    slots.commit(b"next")
    assert not loaded(slots).fell_back
    slots.close()
    caplog.clear()
    SlotFile.open(path, create=False).close()
    assert not caplog.records


def test_a_file_that_was_cut_short(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(path, b"one", b"two", b"three")
    os.truncate(path, 2000)
    slots = SlotFile.open(path, create=False)
    assert loaded(slots) == Loaded(b"three", 3, loaded(slots).writer_id, fell_back=True)
    assert "the file ends before it" in caplog.text
    assert slots.commit(b"four") == 4
    slots.close()
    assert loaded(SlotFile.open(path, create=False)).payload == b"four"


def test_an_undo_of_another_line_is_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The slot of an older copy: a disk that called a write durable and lost it leaves just this."""
    written(path, b"one", b"two", b"three")
    old = encode_slot(1, 0, bytes(16), b"one")
    patch(path, SECOND, old)
    slots = SlotFile.open(path, create=False)
    assert (loaded(slots).generation, loaded(slots).fell_back, slots.previous()) == (3, False, None)
    assert "built upon generation 2, but the other slot holds 1" in caplog.text
    slots.close()


def slot_of_version_1(generation: int, base: int, payload: bytes) -> bytes:
    """As the first slot format was: the digest over the fields and the payload."""
    fields = struct.pack(">8sHHIQQ16sI", b"crbdslot", 1, 1, 0, generation, base, b"an older release", len(payload))
    head = (fields + hashlib.sha256(fields + payload).digest()).ljust(508, b"\0")
    return head + struct.pack(">I", zlib.crc32(head)) + payload


def test_slots_of_version_1_are_read_and_give_way_to_new_ones(path: Path) -> None:
    path.write_bytes(slot_of_version_1(7, 6, b"seven").ljust(SECOND, b"\0") + slot_of_version_1(6, 5, b"six"))
    slots = SlotFile.open(path, create=False)
    undo = slots.previous()
    assert undo is not None
    assert (loaded(slots).payload, loaded(slots).generation, undo.payload) == (b"seven", 7, b"six")
    assert slots.commit(b"eight") == 8
    slots.close()
    again = SlotFile.open(path, create=False)
    undo = again.previous()
    assert undo is not None
    assert (loaded(again).payload, undo.payload, undo.generation) == (b"eight", b"seven", 7)
    again.close()
    patch(path, FIRST + SECTOR, b"X")
    patch(path, SECOND + SECTOR, b"X")
    with pytest.raises(StateDamagedError):
        SlotFile.open(path, create=False)


def test_a_digest_that_is_not_the_payloads_makes_no_intact_slot(path: Path) -> None:
    written(path, b"one")
    slots = SlotFile.open(path, create=False)
    slots.commit(b"two", hashlib.sha256(b"two").digest())
    assert loaded(slots).payload == b"two"
    slots.commit(b"three", hashlib.sha256(b"two").digest())
    with pytest.raises(StateDamagedError):
        slots.load()
    slots.close()
    assert loaded(SlotFile.open(path, create=False)).payload == b"two"


def test_a_head_that_does_not_say_the_same_twice(path: Path) -> None:
    """As a torn sector leaves it, by a chance of 1 in 2**32 with a CRC that holds."""
    old, new = (bytearray(encode_slot(number, number - 1, bytes(16), b"")[:SECTOR]) for number in (7, 9))
    for cut in range(1, 508):
        torn = new[:cut] + old[cut:]
        struct.pack_into(">I", torn, 508, zlib.crc32(torn[:508]))
        same = torn[:508] in (old[:508], new[:508])
        assert decode_head(bytes(torn)).condition is (Condition.INTACT if same else Condition.DAMAGED), cut


# -- fencing


def test_a_writer_that_was_overtaken_writes_nothing(path: Path) -> None:
    written(path, b"one")
    stale, owner = (SlotFile.open(path, create=False) for _ in range(2))
    owner.commit(b"two")
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreFencedError, match=r"another program wrote generation 2 to .*tpm\.state"):
            stale.commit(b"stale")
    assert path.read_bytes() == before
    owner.commit(b"three")
    with pytest.raises(StateDamagedError, match="changed while"):
        stale.load()
    assert owner.commit(b"four") == 4


def test_the_generation_alone_does_not_tell_writers_apart(path: Path) -> None:
    written(path, b"one", b"two")
    stale = SlotFile.open(path, create=False)
    taken = encode_slot(2, 1, b"another writer..", b"two")
    patch(path, SECOND, taken)
    with pytest.raises(StoreFencedError):
        stale.commit(b"three")


def test_a_file_that_was_replaced(path: Path) -> None:
    written(path, b"one")
    slots = SlotFile.open(path, create=False)
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    before = snapshot(path)
    with pytest.raises(StoreFencedError, match="replaced by another file"):
        slots.commit(b"two")
    assert snapshot(path) == before


def test_a_file_that_was_removed(path: Path) -> None:
    written(path, b"one")
    slots = SlotFile.open(path, create=False)
    path.unlink()
    with pytest.raises(StoreFencedError, match=r"tpm\.state was removed"):
        slots.commit(b"two")
    assert snapshot(path) == {}


def test_two_that_make_the_same_file(path: Path) -> None:
    first = SlotFile.open(path, create=True)
    second = SlotFile.open(path, create=True)
    with pytest.raises(StoreFencedError, match="replaced by another file"):
        first.commit(b"first")
    second.commit(b"second")
    first.close()
    assert loaded(SlotFile.open(path, create=False)).payload == b"second"


def test_a_file_that_another_made_meanwhile(path: Path) -> None:
    slots = SlotFile.open(path, create=True)
    path.write_bytes(b"theirs")
    with pytest.raises(StoreFencedError, match="made by another program"):
        slots.commit(b"ours")
    slots.close()
    assert snapshot(path) == {path.name: b"theirs"}


# -- disks


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail with EFBIG."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_and_then_does_again(path: Path) -> None:
    written(path, b"one")
    slots = SlotFile.open(path, create=False)
    with file_size_limit(SECOND + 70_000), pytest.raises(StoreError, match=os.strerror(errno.EFBIG)):
        slots.commit(b"2" * 100_000)
    assert loaded(slots).payload == b"one"
    assert slots.commit(b"2" * 100_000) == 3
    slots.close()
    assert loaded(SlotFile.open(path, create=False)).payload == b"2" * 100_000


def test_no_room_for_a_new_file(path: Path) -> None:
    with file_size_limit(SECOND), pytest.raises(StateAccessError, match="cannot be made"):
        SlotFile.open(path, create=True)
    assert snapshot(path) == {}


def test_a_directory_that_vanishes_and_comes_back(path: Path, tmp_path: Path) -> None:
    path = tmp_path / "in" / "tpm.state"
    path.parent.mkdir()
    slots = SlotFile.open(path, create=True)
    slots.commit(b"one")
    path.parent.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="its directory is gone") as error:
        slots.commit(b"two")
    assert not isinstance(error.value, StoreFencedError)
    assert loaded(slots).payload == b"one"
    (tmp_path / "away").rename(path.parent)
    assert slots.commit(b"two") == 2


def test_opened_for_reading_alone(path: Path) -> None:
    written(path, b"one")
    path.chmod(0o400)
    slots = SlotFile.open(path, create=False, writable=False)
    assert loaded(slots).payload == b"one"
    with pytest.raises(StoreError):
        slots.commit(b"two")
    assert loaded(slots).payload == b"one"


def test_what_is_too_large(path: Path) -> None:
    slots = SlotFile.open(path, create=True)
    with pytest.raises(StoreError, match="do not fit"):
        slots.commit(bytes(MAX_PAYLOAD + 1))
    for number in (1, 2, 3):
        slots.commit(bytes([number]) * MAX_PAYLOAD)
    slots.close()
    again = SlotFile.open(path, create=False)
    undo = again.previous()
    assert undo is not None
    assert (loaded(again).payload, undo.payload) == (b"\3" * MAX_PAYLOAD, b"\2" * MAX_PAYLOAD)


# -- the codec


@given(st.integers(1, 1 << 62), st.binary(min_size=16, max_size=16), st.binary(max_size=2000))
def test_codec_both_ways(generation: int, writer_id: bytes, payload: bytes) -> None:
    image = encode_slot(generation, generation - 1, writer_id, payload)
    slot = decode_head(image[:SECTOR])
    assert slot.head is not None
    assert (slot.head.generation, slot.head.base, slot.head.writer_id) == (generation, generation - 1, writer_id)
    assert slot.head.length == len(payload) == len(image) - SECTOR
    assert check_payload(image[:SECTOR], slot.head, payload).condition is Condition.INTACT
    assert check_payload(image[:SECTOR], slot.head, payload + b"\0").condition is Condition.DAMAGED


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    payload = bytes(range(200))
    image = encode_slot(7, 6, b"w" * 16, payload)

    def judged(changed: bytes) -> Condition:
        slot = decode_head(changed[:SECTOR])
        if slot.condition is Condition.INTACT and slot.head is not None:
            slot = check_payload(changed[:SECTOR], slot.head, changed[SECTOR:][: slot.head.length])
        return slot.condition

    assert judged(image) is Condition.INTACT
    for bit in range(len(image) * 8):
        changed = bytearray(image)
        changed[bit // 8] ^= 1 << bit % 8
        assert judged(bytes(changed)) in (Condition.DAMAGED, Condition.FOREIGN)
    for size in range(len(image)):
        assert judged(image[:size]) in (Condition.DAMAGED, Condition.FOREIGN, Condition.CUT)


@given(st.binary(max_size=600))
def test_no_bytes_make_the_decoder_fail(sector: bytes) -> None:
    assert decode_head(sector).condition is not Condition.INTACT
    assert decode_head(b"crbdslot" + sector).condition is Condition.DAMAGED


def sealed(**fields: int) -> bytes:
    """A head whose checksum holds, with fields no encoder writes."""
    head = bytearray(encode_slot(5, 4, bytes(16), b"")[:SECTOR])
    places = {"generation": (">Q", 16), "base": (">Q", 24), "length": (">I", 48)}
    for name, value in fields.items():
        struct.pack_into(places[name][0], head, places[name][1], value)
    head[424:508] = head[:84]
    struct.pack_into(">I", head, 508, zlib.crc32(head[:508]))
    return bytes(head)


@pytest.mark.parametrize(
    "sector",
    [
        sealed(length=MAX_PAYLOAD + 1),
        sealed(length=0xFFFFFFFF),
        sealed(generation=0),
        sealed(generation=4),
        sealed(generation=1 << 63),
        sealed(base=1 << 63),
    ],
)
def test_fields_out_of_range(sector: bytes) -> None:
    assert decode_head(sector).condition is Condition.DAMAGED
    assert decode_head(sealed()).condition is Condition.INTACT


def test_after_the_last_generation_there_is_none(path: Path) -> None:
    path.write_bytes(encode_slot(MAX_GENERATION, 0, bytes(16), b"state").ljust(SLOT_OFFSETS[1] + SECTOR, b"\0"))
    slots = SlotFile.open(path, create=False)
    with pytest.raises(StoreError, match="the last there can be"):
        slots.commit(b"more")
    loaded = slots.load()
    assert loaded is not None
    assert loaded.payload == b"state"
    slots.close()
