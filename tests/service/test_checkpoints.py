"""What of the volatile state lies in the store, and who goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, StoreError
from crbd.service.checkpoint import changes_tpm
from crbd.service.instance import Instance
from crbd.service.options import CheckpointPolicy, InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.store.layout import Layout, open_state
from crbd.store.memory import MemoryStore
from crbd.store.port import Store
from crbd.tpm.results import TpmResult
from tests.engine import commands as c

from .failing_store import FailingStore

VOLATILE = StateKind.VOLATILE
NEVER = InstanceOptions(may_manufacture=True)
EVERY = replace(NEVER, checkpoint=CheckpointPolicy(every_command=True))
IDLE = replace(NEVER, checkpoint=CheckpointPolicy(when_idle=60.0))
READ_16 = c.pcr_read(16)
EXTEND_16 = c.pcr_extend(16, b"\x16" * 32)
MAKERS = [FakeEngine, LibtpmsEngine]
Make = Callable[[StatePort], Engine]


LIVES: list[Life] = []


@pytest.fixture(autouse=True)
def _engines_end() -> Iterator[None]:
    yield
    while LIVES:
        LIVES.pop().instance._engine.close()


class Life:
    """One process's TPM on a store."""

    def __init__(self, store: Store, options: InstanceOptions, make: Make = FakeEngine) -> None:
        self.store = store
        self.instance = Instance(make, store, options)
        LIVES.append(self)

    def init(self) -> Life:
        self.instance.init(delete_volatile=False)
        return self

    def begin(self) -> Life:
        self.instance.begin()
        return self

    def started(self) -> Life:
        self.init()
        assert self.code(c.STARTUP_CLEAR) == c.SUCCESS
        assert self.code(EXTEND_16) == c.SUCCESS
        return self

    def code(self, command: bytes) -> int:
        return c.code(self.instance.execute(command))

    @property
    def pcr(self) -> bytes:
        return c.pcr_value(self.instance.execute(READ_16))

    def die(self) -> Store:
        """As by SIGKILL: the engine is gone, nothing is sent or stored."""
        self.instance._engine.close()
        return self.store


POWERS_ON = Startup.POWER_ON


# -- what a client asked for


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["INIT", "of its own accord"])
def test_registers_and_session_come_back_with_the_volatile_state(make: Make, how: str) -> None:
    first = Life(FailingStore(), NEVER, make)
    first.instance.buffer_size(3072)
    first.started()
    first.instance.hash_start()
    first.instance.hash_data(b"launch")
    first.instance.hash_end()
    first.instance.set_locality(3)
    assert first.code(c.GET_RANDOM) == c.SUCCESS
    first.instance.store_volatile()
    pages, pcr = first.instance.register_pages(), first.pcr
    second = Life(first.die(), replace(NEVER, startup=POWERS_ON), make)
    if how == "INIT":
        second.init()
        assert second.instance.register_pages() != pages, "INIT is a platform reset: the registers begin anew"
        assert second.instance.register_pages()[0] & 1 == 0, "but for tpmEstablished"
    else:
        second.begin()
        assert second.instance.register_pages() == pages
    assert second.instance.established()
    assert second.instance._session() == Session(3, 3072, True, 0x17B)
    assert second.instance._engine.locality == 3
    assert second.pcr == pcr
    second.instance.close()


@pytest.mark.parametrize("command", [EXTEND_16, c.GET_RANDOM, c.STARTUP_CLEAR, c.SHUTDOWN_STATE])
def test_stored_volatile_state_is_gone_before_it_is_outdated(command: bytes) -> None:
    life = Life(FailingStore(), NEVER).started()
    life.instance.store_volatile()
    assert life.pcr
    assert life.store.load(VOLATILE) is not None, "reading outdates nothing"
    life.code(command)
    assert life.store.load(VOLATILE) is None


def test_a_command_that_would_outdate_it_does_not_run_where_it_cannot_be_removed() -> None:
    store = FailingStore()
    life = Life(store, NEVER).started()
    life.instance.store_volatile()
    before = life.pcr
    store.full = True
    assert life.code(EXTEND_16) == c.FAILURE
    store.full = False
    assert life.pcr == before
    again = Life(life.die(), NEVER).init()
    assert again.code(READ_16) in (c.SUCCESS, c.INITIALIZE)


def test_a_locality_set_afterwards_is_the_one_that_comes_back() -> None:
    life = Life(FailingStore(), NEVER).started()
    life.instance.set_locality(4)
    life.instance.store_volatile()
    life.instance.set_locality(0)
    again = Life(life.die(), NEVER).init()
    assert again.instance._engine.locality == 0


def test_a_locality_that_cannot_be_stored_is_not_set() -> None:
    store = FailingStore()
    life = Life(store, NEVER).started()
    life.instance.store_volatile()
    store.full = True
    with pytest.raises(StoreError):
        life.instance.set_locality(4)
    assert life.instance._engine.locality == 0


def test_the_end_in_good_order_keeps_what_a_client_had_stored() -> None:
    """As swtpm: its clients store, shut down, and go on later."""
    life = Life(FailingStore(), NEVER).started()
    life.instance.store_volatile()
    pcr = life.pcr
    life.instance.close()
    assert Life(life.store, NEVER).init().pcr == pcr


# -- checkpoints


@pytest.mark.parametrize("make", MAKERS)
def test_every_command_is_in_the_checkpoint(make: Make) -> None:
    life = Life(FailingStore(), EVERY, make).started()
    for _ in range(3):
        assert life.code(EXTEND_16) == c.SUCCESS
        pcr = life.pcr
        life = Life(life.die(), replace(EVERY, startup=POWERS_ON), make).begin()
        assert life.pcr == pcr
    life.instance.close()


def test_a_checkpoint_that_cannot_be_stored_fails_its_command_and_the_one_before_counts() -> None:
    store = FailingStore()
    life = Life(store, EVERY).started()
    pcr = life.pcr
    store.full = True
    assert life.code(EXTEND_16) == c.FAILURE
    assert life.code(EXTEND_16) == c.FAILURE
    assert Life(life.die(), replace(EVERY, startup=POWERS_ON)).begin().pcr == pcr


def test_the_registers_of_a_checkpoint_show_the_answer() -> None:
    life = Life(FailingStore(), EVERY).started()
    pages = life.instance.register_pages()
    again = Life(life.die(), replace(EVERY, startup=POWERS_ON)).begin()
    assert again.instance.register_pages() == pages


def test_init_is_a_reset_whatever_checkpoint_there_is() -> None:
    for options in (EVERY, NEVER):
        life = Life(FailingStore(), EVERY).started()
        again = Life(life.die(), options).init()
        assert again.code(READ_16) == c.INITIALIZE
        assert options is EVERY or again.store.load(VOLATILE) is None


@pytest.mark.parametrize("auto_shutdown", [True, False])
def test_no_checkpoint_outlives_an_end_in_good_order(auto_shutdown: bool) -> None:
    options = replace(EVERY, auto_shutdown=auto_shutdown)
    for end in (Instance.close, Instance.stop):
        life = Life(FailingStore(), options).started()
        end(life.instance)
        assert life.store.load(VOLATILE) is None
        assert Life(life.store, replace(options, startup=POWERS_ON)).begin().code(READ_16) == c.INITIALIZE


def test_when_idle() -> None:
    store = FailingStore()
    life = Life(store, IDLE).started()
    commits = store.commits
    life.instance.checkpoint_when_idle()
    assert store.load(VOLATILE) is None, "a command came since the last look"
    life.instance.checkpoint_when_idle()
    assert store.load(VOLATILE) is not None
    for _ in range(5):
        assert life.pcr
        life.instance.checkpoint_when_idle()
    assert store.commits == commits + 1, "one for the whole rest"
    again = Life(store, replace(IDLE, startup=POWERS_ON)).begin()
    assert again.pcr == life.pcr
    assert again.code(EXTEND_16) == c.SUCCESS
    assert store.load(VOLATILE) is None
    assert Life(again.die(), replace(IDLE, startup=POWERS_ON)).begin().code(READ_16) == c.INITIALIZE


def test_no_checkpoint_of_a_tpm_that_goes_elsewhere() -> None:
    store = FailingStore()
    life = Life(store, replace(IDLE, release_lock_outgoing=True)).started()
    life.instance.state_blob(StateKind.PERMANENT)
    life.instance.state_blob(VOLATILE)
    for _ in range(3):
        life.instance.checkpoint_when_idle()
    life.instance.state_blob(StateKind.SAVESTATE)
    for _ in range(3):
        life.instance.checkpoint_when_idle()
    assert store.load(VOLATILE) is None


def test_a_tpm_without_volatile_state_has_no_checkpoint() -> None:
    class Failed(FakeEngine):
        failed = False

        def get_state(self, kind: StateKind) -> bytes | None:
            if self.failed and kind is VOLATILE:
                raise EngineError("TPMLIB_GetState", TpmResult.FAIL)
            return super().get_state(kind)

    life = Life(FailingStore(), EVERY, Failed).started()
    assert isinstance(life.instance._engine, Failed)
    life.instance._engine.failed = True
    assert life.code(c.GET_RANDOM) == c.SUCCESS
    assert life.store.load(VOLATILE) is None


def test_a_hash_sequence_outdates_what_is_stored() -> None:
    life = Life(FailingStore(), NEVER).started()
    life.instance.store_volatile()
    life.instance.hash_start()
    assert life.store.load(VOLATILE) is None
    checked = Life(FailingStore(), EVERY).started()
    checked.instance.hash_start()
    assert checked.store.load(VOLATILE) is None
    checked.instance.hash_data(b"x")
    checked.instance.hash_end()
    pcr_17 = checked.instance.execute(c.pcr_read(17))
    again = Life(checked.die(), replace(EVERY, startup=POWERS_ON)).begin()
    assert again.instance.execute(c.pcr_read(17)) == pcr_17
    assert again.instance.established()


def rest(life: Life) -> None:
    life.instance.checkpoint_when_idle()
    life.instance.checkpoint_when_idle()


def hash_sequence(life: Life) -> None:
    life.instance.hash_start()
    life.instance.hash_data(b"m")
    life.instance.hash_end()


STEPS: dict[str, Callable[[Life], object]] = {
    "extend": lambda life: life.code(EXTEND_16),
    "random": lambda life: life.code(c.GET_RANDOM),
    "read": lambda life: life.code(READ_16),
    "store": lambda life: life.instance.store_volatile(),
    "rest": rest,
    "locality": lambda life: life.instance.set_locality(1),
    "hash": hash_sequence,
    "freeze": lambda life: life.instance.freeze(),
    "snapshot": lambda life: life.instance.snapshot(),
    "permanent": lambda life: life.code(c.nv_define(8)),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8), st.sampled_from([NEVER, EVERY, IDLE]), st.booleans())
def test_whatever_happened_a_tpm_goes_on_as_it_was_or_not_at_all(
    steps: list[str], options: InstanceOptions, by_init: bool
) -> None:
    life = Life(FailingStore(), options).started()
    for step in steps:
        STEPS[step](life)
    pcrs = [life.instance.execute(c.pcr_read(number)) for number in (16, 17)]
    again = Life(life.die(), replace(options, startup=POWERS_ON))
    if by_init:
        again.init()
    else:
        again.begin()
    codes = [again.code(c.pcr_read(16))]
    if codes == [c.SUCCESS]:
        assert [again.instance.execute(c.pcr_read(number)) for number in (16, 17)] == pcrs
    else:
        assert codes == [c.INITIALIZE]
    if options is EVERY and not by_init and "store" not in steps:
        assert codes == [c.SUCCESS]


def test_commands_that_ask_do_not_change_what_matters() -> None:
    """Of libtpms: they move the clock, which is in a dozen bytes, and no PCR, key, nonce or random state."""
    life = Life(FailingStore(), NEVER, LibtpmsEngine).started()

    def changed_by(command: bytes) -> int:
        before = life.instance._engine.get_state(VOLATILE)
        life.code(command)
        after = life.instance._engine.get_state(VOLATILE)
        assert before is not None
        assert after is not None
        assert len(after) == len(before)
        return sum(one != other for one, other in zip(before[:-20], after[:-20], strict=True))

    for command in (
        READ_16,
        c.command(0x17A, bytes.fromhex("00000006 00000100 00000010")),
        c.command(0x173, bytes.fromhex("81010001")),
        c.command(0x169, bytes.fromhex("01c00002")),
        c.command(0x178, bytes.fromhex("0003")),
        c.command(0x17C),
        c.command(0x181),
        c.command(0x18A, bytes.fromhex("0008 000b 0010".replace(" ", ""))),
    ):
        assert not changes_tpm(command)
        assert changed_by(command) < 24, command.hex()
    for command in (EXTEND_16, c.GET_RANDOM):
        assert changes_tpm(command)
        assert changed_by(command) > 24


def test_a_session_with_a_question_changes_the_tpm() -> None:
    assert changes_tpm(b"\x80\x02" + READ_16[2:])


def test_where_checkpoints_may_be(tmp_path: Path) -> None:
    assert open_state(tmp_path / "a", create=True, layout=Layout.CRBD).keeps_checkpoints
    assert not open_state(tmp_path / "b", create=True, layout=Layout.SWTPM).keeps_checkpoints
    assert not open_state(tmp_path / "c", create=True, layout=Layout.LINEAR).keeps_checkpoints


@pytest.mark.parametrize("make", MAKERS)
def test_a_checkpoint_that_a_full_disk_did_not_take_is_one_after_an_upgrade_too(make: Make) -> None:
    """As volatile state that a client had asked for it would outlive a reset of the platform."""
    store = FailingStore()
    life = Life(store, IDLE, make).started()
    store.full = True
    for _ in range(2):
        life.instance.checkpoint_when_idle()
    frozen = life.instance.freeze()
    assert VOLATILE in frozen.changed
    life.die()
    store.full = False
    again = Life(store, IDLE, make)
    again.instance.thaw(frozen, "the test")
    assert again.code(READ_16) == c.SUCCESS
    assert store.load(VOLATILE) is not None
    side = store.load_side()
    assert side is not None
    assert side.checkpoint
    assert side.session == frozen.session
    again.init()
    assert again.code(READ_16) == c.INITIALIZE, "INIT is a reset"


def test_what_an_ephemeral_store_holds_is_handed_over_with_what_belongs_to_it() -> None:
    store = MemoryStore()
    life = Life(store, NEVER).started()
    life.instance.set_locality(2)
    life.instance.restore(life.instance.snapshot(), allow_rollback=True)
    estate = store.estate()
    assert estate.held_side is not None
    assert estate.held_side.checkpoint
    assert MemoryStore(estate.held, estate.held_side).load_side() == store.load_side() == estate.held_side
