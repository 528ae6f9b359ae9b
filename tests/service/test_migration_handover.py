"""Two instances on common storage: who may run the TPM, at every turn, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import (
    CrbdError,
    EngineError,
    StateAbsentError,
    StateForeignError,
    StateLockedError,
    StoreError,
    StoreFencedError,
)
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from crbd.state.swtpm import decode_migration, encode_migration
from crbd.store.layout import Layout
from crbd.tpm.head import response_code
from crbd.tpm.results import TpmResult
from tests.engine import commands as c

from .instances import Bench
from .storage import MakeEngine, destination_at, directory, full_disk, opened, source_at

PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE
EXTEND = c.pcr_extend(16, b"\x11" * 32)


@pytest.fixture
def path() -> Iterator[Path]:
    with directory() as place:
        yield place


@pytest.fixture(params=Layout, ids=lambda layout: str(layout.value))
def layout(request: pytest.FixtureRequest) -> Layout:
    chosen = request.param
    assert isinstance(chosen, Layout)
    return chosen


def run(instance: Instance, command: bytes) -> int | None:
    return response_code(instance.execute(command))


def blobs_of(source: Instance) -> dict[StateKind, bytes]:
    """What a client fetches, in its order."""
    fetched = {kind: source.state_blob(kind) for kind in StateKind}
    return {kind: blob for kind, blob in fetched.items() if blob is not None}


def receive(destination: Instance, blobs: dict[StateKind, bytes]) -> None:
    for kind, blob in blobs.items():
        destination.set_state_blob(kind, blob)
    destination.init(delete_volatile=True)


def started(path: Path, layout: Layout, make: MakeEngine = FakeEngine) -> Instance:
    source = source_at(path, layout, make)
    assert run(source, c.STARTUP_CLEAR) == c.SUCCESS
    assert run(source, c.nv_define(8)) == c.SUCCESS
    assert run(source, EXTEND) == c.SUCCESS
    return source


def test_the_destination_waits_for_the_last_blob(path: Path, layout: Layout) -> None:
    source, destination = started(path, layout), destination_at(path, layout)
    permanent = source.state_blob(PERMANENT)
    volatile = source.state_blob(VOLATILE)
    assert permanent is not None
    assert volatile is not None
    with pytest.raises(StateLockedError):
        destination.set_state_blob(PERMANENT, permanent)
    assert source.state_blob(SAVESTATE) is None
    receive(destination, {PERMANENT: permanent, VOLATILE: volatile})
    assert run(destination, EXTEND) == c.SUCCESS
    source.close()
    destination.close()


def test_the_source_is_answered_with_failure_while_the_destination_runs(path: Path, layout: Layout) -> None:
    source, destination = started(path, layout), destination_at(path, layout)
    receive(destination, blobs_of(source))
    assert run(source, EXTEND) == c.FAILURE
    with pytest.raises(StateLockedError):
        source.lock_storage(1)
    with pytest.raises(StateLockedError):
        source.state_blob(PERMANENT)
    with pytest.raises(StateLockedError):
        source.init(delete_volatile=False)
    assert run(destination, c.nv_write(b"over the")) == c.SUCCESS
    source.close()
    destination.close()


def test_a_source_that_has_handed_over_writes_nothing_at_its_end(
    path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it try."""
    source = started(path, layout)
    blobs_of(source)
    before = _contents(path)
    source.close()
    assert _contents(path) == before
    assert caplog.records == []


@pytest.mark.parametrize(
    "resume", ["command", "LOCK_STORAGE", "HASH_START", "HASH_END", "STORE_VOLATILE", "RESET_TPMESTABLISHED"]
)
def test_a_source_goes_on_where_nobody_took_the_lock(path: Path, layout: Layout, resume: str) -> None:
    source = started(path, layout)
    if resume == "HASH_END":
        source.hash_start()
    blobs_of(source)
    match resume:
        case "command":
            assert run(source, EXTEND) == c.SUCCESS
        case "LOCK_STORAGE":
            source.lock_storage(300)
        case "STORE_VOLATILE":
            source.store_volatile()
        case "RESET_TPMESTABLISHED":
            source.reset_established(3)
        case "HASH_END":
            source.hash_end()
        case _:
            source.hash_start()
    with pytest.raises(StateLockedError):
        opened(path, layout)
    assert run(source, c.nv_write(b"go on so")) == c.SUCCESS
    source.close()


def test_a_source_goes_on_where_the_destination_failed_unused(path: Path, layout: Layout) -> None:
    """Powered on, even, but given no command: QEMU failed after it had restored the TPM."""
    source, destination = started(path, layout), destination_at(path, layout)
    receive(destination, blobs_of(source))
    destination.close()
    assert run(source, EXTEND) == c.SUCCESS
    assert run(source, c.nv_write(b"go on so")) == c.SUCCESS
    source.close()


def test_what_libtpms_stores_at_the_destination_is_what_was_handed_out(path: Path, layout: Layout) -> None:
    """Byte for byte, or the source could not tell that the destination failed unused."""
    source = started(path, layout, LibtpmsEngine)
    value = source.execute(c.pcr_read(16))
    blobs = blobs_of(source)
    source.close()  # libtpms lives once in a process
    destination = destination_at(path, layout, LibtpmsEngine)
    receive(destination, blobs)
    handed_over = decode_migration(blobs[PERMANENT], "blob")
    assert destination.execute(c.pcr_read(16)) == value
    destination.close()
    again = destination_at(path, layout, LibtpmsEngine)
    receive(again, blobs)
    again.close()
    store = opened(path, layout)
    assert store.load(PERMANENT) == handed_over
    store.close()


def test_what_a_full_disk_did_not_take_is_written_before_the_lock_goes(path: Path, layout: Layout) -> None:
    """Or the lock does not go: the request fails, and with it the migration."""
    source = started(path, layout)
    with full_disk():
        assert run(source, c.nv_write(b"too much")) == c.FAILURE
        with pytest.raises(StoreError):
            source.state_blob(SAVESTATE)
    with pytest.raises(StateLockedError):
        opened(path, layout)
    permanent = source.state_blob(PERMANENT)
    assert permanent is not None
    source.state_blob(SAVESTATE)
    store = opened(path, layout)
    assert store.load(PERMANENT) == decode_migration(permanent, "blob")
    store.close()
    assert run(source, c.pcr_read(16)) == c.SUCCESS
    source.close()


def test_a_source_waits_long_for_the_lock_only_once() -> None:
    """Each command that waits for seconds keeps its guest from all else."""
    bench = Bench(InstanceOptions(may_manufacture=True, release_lock_outgoing=True, lock_retries=2)).started()
    bench.instance.state_blob(SAVESTATE)
    bench.store.lock_refusals = 10
    for left in (7, 6, 5):
        assert bench.run(EXTEND) == c.FAILURE
        assert bench.store.lock_refusals == left
    bench.store.lock_refusals = 0
    assert bench.run(EXTEND) == c.SUCCESS


def test_a_source_never_goes_on_where_the_destination_changed_the_state(path: Path, layout: Layout) -> None:
    source, destination = started(path, layout), destination_at(path, layout)
    receive(destination, blobs_of(source))
    assert run(destination, c.nv_write(b"younger!")) == c.SUCCESS
    destination.close()
    for _ in range(2):
        assert run(source, EXTEND) == c.FAILURE
        with pytest.raises(StoreFencedError):
            source.lock_storage(0)
        with pytest.raises(StoreFencedError):
            source.state_blob(PERMANENT)
    # A new power-on is of what lies there.
    source.init(delete_volatile=False)
    assert run(source, c.STARTUP_CLEAR) == c.SUCCESS
    assert c.nv_value(source.execute(c.nv_read(8))) == b"younger!"
    source.close()


@pytest.mark.parametrize("refused", ["permanent", "volatile", "INIT"])
def test_a_destination_that_refuses_what_it_gets_leaves_the_storage_to_others(
    path: Path, layout: Layout, refused: str
) -> None:
    """It lives on: whoever manages the guest may end it later, or try again."""
    source, destination = started(path, layout), destination_at(path, layout)
    blobs = blobs_of(source)
    if refused != "permanent":
        destination.set_state_blob(PERMANENT, blobs[PERMANENT])
    if refused == "INIT":
        with full_disk(), pytest.raises(CrbdError):
            destination.init(delete_volatile=True)
    else:
        kind = PERMANENT if refused == "permanent" else VOLATILE
        with pytest.raises(CrbdError):
            destination.set_state_blob(kind, blobs[kind][:-5])
    assert run(source, EXTEND) == c.SUCCESS
    receive(destination, blobs_of(source))
    assert run(destination, EXTEND) == c.SUCCESS
    source.close()
    destination.close()


def test_a_destination_that_gets_nothing_makes_nothing(path: Path, layout: Layout) -> None:
    destination = destination_at(path, layout)
    with pytest.raises(StateAbsentError):
        destination.init(delete_volatile=False)
    assert run(destination, c.STARTUP_CLEAR) == c.FAILURE
    destination.close()
    assert {name for name in _contents(path) if not name.endswith(".lock")} == set()


@pytest.mark.parametrize(("made", "chosen"), [(Layout.SWTPM, Layout.CRBD), (Layout.CRBD, Layout.SWTPM)])
def test_a_destination_that_was_there_first_does_not_write_beside_another_layout(
    path: Path, made: Layout, chosen: Layout
) -> None:
    """It chose its layout when nothing was there."""
    destination = destination_at(path, chosen)
    source = started(path, made)
    blobs = blobs_of(source)
    before = _contents(path)
    with pytest.raises(StateForeignError):
        destination.set_state_blob(PERMANENT, blobs[PERMANENT])
    assert _contents(path) == before
    assert run(source, EXTEND) == c.SUCCESS
    source.close()
    destination.close()


def test_a_destination_without_blobs_starts_from_the_storage(path: Path, layout: Layout) -> None:
    """As swtpm: `incoming` is only about when the lock is taken."""
    source = started(path, layout)
    assert run(source, c.nv_write(b"lie here")) == c.SUCCESS
    source.close()
    destination = destination_at(path, layout)
    destination.init(delete_volatile=False)
    with pytest.raises(StateLockedError):
        opened(path, layout)
    assert run(destination, c.STARTUP_CLEAR) == c.SUCCESS
    assert c.nv_value(destination.execute(c.nv_read(8))) == b"lie here"
    destination.close()


def test_a_destination_that_measured_a_launch_shuts_its_tpm_down(path: Path, layout: Layout) -> None:
    """That is use, though it is no command: the source must not go on."""
    source, destination = started(path, layout), destination_at(path, layout)
    receive(destination, blobs_of(source))
    destination.hash_start()
    destination.hash_end()
    destination.close()
    with pytest.raises(StoreFencedError):
        source.lock_storage(0)
    source.close()


def test_state_that_comes_back_is_stored_though_it_is_what_was_here_before(path: Path, layout: Layout) -> None:
    """A snapshot of that time, say: what was once written is no longer what lies there."""
    source, other = started(path, layout), destination_at(path, layout)
    run(source, c.nv_write(b"snapshot"))
    blobs = blobs_of(source)
    source.stop()
    receive(other, blobs)
    run(other, c.nv_write(b"younger!"))
    other.close()
    receive(source, blobs)
    assert c.nv_value(source.execute(c.nv_read(8))) == b"snapshot"
    source.state_blob(SAVESTATE)
    source.close()
    again = source_at(path, layout)
    assert run(again, c.STARTUP_CLEAR) == c.SUCCESS
    assert c.nv_value(again.execute(c.nv_read(8))) == b"snapshot"
    again.close()


def test_there_and_back_again(path: Path, layout: Layout) -> None:
    source, other = started(path, layout), destination_at(path, layout)
    receive(other, blobs_of(source))
    source.stop()
    value = other.execute(c.pcr_read(16))
    assert run(other, c.nv_write(b"from far")) == c.SUCCESS
    receive(source, blobs_of(other))
    other.close()
    assert source.execute(c.pcr_read(16)) == value
    assert c.nv_value(source.execute(c.nv_read(8))) == b"from far"
    source.close()


def _contents(path: Path) -> dict[str, bytes]:
    """Of the files, but what is in a lock file is for people only."""
    return {file.name: b"" if file.name == ".lock" else file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("blob", [b"", b"no blob at all", encode_migration(b"x" * 100)])
def test_a_destination_that_runs_keeps_its_lock_whatever_it_is_handed(path: Path, blob: bytes) -> None:
    source = started(path, Layout.CRBD)
    destination = destination_at(path)
    receive(destination, blobs_of(source))
    with pytest.raises(EngineError) as refused:
        destination.set_state_blob(PERMANENT, blob)
    assert refused.value.result == TpmResult.BAD_ORDINAL
    with pytest.raises(StateLockedError):
        opened(path, Layout.CRBD)
    assert run(destination, c.GET_RANDOM) == c.SUCCESS
    destination.close()
    source.close()
