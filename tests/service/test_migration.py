"""State blobs and stored volatile state: libtpms itself, because what survives is its business."""

from __future__ import annotations

import pytest

from crbd.errors import EngineError, StateAbsentError, StateDamagedError
from crbd.service.options import InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.state.swtpm import decode_migration, encode_migration
from crbd.tpm.head import response_code
from tests.engine import commands as c

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
