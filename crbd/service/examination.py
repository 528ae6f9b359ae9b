"""What only the TPM itself can say of its state: its endorsement keys, and how much room its NV memory has.

A copy of the permanent state is powered on in an engine that stores into memory, is asked, and is thrown away. The
state it is a copy of is not touched, and nobody's guest sees anything of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from crbd.engine.port import Engine
from crbd.errors import EngineError, StateAbsentError, StateDamagedError, StateError, WireError
from crbd.service.durable import DurableState
from crbd.service.judgement import MakeEngine
from crbd.state.compatibility import check_engine
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, TpmState
from crbd.store.memory import MemoryStore
from crbd.tpm import questions
from crbd.tpm.codes import ResponseCode, StartupType
from crbd.tpm.head import response_code, startup_command

ENDORSEMENT_KEYS: Final = range(0x81010000, 0x81020000)
"""Persistent handles of endorsement keys (TCG Registry of Reserved TPM 2.0 Handles, 2.3.1)."""
_MANY: Final = 1000
_FIRST_PROBE: Final = 0x01BFFFFF
"""Indices are tried from here downwards: the end of the range that the registry gives to nobody's guest in
particular."""
_SMALLEST_PROBE: Final = 16
_MOST_PROBES: Final = 400


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """A persistent endorsement key."""

    handle: int
    fingerprint: bytes
    """SHA-256 of its public area (TPMT_PUBLIC), as the document's identity section has it."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What the TPM said."""

    engine: EngineStamp
    """Version of the library that ran it."""
    endorsement_keys: tuple[EndorsementKey, ...]
    nv_indices: int
    persistent_keys: int
    persistent_free: int
    """How many more the TPM believes to have room for."""
    nv_free: int
    """Bytes of data that indices as large as can be would still hold."""


def examine(states: Mapping[StateKind, bytes | TpmState], make_engine: MakeEngine, name: str) -> Examination:
    """Ask a copy of the TPM whose permanent state is in `states`; `name` goes into the errors.

    Raises EngineMissingError, StateAbsentError (no permanent state), StateNewerError, or StateDamagedError where the
    engine rejects the state or does not run it.
    """
    permanent = states.get(StateKind.PERMANENT)
    if permanent is None:
        raise StateAbsentError(f"there is no TPM state in {name}", "check the path")
    engine = make_engine(DurableState(MemoryStore()))
    try:
        version = engine.version
        if isinstance(permanent, TpmState):
            check_engine(permanent, version, name)
            permanent = permanent.data
        try:
            engine.set_state(StateKind.PERMANENT, permanent)
            engine.start()
            _expect_success(engine.execute(startup_command(StartupType.CLEAR)))
            return _asked(engine, EngineStamp(version.major, version.minor, version.micro))
        except (EngineError, WireError) as error:
            raise StateDamagedError(
                f"libtpms {version} does not run the TPM in {name} ({error})",
                "restore it from a backup, or use the libtpms that wrote it",
            ) from error
    finally:
        engine.close()


def ek_fingerprint(states: Mapping[StateKind, bytes | TpmState], make_engine: MakeEngine, name: str) -> bytes:
    """That of the endorsement key with the lowest handle, for a document's identity section; empty for none.

    A TPM that does not run has none either: that it runs is not asked here. Raises EngineMissingError.
    """
    try:
        keys = examine(states, make_engine, name).endorsement_keys
    except StateError:
        return b""
    return keys[0].fingerprint if keys else b""


def _asked(engine: Engine, stamp: EngineStamp) -> Examination:
    """Raises EngineError, WireError."""
    handles = _handles(engine, questions.PERSISTENT_FIRST)
    properties = questions.properties_in(
        engine.execute(questions.get_capability(questions.CAP_TPM_PROPERTIES, questions.PT_HR_NV_INDEX, 16))
    )
    return Examination(
        engine=stamp,
        endorsement_keys=tuple(
            EndorsementKey(handle, _fingerprint(engine, handle)) for handle in handles if handle in ENDORSEMENT_KEYS
        ),
        nv_indices=properties[questions.PT_HR_NV_INDEX],
        persistent_keys=properties[questions.PT_HR_PERSISTENT],
        persistent_free=properties[questions.PT_HR_PERSISTENT_AVAIL],
        nv_free=_free_nv(engine),
    )


def _handles(engine: Engine, first: int) -> tuple[int, ...]:
    return questions.handles_in(engine.execute(questions.get_capability(questions.CAP_HANDLES, first, _MANY)))


def _fingerprint(engine: Engine, handle: int) -> bytes:
    return hashlib.sha256(questions.public_area_in(engine.execute(questions.read_public(handle)))).digest()


def _free_nv(engine: Engine) -> int:
    """Fill what is free: no property tells, and the overhead of an index is the library's own. Comes last."""
    found = questions.properties_in(
        engine.execute(questions.get_capability(questions.CAP_TPM_PROPERTIES, questions.PT_NV_INDEX_MAX, 1))
    )
    size, free, index = found[questions.PT_NV_INDEX_MAX], 0, _FIRST_PROBE
    for _ in range(_MOST_PROBES):
        if size < _SMALLEST_PROBE:
            break
        code = response_code(engine.execute(questions.define_space(index, size)))
        if code == questions.NV_SPACE:
            size //= 2
            continue
        index -= 1
        if code == ResponseCode.SUCCESS:
            free += size
        elif code != questions.NV_DEFINED:
            raise WireError(f"TPM2_NV_DefineSpace was answered with 0x{code or 0:x}")
    return free


def _expect_success(response: bytes) -> None:
    code = response_code(response)
    if code != ResponseCode.SUCCESS:
        raise WireError(f"TPM2_Startup was answered with 0x{code or 0:x}")
