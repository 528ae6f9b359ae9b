"""Snapshots of a running TPM, and their way back; where that fails at any step the TPM is as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.crb.device import CrbDevice
from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, StateError, StateIdentityError, StateUnsealedError, StoreError
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.state.crb import saved
from crbd.state.document import decode, encode, verify
from crbd.state.keys import RawKey
from crbd.state.kinds import StateKind
from crbd.state.side import SideState
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import NewTpm
from crbd.store.layout import Layout, open_state
from crbd.store.memory import MemoryStore
from crbd.store.offline import create_state
from crbd.store.port import Store
from tests.engine import commands as c
from tests.state import samples as s

from .instances import CREATE
from .storage import directory, full_disk, opened

STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "crbd": lambda path: open_state(path, create=True, layout=Layout.CRBD),
    "sealed": lambda path: open_state(path, create=True, layout=Layout.CRBD, new=NewTpm("", (RawKey(s.KEY),))),
    "swtpm": lambda path: open_state(path, create=True, layout=Layout.SWTPM),
    "linear": lambda path: open_state(path / "file", create=True, layout=Layout.LINEAR),
}
PCR = 16


class Life:
    """A guest's TPM: what is in its PCR and in its NV index."""

    def __init__(self, store: Store, make: Callable[[StatePort], Engine] = FakeEngine) -> None:
        self.store = store
        self.instance = Instance(make, store, CREATE)

    def begin(self) -> Life:
        self.instance.init(delete_volatile=False)
        assert self.code(c.STARTUP_CLEAR) == c.SUCCESS
        assert self.code(c.nv_define(8)) == c.SUCCESS
        self.write(b"first...")
        self.extend(b"\x11")
        return self

    def code(self, command: bytes) -> int:
        return c.code(self.instance.execute(command))

    def write(self, value: bytes) -> None:
        assert self.code(c.nv_write(value)) == c.SUCCESS

    def extend(self, value: bytes) -> None:
        assert self.code(c.pcr_extend(PCR, value * 32)) == c.SUCCESS

    @property
    def shows(self) -> tuple[bytes, bytes]:
        return c.pcr_value(self.instance.execute(c.pcr_read(PCR))), c.nv_value(self.instance.execute(c.nv_read(8)))

    @property
    def stored(self) -> dict[StateKind, bytes | None]:
        return {kind: self.store.load(kind) for kind in StateKind}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("make", [FakeEngine, LibtpmsEngine])
def test_there_and_back(tmp_path: Path, store: str, make: Callable[[StatePort], Engine]) -> None:
    life = Life(STORES[store](tmp_path), make).begin()
    life.instance.set_locality(1)
    before, pages = life.shows, life.instance.register_pages()
    data = life.instance.snapshot()
    assert (life.shows, life.instance.register_pages()) == (before, pages), "it disturbed the TPM"
    pages = life.instance.register_pages()
    life.write(b"second..")
    life.extend(b"\x22")
    life.instance.set_locality(0)
    after = life.shows
    assert after[0] != before[0]
    with pytest.raises(StateError, match="--allow-rollback"):
        life.instance.restore(data, allow_rollback=False)
    assert life.shows == after
    said = life.instance.restore(data, allow_rollback=True)
    assert life.instance._locality == 1
    assert life.instance.register_pages()[0x80 + 10 :] == pages[0x80 + 10 :]
    assert life.shows == before
    if store in ("crbd", "sealed"):
        assert "generation 4 is the TPM again, as generation 6; generation 5 is lost" in said
        assert verify(data).sealed == (store == "sealed")
    life.extend(b"\x33")
    life.instance.close()


@pytest.mark.parametrize("store", ["crbd", "sealed", "swtpm", "linear"])
def test_the_restored_tpm_is_durable_before_anything_else_happens(tmp_path: Path, store: str) -> None:
    life = Life(STORES[store](tmp_path)).begin()
    data = life.instance.snapshot()
    before = life.shows
    life.write(b"second..")
    life.instance.restore(data, allow_rollback=True)
    life.store.close()  # the process dies

    again = Life(STORES[store](tmp_path))
    again.instance = Instance(FakeEngine, again.store, InstanceOptions(startup=Startup.CLEAR))
    again.instance.begin()
    pcr, nv = again.shows
    assert nv == before[1]
    # In crbd's layout the volatile state came along; a daemon that powers on by itself goes on from it.
    assert pcr == (before[0] if store in ("crbd", "sealed") else bytes(32))
    again.instance.close()


def test_init_after_a_restore_and_a_crash_is_a_reset(tmp_path: Path) -> None:
    life = Life(STORES["crbd"](tmp_path)).begin()
    life.instance.restore(life.instance.snapshot(), allow_rollback=True)
    life.store.close()
    again = Life(STORES["crbd"](tmp_path))
    again.instance.init(delete_volatile=False)
    assert again.code(c.pcr_read(PCR)) == c.INITIALIZE
    assert again.store.load(StateKind.VOLATILE) is None
    again.instance.close()


def test_a_tpm_that_is_off(tmp_path: Path) -> None:
    life = Life(STORES["crbd"](tmp_path))
    with pytest.raises(StateError, match="send INIT first"):
        life.instance.snapshot()
    life.begin()
    shown = life.shows
    life.instance.stop()
    data = life.instance.snapshot()
    life.instance.init(delete_volatile=False)
    assert life.code(c.STARTUP_CLEAR) == c.SUCCESS
    life.write(b"second..")
    life.instance.restore(data, allow_rollback=True)
    assert not life.instance.running
    life.instance.init(delete_volatile=False)
    assert life.code(c.STARTUP_CLEAR) == c.SUCCESS
    assert life.shows[1] == shown[1]
    life.instance.close()


def test_of_another_instance_and_sealed_otherwise(tmp_path: Path) -> None:
    for name in ("one", "two", "sealed"):
        (tmp_path / name).mkdir()
    one, two = Life(STORES["crbd"](tmp_path / "one")).begin(), Life(STORES["crbd"](tmp_path / "two")).begin()
    sealed = Life(STORES["sealed"](tmp_path / "sealed")).begin()
    shown = one.shows
    with pytest.raises(StateIdentityError):
        one.instance.restore(two.instance.snapshot(), allow_rollback=True)
    with pytest.raises(StateIdentityError):
        sealed.instance.restore(one.instance.snapshot(), allow_rollback=True)
    document = decode(sealed.instance.snapshot(), [RawKey(s.KEY)])
    with pytest.raises(StateUnsealedError):
        sealed.instance.restore(encode(document), allow_rollback=True)
    Life(MemoryStore()).begin().instance.restore(one.instance.snapshot(), allow_rollback=True)
    with pytest.raises(StateError, match="encrypted"):
        Life(MemoryStore()).begin().instance.restore(sealed.instance.snapshot(), allow_rollback=True)
    assert one.shows == shown
    for life in (one, two, sealed):
        life.instance.close()


def test_state_under_swtpms_encryption_is_not_handed_out_plain(tmp_path: Path) -> None:
    key = SwtpmKey(os.urandom(32))
    life = Life(open_state(tmp_path, create=True, layout=Layout.SWTPM, swtpm_key=key)).begin()
    with pytest.raises(StoreError, match="would be plain"):
        life.instance.snapshot()
    life.instance.close()


def test_registers_that_cannot_be_are_refused_first(tmp_path: Path) -> None:
    life = Life(MemoryStore()).begin()
    document = decode(life.instance.snapshot())
    assert document.crb is not None
    wrong = replace(document, crb=replace(document.crb, registers=(0xFFFFFFFF,) * 32))
    shown = life.shows
    with pytest.raises(StateError, match="registers"):
        life.instance.restore(encode(wrong), allow_rollback=True)
    assert life.shows == shown


# -- failure at any step


class Fragile(FakeEngine):
    """A TPM that rejects what it is given at the call when `calls_left` is used up."""

    calls_left = -1

    def _count(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise EngineError("TPMLIB_SetState", 0x1E)

    def set_state(self, kind: StateKind, data: bytes | None) -> None:
        if data is not None:
            self._count()
        super().set_state(kind, data)

    def start(self) -> None:
        self._count()
        super().start()


class FragileStore(MemoryStore):
    """The commit when `calls_left` is used up fails, before or after it has taken place in part."""

    calls_left = -1
    partly = False

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            if self.partly:
                super().commit({StateKind.PERMANENT: changes[StateKind.PERMANENT]})
            raise StoreError("no space left on device")
        super().commit(changes, side)


@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from(["set_state permanent", "set_state volatile", "start", "commit", "part of the commit"]),
)
def test_a_failure_leaves_the_tpm_as_it_was(powered: bool, kept: bool, fails: str) -> None:
    store = FragileStore()
    life = Life(store, Fragile).begin()
    data = life.instance.snapshot()
    life.extend(b"\x44")
    life.write(b"second..")
    if kept:
        life.instance.store_volatile()
    if not powered:
        life.instance.stop()
    frozen, pages, stored, side = life.instance.freeze(), life.instance.register_pages(), life.stored, store.load_side()
    engine = life.instance._engine
    assert isinstance(engine, Fragile)
    steps = {"set_state permanent": 1, "set_state volatile": 2, "start": 3}
    if fails in steps:
        engine.calls_left = steps[fails]
    else:
        store.calls_left, store.partly = 1, fails != "commit"
    with pytest.raises((StateError, EngineError, StoreError)):
        life.instance.restore(data, allow_rollback=True)
    assert life.instance.freeze() == frozen
    assert life.instance.register_pages() == pages
    assert life.instance.running == powered
    assert (life.stored, store.load_side()) == (stored, side)
    if powered:
        life.extend(b"\x55")
    assert life.instance.restore(data, allow_rollback=True)
    assert life.instance.running
    assert life.shows[1] == b"first..."


@given(st.sampled_from(Layout))
def test_a_full_disk_leaves_the_tpm_as_it_was(layout: Layout) -> None:
    with directory() as path:
        life = Life(opened(path, layout)).begin()
        data = life.instance.snapshot()
        life.extend(b"\x44")
        life.write(b"second..")
        shown, stored = life.shows, life.stored
        with full_disk(), pytest.raises(StoreError):
            life.instance.restore(data, allow_rollback=True)
        assert (life.shows, life.stored) == (shown, stored)
        with nullcontext():
            life.instance.restore(data, allow_rollback=True)
        assert life.shows[1] == b"first..."
        life.instance.close()


def test_a_document_of_a_uuid_that_is_nobodys(tmp_path: Path) -> None:
    """swtpm's layout knows no UUID: any TPM's snapshot will do."""
    life = Life(STORES["swtpm"](tmp_path)).begin()
    document = decode(life.instance.snapshot())
    other = replace(document, identity=replace(document.identity, uuid=uuid4()))
    life.instance.restore(encode(other), allow_rollback=True)
    life.instance.close()


# -- documents that say what no TPM of ours would


def restamped(data: bytes, **changes: int) -> bytes:
    """The document with another generation or time."""
    document = decode(data)
    identity = replace(document.identity, generation=changes.get("generation", document.identity.generation))
    return encode(replace(document, identity=identity, written=changes.get("written", document.written)))


def test_a_restore_that_was_refused_does_not_move_the_generation(tmp_path: Path) -> None:
    life = Life(STORES["crbd"](tmp_path)).begin()
    data = restamped(life.instance.snapshot(), generation=1 << 40)
    with pytest.raises(StateError, match="--allow-rollback"):
        life.instance.restore(data, allow_rollback=False)
    life.write(b"second..")
    assert verify(life.instance.snapshot()).generation < 100
    life.instance.close()


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("generation", [1 << 63, (1 << 64) - 1])
def test_a_generation_that_no_tpm_comes_to(tmp_path: Path, generation: int, allowed: bool) -> None:
    """Built upon it, the next commit might be the last."""
    life = Life(STORES["crbd"](tmp_path)).begin()
    data = restamped(life.instance.snapshot(), generation=generation)
    with pytest.raises(StateError, match="no TPM comes to"):
        life.instance.restore(data, allow_rollback=allowed)
    life.write(b"second..")
    life.instance.close()


@pytest.mark.parametrize("store", ["crbd", "swtpm"])
def test_a_time_that_no_calendar_has(tmp_path: Path, store: str) -> None:
    life = Life(STORES[store](tmp_path)).begin()
    data = restamped(life.instance.snapshot(), written=(1 << 64) - 1)
    assert "is the TPM again" in life.instance.restore(data, allow_rollback=True)
    life.write(b"second..")
    life.instance.close()


def test_a_tpm_last_written_at_no_time_is_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    life = Life(STORES["crbd"](tmp_path), LibtpmsEngine).begin()
    data = restamped(life.instance.snapshot(), written=(1 << 64) - 1)
    life.instance.close()
    create_state(tmp_path / "hostile", data)
    store = STORES["crbd"](tmp_path / "hostile")
    again = Life(store, LibtpmsEngine)
    again.instance.check()
    assert "was not shut down (last written second 18446744073709551615" in caplog.text
    again.instance.close()


def test_registers_with_a_command_under_way_are_nobodys(tmp_path: Path) -> None:
    """No answer would ever come, and every command find the TPM busy."""
    life = Life(STORES["crbd"](tmp_path)).begin()
    document = decode(life.instance.snapshot())
    device = CrbDevice(life.instance._registers.device.config)
    device.submit(0, c.GET_RANDOM)
    data = encode(replace(document, crb=saved(device.freeze())))
    with pytest.raises(StateError, match="command under way"):
        life.instance.restore(data, allow_rollback=True)
    life.write(b"second..")
    life.instance.close()
    create_state(tmp_path / "hostile", data)
    store = STORES["crbd"](tmp_path / "hostile")
    again = Life(store)
    again.instance = Instance(FakeEngine, store, InstanceOptions(startup=Startup.CLEAR))
    again.instance.begin()
    again.write(b"third...")
    again.instance.close()
