"""What every store promises, whatever its layout: what is committed is found, locks late and early, the side state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from crbd.errors import StateAbsentError, StateError, StateLockedError, StoreError
from crbd.service.faults import FaultPlan
from crbd.service.injection import FaultyStore
from crbd.state.keys import RawKey
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Session
from crbd.state.side import SideState
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import NewTpm
from crbd.store.layout import Layout, open_state
from crbd.store.memory import MemoryStore
from crbd.store.port import Store
from tests.cli.states import key_file, state
from tests.state import samples as s

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE
ENGINE = EngineStamp(0, 9, 2)
SIDE = SideState(s.registers(), Session(3, 0xF80, True, 0x17B))
OTHER_SIDE = SideState(None, Session(0, 0x1000, False, 0))
SWTPM_KEY = SwtpmKey(bytes(range(32)))

Open = Callable[..., Store]


def opener(path: Path, layout: Layout, key: str) -> Open:
    """Opens the state at `path`, with `create` and unlocked if told so."""

    def open_it(*, create: bool = False, lock: bool = True) -> Store:
        keys = (RawKey(bytes(32)),) if key == "key" else ()
        store = open_state(
            path,
            create=create,
            layout=layout,
            new=NewTpm("", keys),
            swtpm_key=SWTPM_KEY if key == "swtpm" else None,
            lock=lock,
        )
        store.use_engine(ENGINE)
        return store

    return open_it


KEPT = [
    (Layout.CRBD, ""),
    (Layout.CRBD, "key"),
    (Layout.SWTPM, ""),
    (Layout.SWTPM, "swtpm"),
    (Layout.LINEAR, ""),
    (Layout.LINEAR, "swtpm"),
]


@pytest.fixture(params=KEPT, ids=lambda case: f"{case[0].value}{case[1] and ' sealed'}")
def open_it(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Every layout, plain and encrypted."""
    return opener(tmp_path / "state", *request.param)


def named(case: str | tuple[Layout, str]) -> str:
    return case if isinstance(case, str) else f"{case[0].value} {case[1]}"


@pytest.fixture(params=["memory", "no faults", *KEPT], ids=named)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A new and locked one of every layout, the ephemeral one, and that without faults."""
    if isinstance(request.param, str):
        made: Store = MemoryStore()
        if request.param == "no faults":
            made = FaultyStore(made, FaultPlan())
    else:
        made = opener(tmp_path / "state", *request.param)(create=True)
    made.use_engine(ENGINE)
    yield made
    made.close()


def test_what_is_committed_is_found(store: Store) -> None:
    assert store.name
    store.lock()
    store.lock()
    assert store.locked
    assert [store.load(kind) for kind in StateKind] == [None, None, None]
    store.commit({PERMANENT: b"one", VOLATILE: b"v"})
    assert store.load(PERMANENT) == b"one"
    assert store.load(VOLATILE) == b"v"
    store.commit({PERMANENT: b"two", VOLATILE: None})
    assert store.load(PERMANENT) == b"two"
    assert store.load(VOLATILE) is None
    store.commit({VOLATILE: None})
    store.commit({})
    assert store.load(PERMANENT) == b"two"
    store.close()
    store.close()


# -- locks


def test_without_the_lock_nothing_is_written(store: Store) -> None:
    store.commit({PERMANENT: b"one"})
    store.release()
    store.release()
    assert not store.locked
    for changes in ({PERMANENT: b"two"}, {PERMANENT: None}, {}):
        with pytest.raises(StoreError, match="not locked"):
            store.commit(changes)
    assert store.load(PERMANENT) == b"one"
    store.lock()
    assert store.load(PERMANENT) == b"one"
    store.commit({PERMANENT: b"two"})
    assert store.load(PERMANENT) == b"two"


def test_a_lock_that_is_released_can_be_had_by_another(open_it: Open) -> None:
    ours = open_it(create=True)
    ours.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
    with pytest.raises(StateLockedError, match="in use"):
        open_it()
    ours.release()
    theirs = open_it()
    with pytest.raises(StateLockedError, match="in use"):
        ours.lock()
    assert not ours.locked
    assert theirs.load_side() == SIDE
    theirs.commit({PERMANENT: b"two", VOLATILE: None, SAVESTATE: b"s"})
    assert [ours.load(kind) for kind in StateKind] == [b"two", None, b"s"]
    theirs.close()
    ours.lock()
    assert [ours.load(kind) for kind in StateKind] == [b"two", None, b"s"]
    assert ours.load_side() is None
    ours.commit({PERMANENT: b"three"})
    ours.close()
    again = open_it()
    assert [again.load(kind) for kind in StateKind] == [b"three", None, b"s"]
    again.close()


def test_opened_without_the_lock_it_reads_what_another_writes(open_it: Open) -> None:
    theirs = open_it(create=True)
    theirs.commit({PERMANENT: b"one"})
    ours = open_it(lock=False)
    assert not ours.locked
    assert ours.load(PERMANENT) == b"one"
    theirs.commit({PERMANENT: b"two"})
    theirs.commit({PERMANENT: b"three", VOLATILE: b"v"}, SIDE)
    assert ours.load(PERMANENT) == b"three"
    assert ours.load_side() == SIDE
    with pytest.raises(StateLockedError):
        ours.lock()
    theirs.close()
    ours.lock()
    assert ours.load(PERMANENT) == b"three"
    ours.commit({PERMANENT: b"four"})
    ours.close()


def test_opened_without_the_lock_it_makes_nothing(open_it: Open, tmp_path: Path) -> None:
    with pytest.raises(StateAbsentError):
        open_it(lock=False)
    store = open_it(create=True, lock=False)
    assert [store.load(kind) for kind in StateKind] == [None, None, None]
    assert store.load_side() is None
    assert list(tmp_path.iterdir()) == []
    store.lock()
    assert [store.load(kind) for kind in StateKind] == [None, None, None]
    store.commit({PERMANENT: b"one"})
    store.close()
    again = open_it()
    assert again.load(PERMANENT) == b"one"
    again.close()


def test_what_another_made_meanwhile_is_not_made_anew(open_it: Open) -> None:
    """Two that may both create: the one that is second finds the first one's TPM."""
    ours = open_it(create=True, lock=False)
    assert ours.load(PERMANENT) is None
    theirs = open_it(create=True)
    theirs.commit({PERMANENT: b"theirs"})
    theirs.close()
    ours.lock()
    assert ours.load(PERMANENT) == b"theirs"
    ours.close()


def test_a_tpm_that_was_here_and_is_gone_is_not_made_anew(open_it: Open, tmp_path: Path) -> None:
    store = open_it(create=True)
    store.commit({PERMANENT: b"one"})
    store.release()
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    with pytest.raises(StateAbsentError):
        store.lock()
    assert not store.locked
    with pytest.raises(StoreError, match="not locked"):
        store.commit({PERMANENT: b"two"})
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("state.")) == ["elsewhere"]
    store.close()


def test_a_directory_that_was_emptied_holds_no_new_tpm(open_it: Open, tmp_path: Path) -> None:
    store = open_it(create=True)
    store.commit({PERMANENT: b"one"})
    store.release()
    for path in [tmp_path / "state"] if (tmp_path / "state").is_file() else list((tmp_path / "state").iterdir()):
        path.unlink()
    with pytest.raises(StateAbsentError):
        store.lock()
    assert not store.locked
    store.close()


def test_state_that_was_sealed_anew_meanwhile_is_opened_anew(tmp_path: Path) -> None:
    """By the same user key; the data key is another."""
    store = opener(tmp_path / "state", Layout.CRBD, "key")(create=True)
    store.commit({PERMANENT: b"one"})
    store.release()
    key = key_file(tmp_path, bytes(32))
    options = ["--to", "crbd", "--in-place", "--key", key, "--new-key", key]
    state("convert", tmp_path / "state", *options)
    store.lock()
    assert store.load(PERMANENT) == b"one"
    store.commit({PERMANENT: b"two"})
    store.close()
    again = opener(tmp_path / "state", Layout.CRBD, "key")()
    assert again.load(PERMANENT) == b"two"
    again.close()


# -- the side state


def test_the_side_state_lives_as_long_as_the_volatile_state_it_belongs_to(store: Store) -> None:
    assert store.load_side() is None
    store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
    assert store.load_side() == SIDE
    store.commit({PERMANENT: b"two"})
    store.commit({SAVESTATE: b"s"})
    assert store.load_side() == SIDE
    store.commit({}, OTHER_SIDE)
    assert store.load_side() == OTHER_SIDE
    store.commit({VOLATILE: b"w"}, SIDE)
    assert store.load_side() == SIDE
    store.commit({VOLATILE: b"w"})
    assert store.load_side() is None
    store.commit({VOLATILE: b"w"}, SIDE)
    store.commit({VOLATILE: None})
    assert store.load_side() is None
    store.commit({VOLATILE: b"w"})
    assert store.load_side() is None


def test_a_side_state_without_volatile_state_is_a_mistake(store: Store) -> None:
    store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
    with pytest.raises(ValueError, match="there is none"):
        store.commit({PERMANENT: b"two", VOLATILE: None}, SIDE)
    assert store.load(PERMANENT) == b"one"
    store.commit({VOLATILE: None})
    with pytest.raises(ValueError, match="there is none"):
        store.commit({PERMANENT: b"two"}, SIDE)
    assert store.load(PERMANENT) == b"one"


def test_the_side_state_outlives_the_process(open_it: Open) -> None:
    store = open_it(create=True)
    store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
    store.close()
    again = open_it()
    assert again.load_side() == SIDE
    again.close()


SWTPMS = [case for case in KEPT if case[0] is not Layout.CRBD]


def side_file(path: Path, layout: Layout) -> Path:
    return path / "crbd.registers" if layout is Layout.SWTPM else path.with_name("state.registers")


@pytest.mark.parametrize(("layout", "key"), SWTPMS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes(1 << 20)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    ],
)
def test_a_side_file_that_cannot_be_read_keeps_no_tpm_from_starting(
    tmp_path: Path, layout: Layout, key: str, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    open_it = opener(tmp_path / "state", layout, key)
    store = open_it(create=True)
    store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
    store.close()
    spoil(side_file(tmp_path / "state", layout))
    again = open_it()
    assert again.load(VOLATILE) == b"v"
    assert again.load_side() is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "registers is left aside" in caplog.text
    again.close()


@pytest.mark.parametrize(("layout", "key"), SWTPMS)
def test_a_side_file_counts_only_beside_its_own_volatile_state(
    tmp_path: Path, layout: Layout, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """swtpm, which does not know the file, wrote in between."""
    open_it = opener(tmp_path / "state", layout, key)
    store = open_it(create=True)
    store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
    kept = side_file(tmp_path / "state", layout).read_bytes()
    store.commit({VOLATILE: b"of swtpm"})
    store.close()
    side_file(tmp_path / "state", layout).write_bytes(kept)
    again = open_it()
    assert again.load_side() is None
    assert "another program has written" in caplog.text
    again.close()


@pytest.mark.parametrize("layout", [Layout.SWTPM, Layout.LINEAR])
def test_a_side_file_beside_encrypted_state_is_encrypted(tmp_path: Path, layout: Layout) -> None:
    secret = bytes(SIDE.crb.buffer[:64]) if SIDE.crb is not None else b""
    assert len(secret) == 64
    found = []
    for place, key in (("plain", ""), ("sealed", "swtpm")):
        (tmp_path / place).mkdir()
        store = opener(tmp_path / place / "state", layout, key)(create=True)
        store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SIDE)
        store.close()
        path = side_file(tmp_path / place / "state", layout)
        assert path.stat().st_mode & 0o777 == 0o600
        found.append(b"crbdside" in path.read_bytes())
    assert found == [True, False]


# -- which instance


def test_the_instance_that_is_expected(tmp_path: Path) -> None:
    wanted, other = UUID(int=7), UUID(int=8)
    store = open_state(tmp_path / "state", create=True, uuid=wanted)
    store.use_engine(ENGINE)
    store.commit({PERMANENT: b"one"})
    store.close()
    open_state(tmp_path / "state", create=False, uuid=wanted).close()
    with pytest.raises(StateError, match=f"belongs to instance {wanted}, not to {other}") as refusal:
        open_state(tmp_path / "state", create=True, uuid=other)
    assert refusal.value.exit_code == 41
    for layout in (Layout.SWTPM, Layout.LINEAR):
        with pytest.raises(StateError, match="does not say that it is instance") as refusal:
            open_state(tmp_path / layout.value, create=True, layout=layout, uuid=wanted)
        assert refusal.value.exit_code == 41
        assert not (tmp_path / layout.value).exists()
