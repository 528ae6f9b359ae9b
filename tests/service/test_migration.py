"""State blobs and stored volatile state: libtpms itself, because what survives is its business."""

from __future__ import annotations

import pytest

from crbd.engine.fake import FakeEngine
from crbd.errors import EngineError, StateAbsentError, StateDamagedError, StoreError
from crbd.service.durable import DurableState
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.state.swtpm import decode_migration, encode_migration
from crbd.tpm.head import response_code
from tests.engine import commands as c

from .failing_store import FailingStore
from .instances import Real

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE


def test_state_blobs_carry_a_running_tpm_to_another_store() -> None:
    source = Real()
    source.instance.init(delete_volatile=False)
    source.run(c.STARTUP_CLEAR)
    source.run(c.nv_define(8))
    source.run(c.pcr_extend(16, b"\x11" * 32))
    value = c.pcr_value(source.run(c.pcr_read(16)))
    assert source.instance.state_blob(SAVESTATE) is None
    blobs = {kind: source.instance.state_blob(kind) for kind in (PERMANENT, VOLATILE)}
    source.instance.close()

    target = Real(InstanceOptions())
    for kind, blob in blobs.items():
        assert blob is not None
        target.instance.set_state_blob(kind, blob)
    target.instance.init(delete_volatile=True)
    assert c.pcr_value(target.run(c.pcr_read(16))) == value
    assert response_code(target.run(c.nv_define(8))) == 0x14C, "TPM_RC_NV_DEFINED: the index came along"
    assert target.store.load(PERMANENT) is not None
    assert target.store.load(VOLATILE) is None
    target.instance.close()


def test_store_volatile_resumes_and_delete_volatile_does_not_a_second_time() -> None:
    first = Real()
    first.instance.init(delete_volatile=False)
    first.run(c.STARTUP_CLEAR)
    first.run(c.pcr_extend(16, b"\x11" * 32))
    value = c.pcr_value(first.run(c.pcr_read(16)))
    first.instance.store_volatile()
    kept = {kind: first.store.load(kind) for kind in (PERMANENT, VOLATILE)}
    first.instance.close()

    second = Real(InstanceOptions(auto_shutdown=False))
    second.store.commit(kept)
    second.instance.init(delete_volatile=True)
    assert c.pcr_value(second.run(c.pcr_read(16))) == value
    assert second.store.load(VOLATILE) is None
    second.instance.init(delete_volatile=False)
    assert response_code(second.run(c.pcr_read(16))) == c.INITIALIZE
    second.instance.close()


def test_a_daemon_start_goes_on_from_stored_volatile_state() -> None:
    first = Real()
    first.instance.init(delete_volatile=False)
    first.run(c.STARTUP_CLEAR)
    first.run(c.pcr_extend(16, b"\x11" * 32))
    value = c.pcr_value(first.run(c.pcr_read(16)))
    first.instance.store_volatile()
    kept = {kind: first.store.load(kind) for kind in (PERMANENT, VOLATILE)}
    first.instance.close()

    second = Real(InstanceOptions(startup=Startup.CLEAR))
    second.store.commit(kept)
    second.instance.begin()
    assert c.pcr_value(second.run(c.pcr_read(16))) == value
    second.instance.close()


def test_volatile_state_that_is_handed_out_is_no_longer_stored() -> None:
    bench = Real()
    bench.instance.init(delete_volatile=False)
    bench.run(c.STARTUP_CLEAR)
    bench.instance.store_volatile()
    assert bench.store.load(VOLATILE) is not None
    bench.instance.state_blob(PERMANENT)
    assert bench.store.load(VOLATILE) is not None
    assert bench.instance.state_blob(VOLATILE) is not None
    assert bench.store.load(VOLATILE) is None
    bench.instance.close()


def test_a_permanent_blob_alone_is_not_joined_with_another_tpms_volatile_state() -> None:
    here = Real(InstanceOptions(may_manufacture=True, auto_shutdown=False))
    here.instance.init(delete_volatile=False)
    here.run(c.STARTUP_CLEAR)
    here.instance.store_volatile()
    blob = here.instance.state_blob(PERMANENT)
    assert blob is not None
    here.instance.stop()
    here.instance.set_state_blob(PERMANENT, blob)
    here.instance.init(delete_volatile=False)
    assert response_code(here.run(c.pcr_read(16))) == c.INITIALIZE, "a power-on without volatile state"
    assert here.store.load(VOLATILE) is None
    here.instance.close()


def test_a_blob_is_taken_back_by_an_empty_one_and_rejected_when_wrong() -> None:
    bench = Real(InstanceOptions())
    with pytest.raises(StateDamagedError, match="permall state blob"):
        bench.instance.set_state_blob(PERMANENT, b"garbage of some length")
    with pytest.raises(EngineError):
        bench.instance.set_state_blob(PERMANENT, encode_migration(b"garbage"))
    bench.instance.set_state_blob(PERMANENT, b"")
    with pytest.raises(StateAbsentError):
        bench.instance.init(delete_volatile=False)
    bench.instance.close()


def test_a_blob_is_swtpms_form() -> None:
    bench = Real()
    bench.instance.init(delete_volatile=False)
    blob = bench.instance.state_blob(PERMANENT)
    assert blob is not None
    assert decode_migration(blob, "blob") == bench.store.load(PERMANENT)
    bench.instance.close()


def test_a_rejected_blob_takes_the_others_along_and_opens_no_way_to_a_new_tpm() -> None:
    """libtpms forgets all blobs when it rejects one; the permission to make a TPM must not hang on ours being there."""
    source = Real()
    source.instance.init(delete_volatile=False)
    permanent = source.instance.state_blob(PERMANENT)
    source.instance.close()
    assert permanent is not None
    target = Real(InstanceOptions())
    target.instance.set_state_blob(PERMANENT, permanent)
    with pytest.raises(EngineError):
        target.instance.set_state_blob(VOLATILE, encode_migration(b"no volatile state at all"))
    with pytest.raises(StateAbsentError):
        target.instance.init(delete_volatile=False)
    assert target.store.load(PERMANENT) is None
    assert not target.instance.running
    target.instance.close()


def test_taking_the_permanent_blob_back_takes_the_permission_back() -> None:
    source = Real()
    source.instance.init(delete_volatile=False)
    permanent = source.instance.state_blob(PERMANENT)
    source.instance.close()
    assert permanent is not None
    target = Real(InstanceOptions())
    target.instance.set_state_blob(PERMANENT, permanent)
    target.instance.set_state_blob(PERMANENT, b"")
    with pytest.raises(StateAbsentError):
        target.instance.init(delete_volatile=False)
    assert target.store.load(PERMANENT) is None
    target.instance.close()


class Forgetful(FakeEngine):
    """Says that there is permanent state, and makes a new TPM all the same."""

    def get_state(self, kind: StateKind) -> bytes | None:
        return super().get_state(kind) or b"there is"


def test_a_tpm_that_was_made_without_permission_does_not_reach_the_store() -> None:
    store = FailingStore()
    instance = Instance(Forgetful, store, InstanceOptions())
    with pytest.raises(StateAbsentError):
        instance.init(delete_volatile=False)
    assert not instance.running
    instance.close()
    assert store.load(PERMANENT) is None


def test_after_a_failed_write_what_was_on_disk_before_is_written_again() -> None:
    """Nobody knows which of the two a failed write left there."""
    store = FailingStore({PERMANENT: b"old"})
    state = DurableState(store)
    assert state.load(PERMANENT) == b"old"
    state.store(PERMANENT, b"new")
    store.full = True
    with pytest.raises(StoreError):
        state.commit()
    store.full = False
    state.store(PERMANENT, b"old")
    state.commit()
    assert store.commits == 1
