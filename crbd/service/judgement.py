"""Let the engine judge a TPM's state without starting a TPM: what `serve` finds out before it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from crbd.engine.port import Engine, StatePort
from crbd.errors import EngineError, StateAbsentError, StateDamagedError
from crbd.service.durable import DurableState
from crbd.state.compatibility import check_engine
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, TpmState
from crbd.store.memory import MemoryStore

MakeEngine = Callable[[StatePort], Engine]


def judge(states: Mapping[StateKind, bytes | TpmState], make_engine: MakeEngine, name: str) -> EngineStamp:
    """Hand the permanent and then the volatile state to a new engine that is never started; returns which it was.

    States with a stamp are compared with the engine before it sees a byte of any. `name` goes into the errors. Raises
    EngineMissingError, StateAbsentError (no permanent state), StateNewerError, or StateDamagedError where the engine
    rejects a state.
    """
    if StateKind.PERMANENT not in states:
        raise StateAbsentError(f"there is no TPM state in {name}", "check the path")
    # Not the states themselves: what the engine were to store on the way must not reach them.
    engine = make_engine(DurableState(MemoryStore()))
    try:
        version = engine.version
        for state in states.values():
            if isinstance(state, TpmState):
                check_engine(state, version, name)
        for kind in (StateKind.PERMANENT, StateKind.VOLATILE):
            if kind in states:
                state = states[kind]
                hand_in(engine, kind, state.data if isinstance(state, TpmState) else state, name)
        return EngineStamp(version.major, version.minor, version.micro)
    finally:
        engine.close()


def hand_in(engine: Engine, kind: StateKind, data: bytes, name: str) -> None:
    """Give a stopped engine the state that lies in `name`. Raises StateDamagedError where it rejects that."""
    try:
        engine.set_state(kind, data)
    except EngineError as error:
        raise StateDamagedError(
            f"libtpms {engine.version} rejects the {kind.name.lower()} state in {name} (0x{error.result:x})",
            "restore it from a backup, or use the libtpms that wrote it",
        ) from error
