"""The lifecycle of one TPM: power, automatic shutdown, what becomes durable when, and when a TPM may be made."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from crbd.crb.config import BUFFER_OFFSET, PAGE_SIZE
from crbd.crb.spec import Offset
from crbd.errors import EngineError, EngineFailedError, StateAbsentError, StateDamagedError, StoreError
from crbd.service.options import InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult
from tests.engine import commands as c

from .failing_store import FailingStore
from .instances import Bench, Real

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE


def test_a_command_before_init_is_answered_with_failure() -> None:
    bench = Bench()
    assert bench.run(bytes.fromhex("80010000000a00000181")) == c.FAILURE
    assert bench.executed == []


def test_init_makes_a_tpm_once_and_durably() -> None:
    bench = Bench()
    bench.instance.check()
    bench.instance.init(delete_volatile=False)
    assert bench.instance.running
    made = bench.store.load(PERMANENT)
    assert made is not None
    bench.instance.init(delete_volatile=False)
    assert bench.store.load(PERMANENT) == made


def test_no_tpm_is_made_without_permission() -> None:
    bench = Bench(InstanceOptions())
    with pytest.raises(StateAbsentError, match="--create"):
        bench.instance.check()
    with pytest.raises(StateAbsentError):
        bench.instance.init(delete_volatile=False)
    assert not bench.instance.running
    assert bench.store.load(PERMANENT) is None


def test_state_that_vanishes_under_a_running_daemon_is_not_replaced() -> None:
    bench = Bench().started()
    bench.instance.stop()
    bench.store.commit({PERMANENT: None})
    with pytest.raises(StateAbsentError):
        bench.instance.init(delete_volatile=False)
    assert bench.store.load(PERMANENT) is None
    assert not bench.instance.running


def test_damaged_state_stops_the_start_and_is_left_alone() -> None:
    bench = Bench(store=FailingStore({PERMANENT: b"not a TPM"}))
    with pytest.raises(StateDamagedError, match="rejects"):
        bench.instance.check()
    with pytest.raises(EngineError):
        bench.instance.init(delete_volatile=False)
    assert bench.store.load(PERMANENT) == b"not a TPM"
    assert bench.store.commits == 0


def test_check_changes_nothing() -> None:
    first = Bench().started()
    first.instance.close()
    kept = first.store.load(PERMANENT)
    assert kept is not None
    second = Bench(InstanceOptions(), FailingStore({PERMANENT: kept}))
    second.instance.check()
    assert second.store.commits == 0
    second.instance.init(delete_volatile=False)
    assert second.store.commits == 0, "state that did not change is not written"
    assert second.run(c.STARTUP_CLEAR) == c.SUCCESS


def test_what_a_command_changed_is_durable_before_its_answer() -> None:
    bench = Bench().started()
    before = bench.store.load(PERMANENT)
    assert bench.run(c.nv_define(8)) == c.SUCCESS
    assert bench.store.load(PERMANENT) != before
    commits = bench.store.commits
    for _ in range(1000):
        assert bench.run(c.pcr_extend(10, bytes(32))) == c.SUCCESS
    assert bench.store.commits - commits <= 2


def test_a_write_that_fails_is_answered_with_failure_and_tried_again() -> None:
    bench = Bench().started()
    before = bench.store.load(PERMANENT)
    bench.store.full = True
    assert bench.run(c.nv_define(8)) == c.FAILURE
    assert bench.run(c.GET_RANDOM) == c.FAILURE, "the unacknowledged change must not show before it is durable"
    assert bench.store.load(PERMANENT) == before
    bench.store.full = False
    assert bench.run(c.GET_RANDOM) == c.SUCCESS
    assert bench.store.load(PERMANENT) != before


def test_a_new_tpm_that_cannot_be_stored_does_not_come_up() -> None:
    bench = Bench()
    bench.store.full = True
    with pytest.raises(StoreError):
        bench.instance.init(delete_volatile=False)
    assert not bench.instance.running
    bench.store.full = False
    bench.instance.init(delete_volatile=False)
    assert bench.instance.running


@pytest.mark.parametrize("how", ["init", "stop", "close"])
def test_automatic_shutdown(how: str) -> None:
    bench = Bench().started()
    engine = bench.engine
    actions: dict[str, Callable[[], None]] = {
        "init": lambda: bench.instance.init(delete_volatile=False),
        "stop": bench.instance.stop,
        "close": bench.instance.close,
    }
    actions[how]()
    assert [entry.command for entry in engine.log][-1] == c.SHUTDOWN_STATE


def test_no_automatic_shutdown_after_the_guests_own() -> None:
    bench = Bench().started()
    assert bench.run(c.SHUTDOWN_CLEAR) == c.SUCCESS
    bench.instance.stop()
    assert bench.executed[-1] == c.SHUTDOWN_CLEAR
    bench.instance.stop()


def test_no_automatic_shutdown_where_it_is_disabled() -> None:
    bench = Bench(InstanceOptions(may_manufacture=True, auto_shutdown=False)).started()
    bench.instance.stop()
    assert bench.executed == [c.STARTUP_CLEAR]


def test_automatic_shutdown_of_a_tpm_that_was_never_started_is_not_repeated() -> None:
    bench = Bench()
    bench.instance.init(delete_volatile=False)
    bench.instance.stop()
    assert bench.executed == [c.SHUTDOWN_STATE], "TPM_RC_INITIALIZE says that there is nothing to shut down"


def test_automatic_shutdown_falls_back_to_clear() -> None:
    bench = Bench().started()
    bench.engine.script.append(bytes.fromhex("80010000000a00000922"))
    bench.instance.stop()
    assert bench.executed[-2:] == [c.SHUTDOWN_STATE, c.SHUTDOWN_CLEAR]


@pytest.mark.parametrize(
    ("startup", "sent"),
    [
        (Startup.NEED_INIT, None),
        (Startup.POWER_ON, []),
        (Startup.CLEAR, [c.STARTUP_CLEAR]),
    ],
)
def test_begin(startup: Startup, sent: list[bytes] | None) -> None:
    bench = Bench(InstanceOptions(startup=startup, may_manufacture=True))
    bench.instance.begin()
    assert bench.instance.running == (sent is not None)
    assert bench.executed == (sent or [])


def test_begin_with_startup_state_refuses_where_there_is_nothing_to_resume() -> None:
    bench = Real(InstanceOptions(startup=Startup.STATE, may_manufacture=True))
    try:
        with pytest.raises(EngineFailedError, match=r"TPM2_Startup\(STATE\) was answered with 0x"):
            bench.instance.begin()
    finally:
        bench.instance.close()


def test_a_full_disk_at_a_start_of_its_own_accord_is_what_is_said() -> None:
    """Not that another startup may help."""
    made = Bench().started()
    made.instance.close()
    store = FailingStore({StateKind.PERMANENT: made.store.load(StateKind.PERMANENT) or b""})
    store.full = True
    bench = Bench(InstanceOptions(startup=Startup.CLEAR), store)
    bench.instance.check()
    with pytest.raises(StoreError, match="no space left"):
        bench.instance.begin()


def test_an_engine_that_fails_is_answered_with_failure() -> None:
    bench = Bench().started()
    bench.engine.script.append(EngineError("TPMLIB_Process", TpmResult.FAIL))
    assert bench.run(c.GET_RANDOM) == c.FAILURE
    assert bench.run(c.GET_RANDOM) == c.SUCCESS


def test_localities() -> None:
    bench = Bench().started()
    bench.instance.set_locality(3)
    bench.run(c.GET_RANDOM)
    bench.run(c.GET_RANDOM, locality=4)
    bench.run(c.GET_RANDOM)
    assert [entry.locality for entry in bench.engine.log][-3:] == [3, 4, 4]
    assert bench.run(c.GET_RANDOM, locality=5) == c.LOCALITY
    with pytest.raises(EngineError, match="3d"):
        bench.instance.set_locality(5)


def test_locality_4_can_be_refused() -> None:
    bench = Bench(InstanceOptions(may_manufacture=True, reject_locality_4=True)).started()
    with pytest.raises(EngineError, match="3d"):
        bench.instance.set_locality(4)
    assert bench.run(c.GET_RANDOM, locality=4) == c.LOCALITY
    bench.instance.set_locality(3)


VENDOR = bytes.fromhex("80010000000b2000100002")


def test_the_vendor_command_changes_the_locality_only_where_allowed() -> None:
    bench = Bench().started()
    assert bench.run(VENDOR) not in (c.SUCCESS, c.FAILURE), "the engine does not know the command"
    allowed = Bench(InstanceOptions(may_manufacture=True, allow_set_locality=True)).started()
    assert allowed.run(VENDOR) == c.SUCCESS
    assert allowed.engine.locality == 2
    assert allowed.run(VENDOR[:-1] + b"\x05") == c.LOCALITY
    assert allowed.run(bytes.fromhex("80010000000a20001000")) == 0x9A
    assert allowed.engine.locality == 2


def test_cancel_does_not_wait_for_the_command() -> None:
    bench = Bench().started()
    bench.engine.gate.close()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(bench.run(c.GET_RANDOM)))
    thread.start()
    bench.engine.gate.wait_held()
    bench.instance.cancel()
    thread.join(10)
    assert codes == [c.CANCELED]


@pytest.mark.parametrize("how", ["stop", "init"])
def test_power_off_cancels_the_command_that_computes(how: str) -> None:
    bench = Bench().started()
    bench.engine.gate.close()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(bench.run(c.GET_RANDOM)))
    thread.start()
    bench.engine.gate.wait_held()
    ended = threading.Thread(
        target=bench.instance.stop if how == "stop" else lambda: bench.instance.init(delete_volatile=False)
    )
    ended.start()
    thread.join(10)
    assert codes == [c.CANCELED]
    bench.engine.gate.open()
    ended.join(10)
    assert not ended.is_alive()
    assert bench.instance.running == (how == "init")


def test_hash_sequence_and_the_established_flag() -> None:
    bench = Bench()
    with pytest.raises(EngineError):
        bench.instance.established()
    bench.instance.init(delete_volatile=False)
    assert not bench.instance.established()
    bench.instance.hash_start()
    bench.instance.hash_data(b"launch")
    bench.instance.hash_end()
    assert bench.instance.established()
    with pytest.raises(EngineError, match="3d"):
        bench.instance.reset_established(2)
    with pytest.raises(EngineError, match="3d"):
        bench.instance.reset_established(5)
    bench.instance.reset_established(3)
    assert not bench.instance.established()


def test_buffer_size_and_info() -> None:
    bench = Bench()
    assert bench.instance.buffer_size(0xF80).current == 0xF80
    bench.instance.init(delete_volatile=False)
    assert bench.instance.buffer_size(0).current == 0xF80
    with pytest.raises(EngineError):
        bench.instance.buffer_size(0x1000)
    assert bench.instance.info(1).startswith("{")


def test_lock_storage_tries_again() -> None:
    bench = Bench()
    bench.store.release()
    bench.store.lock_refusals = 3
    bench.instance.lock_storage(3)
    bench.store.release()
    bench.store.lock_refusals = 3
    with pytest.raises(Exception, match="in use"):
        bench.instance.lock_storage(2)


def test_close_releases_and_tries_the_last_write_again() -> None:
    bench = Bench().started()
    bench.store.full = True
    assert bench.run(c.nv_define(8)) == c.FAILURE
    bench.store.full = False
    before = bench.store.commits
    bench.instance.close()
    assert bench.store.commits > before
    assert bench.store.closed


# -- the registers


def test_every_command_goes_through_the_registers() -> None:
    bench = Bench().started()
    bench.instance.set_locality(3)
    response = bench.instance.execute(c.GET_RANDOM)
    page = bench.instance.register_pages()[3 * PAGE_SIZE :]
    assert page[BUFFER_OFFSET : BUFFER_OFFSET + len(response)] == response
    assert page[Offset.CTRL_START] == 0
    assert page[Offset.LOC_STATE] >> 2 & 7 == 3


def test_registers_show_the_command_that_computes_and_its_cancellation() -> None:
    bench = Bench().started()
    bench.engine.gate.close()
    thread = threading.Thread(target=lambda: bench.run(c.GET_RANDOM))
    thread.start()
    bench.engine.gate.wait_held()
    page = bench.instance.register_pages()
    assert page[Offset.CTRL_START] == 1
    assert page[BUFFER_OFFSET : BUFFER_OFFSET + len(c.GET_RANDOM)] == c.GET_RANDOM
    bench.instance.cancel()
    thread.join(10)
    assert bench.instance.register_pages()[Offset.CTRL_START] == 0
    assert bench.instance.register_pages()[Offset.CTRL_CANCEL] == 0


def test_registers_show_the_established_flag_negated() -> None:
    bench = Bench().started()
    assert bench.instance.register_pages()[Offset.LOC_STATE] & 1 == 1
    bench.instance.hash_start()
    bench.instance.hash_data(b"x" * 10_000)
    bench.instance.hash_end()
    assert bench.instance.register_pages()[Offset.LOC_STATE] & 1 == 0
    bench.instance.init(delete_volatile=False)
    assert bench.instance.register_pages()[Offset.LOC_STATE] & 1 == 0, "it outlives a reset"
    bench.instance.reset_established(4)
    assert bench.instance.register_pages()[Offset.LOC_STATE] & 1 == 1


def test_a_library_failure_is_a_fatal_error_in_the_registers_until_the_reset() -> None:
    bench = Bench().started()
    bench.engine.script.append(EngineError("TPMLIB_Process", TpmResult.FAIL))
    assert bench.run(c.GET_RANDOM) == c.FAILURE
    assert bench.instance.register_pages()[Offset.CTRL_STS] & 1 == 1
    bench.instance.init(delete_volatile=False)
    assert bench.instance.register_pages()[Offset.CTRL_STS] & 1 == 0


def test_a_full_disk_is_no_fatal_error_of_the_interface() -> None:
    bench = Bench().started()
    bench.store.full = True
    assert bench.run(c.nv_define(8)) == c.FAILURE
    page = bench.instance.register_pages()
    assert page[Offset.CTRL_STS] & 1 == 0
    assert page[BUFFER_OFFSET : BUFFER_OFFSET + 10] == bytes.fromhex("80010000000a00000101")


def test_the_largest_command_passes_in_pieces() -> None:
    bench = Bench().started()
    largest = bytes.fromhex("8001 00001000 0000017b") + bytes(4096 - 10)
    assert bench.run(largest) not in (c.COMMAND_SIZE, c.FAILURE)
    assert bench.executed[-1] == largest
