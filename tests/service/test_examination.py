"""What a TPM's state says when a copy of it is run, and that the state is left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import StateAbsentError, StateDamagedError, StateNewerError
from crbd.service.durable import DurableState
from crbd.service.examination import ek_fingerprint, examine
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, TpmState
from crbd.store.memory import MemoryStore
from crbd.tpm import questions
from crbd.tpm.codes import StartupType
from crbd.tpm.head import response_code, shutdown_command, startup_command

PERMANENT = StateKind.PERMANENT


def make(port: StatePort) -> Engine:
    return LibtpmsEngine(port)


@contextmanager
def running(state: bytes | None = None) -> Iterator[Engine]:
    """A TPM, new or from `state`, started."""
    engine = make(DurableState(MemoryStore()))
    try:
        engine.set_state(PERMANENT, state)
        engine.start()
        assert response_code(engine.execute(startup_command(StartupType.CLEAR))) == 0
        yield engine
    finally:
        engine.close()


def state_of(engine: Engine) -> bytes:
    assert response_code(engine.execute(shutdown_command(StartupType.CLEAR))) == 0
    state = engine.get_state(PERMANENT)
    assert state is not None
    return state


def made(*sizes: int) -> bytes:
    """A TPM with NV indices of these sizes."""
    with running() as engine:
        for number, size in enumerate(sizes):
            assert response_code(engine.execute(questions.define_space(0x01C10000 + number, size))) == 0
        return state_of(engine)


def with_endorsement_key() -> tuple[bytes, bytes]:
    """A TPM with an ECC endorsement key (template L-2) at 0x8101000A, and that key's public area."""
    empty_auth = bytes.fromhex("00000009400000090000000000")
    policy = hashlib.sha256(bytes(32) + bytes.fromhex("00000151") + bytes.fromhex("4000000b")).digest()
    policy = hashlib.sha256(policy).digest()
    template = bytes.fromhex("0023000b000300b2") + len(policy).to_bytes(2, "big") + policy
    template += bytes.fromhex("0006008000430010") + bytes.fromhex("00030010") + bytes(4)
    body = bytes.fromhex("4000000b") + empty_auth + bytes.fromhex("000400000000")
    body += len(template).to_bytes(2, "big") + template + bytes(6)
    create = bytes.fromhex("8002") + (10 + len(body)).to_bytes(4, "big") + bytes.fromhex("00000131") + body
    with running() as engine:
        response = engine.execute(create)
        assert response_code(response) == 0
        public = response[20 : 20 + int.from_bytes(response[18:20], "big")]
        evict = bytes.fromhex("800200000023000001204000000180000000") + empty_auth + bytes.fromhex("8101000a")
        assert response_code(engine.execute(evict)) == 0
        return state_of(engine), public


def test_a_new_tpm_has_room_and_no_endorsement_key() -> None:
    found = examine({PERMANENT: made()}, make, "it")
    assert found.endorsement_keys == ()
    assert (found.nv_indices, found.persistent_keys) == (0, 0)
    assert found.persistent_free > 10
    assert found.nv_free > 100_000
    assert found.engine.version.startswith("0.")


def test_what_is_used_is_not_free() -> None:
    empty = examine({PERMANENT: made()}, make, "it")
    used = examine({PERMANENT: made(2048, 2048, 700)}, make, "it")
    assert used.nv_indices == 3
    assert abs(empty.nv_free - used.nv_free - (2 * 2048 + 700)) < 500, "but for what the indices themselves take"


def test_a_full_memory_has_none_free() -> None:
    with running() as engine:
        index, size = 0x01C10000, 2048
        while size:
            if response_code(engine.execute(questions.define_space(index, size))):
                size //= 2
            index += 1
        state = state_of(engine)
    assert examine({PERMANENT: state}, make, "it").nv_free == 0


def test_endorsement_keys_are_found_by_their_public_area() -> None:
    state, public = with_endorsement_key()
    found = examine({PERMANENT: state}, make, "it")
    (key,) = found.endorsement_keys
    assert (key.handle, key.fingerprint) == (0x8101000A, hashlib.sha256(public).digest())
    assert found.persistent_keys == 1
    assert ek_fingerprint({PERMANENT: state}, make, "it") == key.fingerprint
    assert ek_fingerprint({PERMANENT: made()}, make, "it") == b""


def test_what_does_not_run() -> None:
    with pytest.raises(StateAbsentError, match="no TPM state in it"):
        examine({StateKind.VOLATILE: b"1"}, make, "it")
    with pytest.raises(StateDamagedError, match="does not run the TPM in it"):
        examine({PERMANENT: b"no TPM"}, make, "it")
    with pytest.raises(StateNewerError, match=r"libtpms 9\.9\.9"):
        examine({PERMANENT: TpmState(b"no TPM", EngineStamp(9, 9, 9))}, make, "it")
    assert ek_fingerprint({PERMANENT: b"no TPM"}, make, "it") == b""
