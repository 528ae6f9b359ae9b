"""swtpm's linear layout: against swtpm, against crashes, and against bytes that are something else."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import (
    StateAbsentError,
    StateDamagedError,
    StateEmptyError,
    StateError,
    StateForeignError,
    StateLockedError,
    StateNewerError,
    StateUnfinishedError,
    StoreError,
    StoreFencedError,
)
from crbd.state.kinds import StateKind
from crbd.store.linear import HEAD_SIZE, LinearStore, Section, decode_head, encode_head, open_linear
from crbd.store.options import FileOptions
from tests.cli.process import ask, wait_until
from tests.engine import commands
from tests.store.recording import Acknowledge, Begin, Disk, Fault, Image, RecordingFile, replay

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE
PATH = Path("tpm.state")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tpm.state"


def test_head_both_ways() -> None:
    sections = {PERMANENT: Section(4096, 1315, 2048), SAVESTATE: Section(6144, 1, 1)}
    head = encode_head(sections)
    assert len(head) == HEAD_SIZE
    assert head[:24].hex() == "6e696c6d707477730100c000001000002305000000080000"
    assert head[24:36] == bytes(12)
    assert head[36:48].hex() == "001800000100000001000000"
    assert not any(head[48:])
    assert decode_head(head, "it") == sections


def patched(offset: int, data: bytes) -> bytes:
    head = encode_head({PERMANENT: Section(4096, 100, 128), VOLATILE: Section(4224, 10, 16)})
    return head[:offset] + data + head[offset + len(data) :]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", StateEmptyError, "is empty"),
        (bytes(5000), StateEmptyError, "is empty"),
        (b"crbdslot" + bytes(5000), StateForeignError, "not swtpm's linear file"),
        (patched(0, b"")[:191], StateDamagedError, "cut short: 191 bytes"),
        (patched(8, b"\2"), StateNewerError, "version 2, this release reads up to 1"),
        (patched(10, b"\xc1"), StateDamagedError, "contradicts itself"),
        (patched(12, b"\xbf\0"), StateDamagedError, "contradicts itself"),
        (patched(16, b"\x81"), StateDamagedError, "contradicts itself"),
        (patched(24, b"\x7f"), StateDamagedError, "contradicts itself"),
        (patched(12 + 3 * 12, b"\1"), StateForeignError, "more than one TPM"),
        (encode_head({VOLATILE: Section(192, 1, 1)}), StateDamagedError, "holds no permanent state"),
    ],
)
def test_refusals_name_the_file_and_change_nothing(
    path: Path, content: bytes, kind: type[StateError], message: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(StateError, match=message) as refusal:
        open_linear(path, create=False)
    assert type(refusal.value) is kind
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [patched(0, b""), patched(0, b"").ljust(4150, b"\0")])
def test_sections_that_are_not_there(path: Path, content: bytes) -> None:
    """Neither read as state nor carried over by a commit of something else."""
    path.write_bytes(content)
    store = open_linear(path, create=False)
    with pytest.raises(StateDamagedError, match=r"tpm\.state \(permall\)"):
        store.load(PERMANENT)
    with pytest.raises(StoreError, match=r"\(permall\) is damaged"):
        store.commit({VOLATILE: b"new"})
    assert path.read_bytes() == content
    store.close()


def test_absent_interrupted_and_empty(path: Path) -> None:
    with pytest.raises(StateAbsentError):
        open_linear(path, create=False)
    store = open_linear(path, create=True)
    assert not path.exists()
    with pytest.raises(StateUnfinishedError):
        open_linear(path, create=False)
    store.close()
    path.write_bytes(bytes(100_000))
    store = open_linear(path, create=True)
    assert store.load(PERMANENT) is None
    store.commit({PERMANENT: b"one"})
    store.close()
    assert path.stat().st_size == 100_000
    again = open_linear(path, create=False)
    assert again.load(PERMANENT) == b"one"
    again.close()


def test_a_file_does_not_grow_for_ever(path: Path) -> None:
    store = open_linear(path, create=True)
    for number in range(50):
        store.commit({PERMANENT: bytes([number]) * 3000, VOLATILE: bytes([number]) * 9000})
    assert path.stat().st_size < 60_000
    sections = decode_head(path.read_bytes()[:HEAD_SIZE], "it")
    assert {kind: section.reserved for kind, section in sections.items()} == {PERMANENT: 4096, VOLATILE: 16384}
    assert store.load(PERMANENT) == bytes([49]) * 3000
    assert store.load(VOLATILE) == bytes([49]) * 9000
    store.close()


# -- locks and fences

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""
"""As swtpm 0.10 and later: a record lock on the file itself."""


def test_locks(path: Path) -> None:
    store = open_linear(path, create=True)
    store.commit({PERMANENT: b"one"})
    with pytest.raises(StateLockedError, match=r"tpm\.state is in use"):
        open_linear(path, create=False)
    store.release()
    other = open_linear(path, create=False)
    other.commit({PERMANENT: b"two"})
    with pytest.raises(StateLockedError):
        store.lock()
    other.close()
    with pytest.raises(StoreError, match="not locked"):
        store.commit({PERMANENT: b"stale"})
    store.lock()
    assert store.load(PERMANENT) == b"two"
    store.commit({PERMANENT: b"three"})
    store.close()


def test_a_writer_that_locks_do_not_keep_away_is_noticed(path: Path) -> None:
    unlocked = FileOptions(locking=False)
    store = open_linear(path, create=True, options=unlocked)
    store.commit({PERMANENT: b"one"})
    other = open_linear(path, create=False, options=unlocked)
    other.commit({PERMANENT: b"two"})
    with pytest.raises(StoreFencedError, match="another program wrote"):
        store.commit({PERMANENT: b"stale"})
    assert other.load(PERMANENT) == b"two"
    store.close()
    other.close()


def test_locked_as_swtpm_does(path: Path) -> None:
    path.write_bytes(encode_head({}))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        with pytest.raises(StateLockedError, match=f"in use by process {holder.pid}"):
            open_linear(path, create=False)
        holder.stdin.close()


# -- crashes: sectors whole, as this layout has but one head


def opened(file: RecordingFile, *, create: bool) -> LinearStore:
    store = LinearStore(PATH, lambda create: file, create=create)
    store.lock()
    return store


def content(number: int, size: int) -> dict[StateKind, bytes | None]:
    """Another for every number; every third commit deletes the volatile state, every fifth leaves it alone."""
    found: dict[StateKind, bytes | None] = {PERMANENT: random.Random(number).randbytes(size)}
    if number % 5 != 4:
        found[VOLATILE] = None if number % 3 == 2 else random.Random(-number).randbytes(1 + size // 2)
    return found


def all_of(store: LinearStore) -> tuple[bytes | None, bytes | None]:
    return store.load(PERMANENT), store.load(VOLATILE)


State = tuple[bytes | None, bytes | None]


class Caller:
    """Commits to a store on a recording file, as the service does: what failed goes along with the next commit."""

    def __init__(self, file: RecordingFile) -> None:
        self.file = file
        self.store = opened(file, create=True)
        self.pending: dict[StateKind, bytes | None] = {}
        self.states: list[State] = []
        """What each commit, counted from 0, was to bring about."""

    def commit(self, number: int, size: int) -> bool:
        """Whether it was acknowledged."""
        self.pending |= content(number, size)
        last = self.file.disk.acknowledged
        old = (None, None) if last is None else self.states[last]
        self.states.append((self.pending[PERMANENT], self.pending.get(VOLATILE, old[1])))
        self.file.note(Begin(number))
        try:
            self.store.commit(self.pending)
        except StoreError:
            return False
        self.file.note(Acknowledge(number))
        self.pending = {}
        return True


def expect_survival(disk: Disk, image: Image, states: list[State]) -> int | None:
    if not image.named:
        assert disk.acknowledged is None
        return None
    allowed = [number for number in (disk.acknowledged, *disk.begun) if number is not None]
    found = all_of(opened(RecordingFile(Disk.of(image)), create=False))
    matching = [number for number in allowed if states[number] == found]
    assert matching, f"none of {allowed}"
    return matching[0]


def test_every_crash_of_a_handful_of_commits() -> None:
    file = RecordingFile()
    caller = Caller(file)
    for number, size in enumerate((700, 300, 900, 100, 700)):
        assert caller.commit(number, size)
    survivors = set()
    for disk in replay(file.history):
        for image in disk.crashes((), limit=20_000):
            survivors.add((disk.acknowledged, expect_survival(disk, image, caller.states)))
    assert survivors == {(None, None), (None, 0), *((n, n) for n in range(5)), *((n, n + 1) for n in range(4))}


@given(st.integers(0, 1 << 32))
def test_lives_of_commits_and_faults(seed: int) -> None:
    chance = random.Random(seed)
    file = RecordingFile(chance=chance, whole_sectors=True)
    caller = Caller(file)
    for number in range(8):
        calls = ("pwrite", "fdatasync", "rename", "sync_directory", "pread")
        faulty = chance.random() < 0.5
        file.fault = Fault(chance.choice(calls), after=chance.randrange(1, 4)) if faulty else None
        acknowledged = caller.commit(number, chance.randrange(1, 2000))
        assert acknowledged or faulty
        file.fault = None
        now = all_of(caller.store)
        assert now == caller.states[number] if acknowledged else now in [(None, None), *caller.states]
        for _ in range(3):
            expect_survival(file.disk, file.disk.crash_whole(chance), caller.states)


@given(st.integers(0, 1 << 32))
def test_what_the_next_process_was_given_to_read_is_on_the_disk(seed: int) -> None:
    """The one before it was killed after a sync that failed, or before one: memory may show what no disk holds."""
    chance = random.Random(seed)
    file = RecordingFile(chance=chance, whole_sectors=True)
    caller = Caller(file)
    caller.commit(0, 500)
    file.fault = Fault(chance.choice(("pwrite", "fdatasync")), after=2)
    caller.commit(1, 500)
    found = all_of(opened(file, create=False))
    assert found in caller.states
    assert all_of(opened(RecordingFile(Disk.of(file.disk.crash_whole(chance))), create=False)) == found


# -- swtpm itself


@contextmanager
def swtpm(place: Path) -> Iterator[Path]:
    """Debian's swtpm on `place/tpm.state`, powered on and started; gives its data socket."""
    options = ["--tpm2", "--tpmstate", f"backend-uri=file://{place / 'tpm.state'}", "--flags", "startup-clear"]
    sockets = ["--server", f"type=unixio,path={place / 'data'}", "--ctrl", f"type=unixio,path={place / 'ctrl'}"]
    with subprocess.Popen(["swtpm", "socket", *options, *sockets, "--pid", f"file={place / 'pid'}"]) as process:
        try:
            wait_until(lambda: (place / "pid").exists() or process.poll() is not None, "swtpm's pid file")
            assert process.poll() is None
            yield place / "data"
            ask(place / "ctrl", (10).to_bytes(4, "big"), 4)
            ask(place / "ctrl", (3).to_bytes(4, "big"), 4)
            assert process.wait(10) == 0
        finally:
            process.kill()


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
def test_swtpm_and_crbd_take_turns(path: Path) -> None:
    """A TPM of swtpm's; crbd rewrites it at another place and another size, with one kind gone; swtpm goes on."""
    with swtpm(path.parent) as data:
        assert commands.code(ask(data, commands.nv_define(4), 19)) == commands.SUCCESS
        assert commands.code(ask(data, commands.nv_write(b"mine"), 19)) == commands.SUCCESS
    for turn in range(4):
        store = open_linear(path, create=False)
        permanent, volatile = all_of(store)
        assert permanent is not None
        assert volatile is not None
        if turn % 2:
            store.commit({VOLATILE: None})
        store.commit({PERMANENT: permanent, VOLATILE: volatile, SAVESTATE: b"x" * 100 * turn if turn else None})
        if turn == 3:
            store.commit({SAVESTATE: None})
        store.close()
        with swtpm(path.parent) as data:
            assert commands.nv_value(ask(data, commands.nv_read(4), 25)) == (b"mine", b"size")[turn > 1]
            if turn == 1:
                ask(data, commands.nv_define(2000, commands.NV_INDEX + 1), 19)
                assert commands.code(ask(data, commands.nv_write(b"size"), 19)) == commands.SUCCESS
    assert os.listdir(path.parent).count("tpm.state") == 1
