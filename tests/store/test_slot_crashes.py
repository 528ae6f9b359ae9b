"""The two-slot file against every crash that POSIX and a disk of 512-byte sectors allow (recording.py says which)."""

from __future__ import annotations

import errno
import logging
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import StoreError
from crbd.state.slots import MAX_PAYLOAD, SLOT_OFFSETS, SLOT_SIZE, encode_slot
from crbd.store.slots import SlotFile
from tests.store.recording import Acknowledge, Begin, Disk, Fault, Image, RecordingFile, Rename, Sync, Write, replay

PATH = Path("tpm.state")
CUTS = (1, 8, 12, 16, 23, 24, 32, 48, 52, 84, 256, 508, 511)
"""Where a torn sector ends: within and between the fields of a head."""


def payload(number: int, size: int) -> bytes:
    """Another one for every number, in every sector."""
    return random.Random(number).randbytes(size)


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def commit(slots: SlotFile, file: RecordingFile, number: int, size: int) -> bool:
    """Commit payload `number`; whether it was acknowledged."""
    file.note(Begin(number))
    try:
        slots.commit(payload(number, size))
    except StoreError:
        return False
    file.note(Acknowledge(number))
    return True


def expect_survival(disk: Disk, image: Image, sizes: dict[int, int]) -> int | None:
    """Open what the crash left: exactly the last acknowledged commit, or one begun after it. Returns its number."""
    if not image.named:
        assert disk.acknowledged is None, "an acknowledged file has no name"
        return None
    slots = SlotFile.open(PATH, create=False, file=RecordingFile(Disk.of(image)))
    loaded = slots.load()
    assert loaded is not None
    allowed = [number for number in (disk.acknowledged, *disk.begun) if number is not None]
    found = [number for number in allowed if payload(number, sizes[number]) == loaded.payload]
    assert found, f"generation {loaded.generation} is none of {allowed}"
    slots.commit(b"life goes on")
    after = slots.load()
    assert after is not None
    assert after.payload == b"life goes on"
    assert after.generation == loaded.generation + 1
    return found[0]


def history_of(sizes: dict[int, int]) -> RecordingFile:
    """A new file and a commit of each size."""
    file = RecordingFile()
    slots = SlotFile.open(PATH, create=True, file=file)
    for number, size in sizes.items():
        assert commit(slots, file, number, size)
    return file


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16, 16), (40, 600, 600, 30, 700), (512, 1, 513, 0)])
def test_every_crash_of_a_handful_of_commits(sizes: tuple[int, ...]) -> None:
    numbered = dict(enumerate(sizes))
    file = history_of(numbered)
    survivors = set()
    for disk in replay(file.history):
        for image in disk.crashes(CUTS, limit=20_000):
            survivors.add((disk.acknowledged, tuple(disk.begun), expect_survival(disk, image, numbered)))
    # Both outcomes of every commit were seen: the old generation, and the new one before its acknowledgement.
    for before, number in pairwise(numbered):
        assert (before, (number,), before) in survivors
        assert (before, (number,), number) in survivors
    assert (None, (0,), None) in survivors


def test_a_commit_is_one_sync_of_few_bytes() -> None:
    """What the durability rests on, and what it costs."""
    file = history_of({0: 9000, 1: 9000, 2: 9000})
    begun = file.history.index(Begin(2))
    events = file.history[begun + 1 : -1]
    assert [type(event).__name__ for event in events] == ["Write", "Sync"]
    assert isinstance(events[0], Write)
    assert len(events[0].data) == 12288


def test_a_new_file_gets_its_name_after_its_contents() -> None:
    history = history_of({0: 100}).history
    assert history[-4:] == [Sync(True), Rename(False), Rename(True), Acknowledge(0)]


@pytest.mark.parametrize(
    ("sizes", "samples"), [((100, 200, 70_000, 100, 100), 30), ((100, MAX_PAYLOAD, MAX_PAYLOAD, 10), 1)]
)
def test_growing_and_shrinking(sizes: tuple[int, ...], samples: int) -> None:
    numbered = dict(enumerate(sizes))
    chance = random.Random(1)
    for disk in replay(history_of(numbered).history):
        for _ in range(samples):
            expect_survival(disk, disk.crash(chance), numbered)


FAULTS = st.one_of(
    st.none(),
    st.builds(
        Fault,
        st.sampled_from(("pread", "pwrite", "fdatasync", "rename", "sync_directory")),
        st.sampled_from((errno.EIO, errno.ENOSPC, errno.EROFS)),
        st.integers(1, 3),
    ),
)
SIZES = st.one_of(st.integers(0, 3000), st.sampled_from((65_024, 65_025, 200_000)))
ENDINGS = st.sampled_from(("", "", "power cut", "killed"))


@given(st.lists(st.tuples(SIZES, FAULTS, ENDINGS), min_size=1, max_size=12), st.integers(0, 1 << 32))
def test_lives_of_commits_faults_and_crashes(steps: list[tuple[int, Fault | None, str]], seed: int) -> None:
    """Through any number of lives: what was acknowledged is there, and so is what a later life was given to read."""
    chance = random.Random(seed)
    file = RecordingFile(chance=chance)
    slots = SlotFile.open(PATH, create=True, file=file)
    sizes: dict[int, int] = {}
    for number, (size, fault, ending) in enumerate(steps):
        sizes[number] = size
        file.fault = None if fault is None else Fault(fault.call, fault.number, fault.after)
        commit(slots, file, number, size)
        file.fault = None
        disk = file.disk
        image = disk.crash(chance)
        expect_survival(disk, image, sizes)
        if not ending:
            continue
        if ending == "power cut":
            file = RecordingFile(Disk.of(image), chance)
            file.disk.acknowledged, file.disk.begun = disk.acknowledged, list(disk.begun)
        if not file.published:
            file = RecordingFile(chance=chance)
            assert disk.acknowledged is None
        slots = SlotFile.open(PATH, create=True, file=file)
        if (loaded := slots.load()) is not None:
            seen = [known for known in sizes if payload(known, sizes[known]) == loaded.payload]
            file.disk.acknowledged, file.disk.begun = seen[-1], []


def test_after_any_fault_the_next_commit_works() -> None:
    for call in ("pwrite", "fdatasync", "rename", "sync_directory"):
        for first in (True, False):
            file = RecordingFile()
            slots = SlotFile.open(PATH, create=True, file=file)
            if not first:
                commit(slots, file, 0, 10)
            file.fault = Fault(call)
            failed = not commit(slots, file, 1, 70_000)
            assert failed is (first or call in ("pwrite", "fdatasync"))
            assert commit(slots, file, 2, 20)
            loaded = slots.load()
            assert loaded is not None
            assert loaded.payload == payload(2, 20)
            for image in file.disk.crashes(CUTS, limit=1):
                assert expect_survival(file.disk, image, {0: 10, 1: 70_000, 2: 20}) == 2


def test_a_failed_sync_is_followed_by_a_whole_new_write() -> None:
    """The same bytes again would not do: the kernel may call them written although they never were."""
    file = history_of({0: 10, 1: 10})
    slots = SlotFile.open(PATH, create=False, file=file)
    file.fault = Fault("fdatasync")
    assert not commit(slots, file, 2, 2000)
    assert file.disk.uncertain
    begun = len(file.history)
    assert commit(slots, file, 2, 2000)
    assert [type(event).__name__ for event in file.history[begun + 1 : -1]] == ["Write", "Sync"]
    assert not file.disk.uncertain
    loaded = slots.load()
    assert loaded is not None
    assert loaded.generation == 4, "the generation of the failed attempt is not used again"


@pytest.mark.parametrize(("writer_id", "fenced"), [(b"another writer..", True), (None, False)])
def test_a_slot_in_doubt_is_fenced_too(writer_id: bytes | None, fenced: bool) -> None:
    """Where an attempt of ours failed, its pieces are no other writer; a whole commit of another is."""
    file = history_of({0: 10, 1: 10})
    slots = SlotFile.open(PATH, create=False, file=file)
    file.fault = Fault("fdatasync")
    assert not commit(slots, file, 2, 10)
    file.note(Write(SLOT_OFFSETS[0], encode_slot(3, 2, writer_id or slots.writer_id, b"taken over")))
    assert commit(slots, file, 3, 10) is not fenced


def test_growing_costs_once() -> None:
    file = history_of({0: 10, 1: 10, 2: 70_000, 3: 70_000, 4: 70_000, 5: 71_000})
    written = [event.offset for event in file.history if isinstance(event, Write)]
    grown = [offset % SLOT_SIZE for offset in written if offset % SLOT_SIZE]
    assert grown == [65_536, 65_536]


def test_a_full_disk_takes_neither_the_state_nor_the_undo() -> None:
    file = history_of({0: 10, 1: 10})
    slots = SlotFile.open(PATH, create=False, file=file)
    file.fault = Fault("pwrite", errno.ENOSPC)
    assert not commit(slots, file, 2, 100_000)
    loaded, undo = slots.load(), slots.previous()
    assert loaded is not None
    assert undo is not None
    assert (loaded.generation, undo.generation) == (2, 1)
    again = SlotFile.open(PATH, create=False, file=RecordingFile(Disk.of(Image(file.disk.view, 1 << 30, True))))
    assert again.previous() == undo


def test_nothing_of_a_longer_payload_is_left() -> None:
    file = RecordingFile()
    slots = SlotFile.open(PATH, create=True, file=file)
    for content in (b"S" * 30_000, b"S" * 90_000):
        slots.commit(content)
    slots = SlotFile.open(PATH, create=False, file=file)
    for content in (b"x", b"y"):
        slots.commit(content)
    assert not any(b"SSSSSSSS" in sector for sector in file.disk.view.values())
