"""What every engine promises about power and commands."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crbd.engine.port import Engine
from crbd.errors import EngineError
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

from . import commands as c
from .conftest import EngineFactory, MemoryStatePort

DIGEST = hashlib.sha256(b"measured").digest()
ZERO = bytes(32)


def extended(value: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(value + digest).digest()


@pytest.fixture
def started(engine: Engine) -> Engine:
    """An engine that is on, TPM2_Startup done."""
    engine.start()
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    return engine


def test_it_begins_off(engine: Engine) -> None:
    assert not engine.running
    engine.stop()
    assert not engine.running


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.execute(c.STARTUP_CLEAR),
        lambda engine: engine.execute(b"\0" * 100_000),
        lambda engine: engine.established(),
        lambda engine: engine.reset_established(4),
        lambda engine: engine.hash_start(),
        lambda engine: engine.hash_data(b"data"),
        lambda engine: engine.hash_end(),
    ],
)
def test_what_needs_power_fails_without(engine: Engine, call: object) -> None:
    assert callable(call)
    with pytest.raises(EngineError) as caught:
        call(engine)
    assert caught.value.result == TpmResult.INVALID_POSTINIT


def test_commands_wait_for_startup_after_every_start(engine: Engine) -> None:
    for _ in range(2):
        engine.start()
        assert engine.running
        assert c.code(engine.execute(c.GET_RANDOM)) == c.INITIALIZE
        assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
        assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.INITIALIZE
        assert c.code(engine.execute(c.GET_RANDOM)) == c.SUCCESS


def test_stop_and_start_again(started: Engine) -> None:
    started.stop()
    assert not started.running
    with pytest.raises(EngineError):
        started.execute(c.GET_RANDOM)
    started.start()
    assert c.code(started.execute(c.GET_RANDOM)) == c.INITIALIZE


# Heads and parameters that are wrong: what is sent, what libtpms 0.9 answers.
MALFORMED = [
    ("", 0x09A),
    ("80", 0x09A),
    ("8001", 0x09A),
    ("80010000", 0x09A),
    ("800100000009000001", 0x09A),
    ("80010000000a0000", 0x142),
    ("8001000000080000", 0x09A),
    ("00c10000000a0000017b", 0x084),
    ("90010000000a0000017b", 0x084),
    ("80010000000b0000017b0010", 0x142),
    ("80010000000a00000fff", 0x143),
    ("80010000000a0000017b", 0x1DA),
    ("80010000000d0000017b001000", 0x095),
    ("80020000000c0000017b0010", 0x09A),
]


@pytest.mark.parametrize(("sent", "answer"), MALFORMED)
def test_malformed_commands_are_answered(started: Engine, sent: str, answer: int) -> None:
    response = started.execute(bytes.fromhex(sent))
    assert response == struct.pack(">HII", 0x8001, 10, answer)


@pytest.mark.parametrize("size", [4097, 8192, 1_000_000])
def test_a_command_longer_than_the_buffer_has_the_wrong_size(started: Engine, size: int) -> None:
    honest = struct.pack(">HII", 0x8001, size, 0x17B) + b"\0" * (size - 10)
    assert c.code(started.execute(honest)) == c.COMMAND_SIZE
    assert c.code(started.execute(c.GET_RANDOM + b"\0" * (size - 12))) == c.COMMAND_SIZE
    cut = struct.pack(">HII", 0x8001, 4096, 0x17B) + b"\0" * (size - 10)
    assert c.code(started.execute(cut)) == c.COMMAND_SIZE
    assert c.code(started.execute(c.GET_RANDOM)) == c.SUCCESS


def test_the_buffer_size_set_is_the_one_in_force(engine: Engine) -> None:
    before = engine.buffer_size()
    assert before.minimum <= before.current == before.maximum
    assert engine.buffer_size(1).current == before.minimum
    assert engine.buffer_size(2**40).current == before.maximum
    assert engine.buffer_size(before.maximum - 8).current == before.maximum - 8
    assert engine.buffer_size().current == before.maximum - 8
    engine.start()
    with pytest.raises(EngineError) as caught:
        engine.buffer_size(before.maximum)
    assert caught.value.result == TpmResult.INVALID_POSTINIT
    assert engine.buffer_size().current == before.maximum - 8
    engine.execute(c.STARTUP_CLEAR)
    size = before.maximum - 7
    assert c.code(engine.execute(struct.pack(">HII", 0x8001, size, 0x17B) + bytes(size - 10))) == c.COMMAND_SIZE


def test_a_new_engine_has_the_largest_buffer(engine_factory: EngineFactory, port: MemoryStatePort) -> None:
    engine_factory(port).buffer_size(1)
    size = engine_factory(port).buffer_size()
    assert size.current == size.maximum


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_command_may_be_any_bytes_and_stays_as_it_is(started: Engine, kind: type) -> None:
    command = kind(c.GET_RANDOM)
    answer = started.execute(command)
    assert type(answer) is bytes
    assert c.code(answer) == c.SUCCESS
    assert len(answer) == 28
    assert bytes(command) == c.GET_RANDOM


def test_an_answer_is_not_overwritten_by_the_next(started: Engine) -> None:
    first = started.execute(c.GET_RANDOM)
    kept = bytes(bytearray(first))
    assert started.execute(c.GET_RANDOM) != first
    assert first == kept


def test_pcrs_are_extended_and_read(started: Engine) -> None:
    assert c.pcr_value(started.execute(c.pcr_read(10))) == ZERO
    assert c.code(started.execute(c.pcr_extend(10, DIGEST))) == c.SUCCESS
    assert c.pcr_value(started.execute(c.pcr_read(10))) == extended(ZERO, DIGEST)


def test_a_thousand_pcr_extends_store_nothing(started: Engine, port: MemoryStatePort) -> None:
    port.stores.clear()
    for _ in range(1000):
        assert c.code(started.execute(c.pcr_extend(10, DIGEST))) == c.SUCCESS
    assert port.stores == []


def test_the_locality_is_read_at_every_command(engine: Engine) -> None:
    engine.start()
    engine.locality = 1
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.LOCALITY
    engine.locality = 0
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    for locality, answer in [(0, c.LOCALITY), (1, c.SUCCESS), (2, c.SUCCESS), (0, c.LOCALITY), (3, c.SUCCESS)]:
        engine.locality = locality
        assert engine.locality == locality
        assert c.code(engine.execute(c.pcr_extend(20, DIGEST))) == answer


def test_a_cancel_while_idle_is_forgotten(started: Engine) -> None:
    started.cancel()
    assert c.code(started.execute(c.GET_RANDOM)) == c.SUCCESS
    started.stop()
    started.cancel()


def test_the_hash_sequence_extends_pcr_17(started: Engine) -> None:
    assert not started.established()
    started.hash_start()
    started.hash_data(b"measured ")
    started.hash_data(b"")
    started.hash_data(b"launch" * 10_000)
    started.hash_end()
    digest = hashlib.sha256(b"measured " + b"launch" * 10_000).digest()
    assert c.pcr_value(started.execute(c.pcr_read(17))) == extended(ZERO, digest)
    assert started.established()


def test_a_command_ends_the_hash_sequence_without_effect(started: Engine) -> None:
    before = started.execute(c.pcr_read(17))
    started.hash_start()
    started.hash_data(b"data")
    started.execute(c.GET_RANDOM)
    started.hash_end()
    assert c.pcr_value(started.execute(c.pcr_read(17))) == c.pcr_value(before)


def test_a_hash_sequence_before_startup_measures_into_pcr_0(engine: Engine) -> None:
    engine.start()
    engine.hash_start()
    engine.hash_data(b"firmware")
    engine.hash_end()
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    expected = extended(bytes(31) + b"\4", hashlib.sha256(b"firmware").digest())
    assert c.pcr_value(engine.execute(c.pcr_read(0))) == expected


def test_the_established_flag_is_reset_from_localities_3_and_4_alone(started: Engine) -> None:
    started.locality = 2
    for locality, allowed in [(0, False), (1, False), (2, False), (3, True), (4, True), (5, False), (259, False)]:
        started.hash_start()
        started.hash_end()
        if allowed:
            started.reset_established(locality)
        else:
            with pytest.raises(EngineError) as caught:
                started.reset_established(locality)
            assert caught.value.result == TpmResult.BAD_LOCALITY
        assert started.established() is not allowed
        assert started.locality == 2


def test_the_established_flag_outlives_power_but_not_the_engine(
    engine_factory: EngineFactory, port: MemoryStatePort
) -> None:
    engine = engine_factory(port)
    engine.start()
    engine.hash_start()
    engine.stop()
    engine.start()
    assert engine.established()
    another = engine_factory(port)
    another.start()
    assert not another.established()


def test_info_is_json(engine: Engine) -> None:
    assert json.loads(engine.info(1))["TPMSpecification"]["family"] == "2.0"
    engine.start()
    assert json.loads(engine.info(1))["TPMSpecification"]["family"] == "2.0"


def test_profiles_only_where_they_are_supported(engine: Engine) -> None:
    assert engine.supports_profiles is ((engine.version.major, engine.version.minor) >= (0, 10))
    if not engine.supports_profiles:
        with pytest.raises(EngineError):
            engine.set_profile('{"Name":"default-v1"}')


def test_shutdown_state_keeps_pcrs(started: Engine) -> None:
    started.execute(c.pcr_extend(3, DIGEST))
    assert c.code(started.execute(c.SHUTDOWN_STATE)) == c.SUCCESS
    started.start()
    assert c.code(started.execute(c.STARTUP_STATE)) == c.SUCCESS
    assert c.pcr_value(started.execute(c.pcr_read(3))) == extended(ZERO, DIGEST)


CODES = st.sampled_from([0x122, 0x12A, 0x137, 0x143, 0x144, 0x145, 0x14E, 0x176, 0x17B, 0x17E, 0x182]) | st.integers(
    0, 0xFFFFFFFF
)


@st.composite
def commands(draw: st.DrawFn) -> bytes:
    """Bytes that get as far into the TPM as chance lets them: whole heads, mostly honest ones, or none."""
    body = draw(st.binary(max_size=200))
    if draw(st.booleans()):
        sessions = draw(st.just(c.PASSWORD) | st.binary(max_size=40))
        handles = draw(st.sampled_from([(c.OWNER,), (c.OWNER, c.NV_INDEX), (0,), ()]))
        return c.authorized(draw(CODES), handles, body, sessions)
    return draw(st.just(c.command(draw(CODES), body)) | st.just(body) | st.binary(min_size=4000, max_size=5000))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(command=commands(), locality=st.integers(0, 4))
def test_no_bytes_break_it(started: Engine, command: bytes, locality: int) -> None:
    started.locality = locality
    answer = c.code(started.execute(command))
    assert answer != c.FAILURE
    assert started.running
    assert started.get_state(StateKind.VOLATILE)
