"""What every engine promises about state: nothing is lost, nothing is made that was not absent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from crbd.engine.port import Engine
from crbd.errors import EngineError
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

from . import commands as c
from .conftest import EngineFactory, MemoryStatePort

DIGEST = hashlib.sha256(b"measured").digest()
PERMANENT, VOLATILE, SAVESTATE = StateKind


class DiskOnFireError(Exception):
    """What a port of these tests raises."""


def start(engine: Engine) -> None:
    engine.start()
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS


def mark(engine: Engine, value: bytes) -> None:
    """Write something into the TPM that tells it from any other."""
    assert c.code(engine.execute(c.nv_define(len(value)))) == c.SUCCESS
    assert c.code(engine.execute(c.nv_write(value))) == c.SUCCESS


def test_absent_state_is_manufactured_and_stored_at_once(engine: Engine, port: MemoryStatePort) -> None:
    engine.start()
    assert engine.was_manufactured
    assert port.stores == [PERMANENT]
    assert engine.get_state(PERMANENT) == port.states[PERMANENT]


def test_present_state_is_used(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    engine = engine_factory(port)
    start(engine)
    mark(engine, b"the one")
    engine.start()
    assert not engine.was_manufactured
    another = engine_factory(port)
    start(another)
    assert not another.was_manufactured
    assert c.nv_value(another.execute(c.nv_read(7))) == b"the one"


def test_two_new_tpms_differ(engine_factory: EngineFactory) -> None:
    states = []
    for port in (MemoryStatePort(), MemoryStatePort()):
        engine_factory(port).start()
        states.append(port.states[PERMANENT])
    assert states[0] != states[1]


def test_a_change_is_stored_before_the_answer(engine: Engine, port: MemoryStatePort) -> None:
    start(engine)
    port.stores.clear()
    before = port.states[PERMANENT]
    mark(engine, b"x")
    assert port.stores == [PERMANENT, PERMANENT]
    assert port.states[PERMANENT] != before
    assert port.states[PERMANENT] == engine.get_state(PERMANENT)


@pytest.mark.parametrize("kind", [PERMANENT, VOLATILE])
def test_state_that_cannot_be_read_is_never_made_new(
    engine_factory: EngineFactory, port: MemoryStatePort, kind: StateKind
) -> None:
    start(engine_factory(port))
    before = dict(port.states)
    port.stores.clear()
    port.load_error, port.load_error_kind = DiskOnFireError(), kind
    engine = engine_factory(port)
    with pytest.raises(DiskOnFireError):
        engine.start()
    assert not engine.running
    assert not engine.was_manufactured
    assert port.stores == []
    assert port.states == before
    port.load_error = None
    engine.start()
    assert not engine.was_manufactured


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "flipped", "foreign"])
@pytest.mark.parametrize("kind", [PERMANENT, VOLATILE])
def test_damaged_state_is_an_error_and_stays(
    engine_factory: EngineFactory,
    port: MemoryStatePort,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    kind: StateKind,
    damage: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    first = engine_factory(port)
    start(first)
    volatile = first.get_state(VOLATILE)
    assert volatile is not None
    port.states[VOLATILE] = volatile
    good = port.states[kind]
    port.states[kind] = {
        "empty": b"",
        "short": good[:4],
        "cut": good[:-1],
        "flipped": good[:2] + bytes([good[2] ^ 0x40]) + good[3:],
        "foreign": b"\x89PNG\r\n\x1a\n" + bytes(1000),
    }[damage]
    before = dict(port.states)
    port.stores.clear()
    engine = engine_factory(port)
    with pytest.raises(EngineError):
        engine.start()
    assert not engine.running
    assert port.stores == []
    assert port.states == before
    assert list(tmp_path.iterdir()) == []
    port.states[kind] = good
    engine.start()
    assert not engine.was_manufactured


def test_a_new_tpm_has_nothing_of_an_old_volatile_state(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    first = engine_factory(port)
    start(first)
    first.execute(c.pcr_extend(10, DIGEST))
    volatile = first.get_state(VOLATILE)
    assert volatile is not None
    port.states = {VOLATILE: volatile}
    engine = engine_factory(port)
    engine.start()
    assert engine.was_manufactured
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    assert c.pcr_value(engine.execute(c.pcr_read(10))) == bytes(32)


def test_a_failed_store_withholds_the_answer_and_ends_in_failure_mode(engine: Engine, port: MemoryStatePort) -> None:
    start(engine)
    before = port.states[PERMANENT]
    error = port.store_error = DiskOnFireError()
    with pytest.raises(DiskOnFireError) as caught:
        engine.execute(c.nv_define(8))
    assert caught.value is error
    port.store_error = None
    assert engine.running
    assert c.code(engine.execute(c.GET_RANDOM)) == c.FAILURE
    assert c.code(engine.execute(b"x" * 5000)) == c.FAILURE
    assert port.states[PERMANENT] == before
    start(engine)
    assert c.code(engine.execute(c.nv_define(8))) == c.SUCCESS


def test_a_new_tpm_that_cannot_be_stored_does_not_come_up(engine: Engine, port: MemoryStatePort) -> None:
    port.store_error = DiskOnFireError()
    with pytest.raises(DiskOnFireError):
        engine.start()
    assert not engine.running
    assert not engine.was_manufactured
    assert port.states == {}
    port.store_error = None
    start(engine)
    assert engine.was_manufactured


def test_an_interrupt_in_the_port_comes_out(engine: Engine, port: MemoryStatePort) -> None:
    start(engine)
    port.store_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.execute(c.nv_define(8))


def test_volatile_state_resumes(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    engine = engine_factory(port)
    start(engine)
    engine.execute(c.pcr_extend(10, DIGEST))
    expected = c.pcr_value(engine.execute(c.pcr_read(10)))
    volatile = engine.get_state(VOLATILE)
    assert volatile is not None
    port.states[VOLATILE] = volatile
    another = engine_factory(port)
    another.start()
    assert not another.was_manufactured
    assert c.pcr_value(another.execute(c.pcr_read(10))) == expected


def test_state_moves_to_another_engine(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    source = engine_factory(port)
    start(source)
    mark(source, b"moved")
    source.execute(c.pcr_extend(10, DIGEST))
    expected = c.pcr_value(source.execute(c.pcr_read(10)))
    blobs = {kind: source.get_state(kind) for kind in StateKind}
    assert blobs[SAVESTATE] is None

    destination_port = MemoryStatePort()
    destination = engine_factory(destination_port)
    for kind in (PERMANENT, VOLATILE):
        destination.set_state(kind, blobs[kind])
        assert destination.get_state(kind) == blobs[kind]
    assert destination_port.stores == []
    destination.start()
    assert not destination.was_manufactured
    assert c.nv_value(destination.execute(c.nv_read(5))) == b"moved"
    assert c.pcr_value(destination.execute(c.pcr_read(10))) == expected
    assert destination_port.stores == [PERMANENT]
    destination.start()
    assert c.code(destination.execute(c.GET_RANDOM)) == c.INITIALIZE


def test_handed_in_state_comes_before_stored_state(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    other_port = MemoryStatePort()
    other = engine_factory(other_port)
    start(other)
    mark(other, b"other")
    engine = engine_factory(port)
    start(engine)
    mark(engine, b"own")
    engine.stop()
    engine.set_state(PERMANENT, other_port.states[PERMANENT])
    start(engine)
    assert c.nv_value(engine.execute(c.nv_read(5))) == b"other"
    start(engine)
    assert c.nv_value(engine.execute(c.nv_read(5))) == b"other"


def test_handed_in_state_can_be_taken_back(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    engine = engine_factory(port)
    start(engine)
    mark(engine, b"own")
    engine.execute(c.pcr_extend(10, DIGEST))
    volatile = engine.get_state(VOLATILE)
    engine.stop()
    permanent = port.states[PERMANENT]
    engine.set_state(PERMANENT, permanent)
    engine.set_state(VOLATILE, volatile)
    engine.set_state(VOLATILE, None)
    assert engine.get_state(VOLATILE) is None
    engine.start()
    assert c.code(engine.execute(c.GET_RANDOM)) == c.INITIALIZE

    foreign_port = MemoryStatePort()
    foreign = engine_factory(foreign_port)
    foreign.set_state(PERMANENT, permanent)
    foreign.set_state(VOLATILE, volatile)
    foreign.set_state(PERMANENT, None)
    assert foreign.get_state(PERMANENT) is None
    assert foreign.get_state(VOLATILE) is None
    foreign.start()
    assert foreign.was_manufactured
    assert c.code(foreign.execute(c.GET_RANDOM)) == c.INITIALIZE


def test_a_volatile_state_needs_its_permanent_state(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    source = engine_factory(port)
    start(source)
    volatile = source.get_state(VOLATILE)
    empty = engine_factory(MemoryStatePort())
    with pytest.raises(EngineError):
        empty.set_state(VOLATILE, volatile)
    same = engine_factory(port)
    same.set_state(VOLATILE, volatile)
    same.start()
    assert c.code(same.execute(c.GET_RANDOM)) == c.SUCCESS


@pytest.mark.parametrize("kind", [PERMANENT, VOLATILE, SAVESTATE])
@pytest.mark.parametrize("rubbish", [b"", b"rubbish", bytes(5000)])
def test_rejected_state_takes_all_handed_in_state_along(
    engine_factory: EngineFactory, port: MemoryStatePort, kind: StateKind, rubbish: bytes
) -> None:
    source = engine_factory(port)
    start(source)
    engine = engine_factory(MemoryStatePort())
    engine.set_state(PERMANENT, port.states[PERMANENT])
    with pytest.raises(EngineError):
        engine.set_state(kind, rubbish)
    assert engine.get_state(PERMANENT) is None
    engine.start()
    assert engine.was_manufactured


def test_state_cannot_be_handed_to_a_running_tpm(engine: Engine, port: MemoryStatePort) -> None:
    engine.start()
    for data in (port.states[PERMANENT], None):
        with pytest.raises(EngineError) as caught:
            engine.set_state(PERMANENT, data)
        assert caught.value.result == TpmResult.INVALID_POSTINIT


def test_a_load_error_while_judging_volatile_state_comes_out(engine: Engine, port: MemoryStatePort) -> None:
    start(engine)
    volatile = engine.get_state(VOLATILE)
    engine.stop()
    port.load_error = DiskOnFireError()
    with pytest.raises(DiskOnFireError):
        engine.set_state(VOLATILE, volatile)
    with pytest.raises(DiskOnFireError):
        engine.get_state(PERMANENT)
