"""What a start finds in the store: a TPM that runs, one whose backup has to do, one that was not shut down.

Whether a TPM was shut down only the TPM knows. So a copy of it is powered on and started in the engine before the
daemon serves, is asked, and is forgotten; nothing of that is stored. Costs some milliseconds.
"""

from __future__ import annotations

import logging

from crbd.engine.port import Engine
from crbd.errors import EngineError, StateDamagedError, StateError, StoreError, WireError
from crbd.service.durable import DurableState
from crbd.service.judgement import hand_in
from crbd.service.stamp import moment
from crbd.state.kinds import StateKind
from crbd.store.port import Store
from crbd.tpm.codes import StartupType
from crbd.tpm.head import startup_command
from crbd.tpm.questions import CAP_TPM_PROPERTIES, get_capability, properties_in

log = logging.getLogger(__name__)

_PT_STARTUP_CLEAR = 0x201
"""TPM_PT_STARTUP_CLEAR (TPM 2.0 Part 2, 6.13), a TPMA_STARTUP_CLEAR (8.4)."""
_ORDERLY = 1 << 31
_LOST = "its volatile state (PCRs, sessions, loaded objects) is lost, and its guest has to start anew"


def look_at_stored(engine: Engine, state: DurableState, store: Store, *, goes_on: bool) -> None:
    """See that the TPM in the store runs, and say in the log if it was not shut down. The engine is off.

    `goes_on`: whether the daemon will power it on by itself. As swtpm does, the backup takes the place of permanent
    state that libtpms rejects, where the store keeps one that libtpms accepts; that is logged. Raises StateError.
    """
    try:
        orderly = _was_shut_down(engine, state, store)
    except StateDamagedError as error:
        orderly = _of_the_backup(engine, state, store, error)
    if orderly is False:
        log.warning("the TPM in %s was not shut down%s: %s", store.name, _when(store), _what_follows(state, goes_on))


def _was_shut_down(engine: Engine, state: DurableState, store: Store) -> bool | None:
    """None where it does not say. Raises StateError: StateDamagedError where it does not run."""
    permanent = state.load(StateKind.PERMANENT) or b""
    # The question is put to a TPM that begins; one that goes on has forgotten how it began.
    state.delete(StateKind.VOLATILE)
    try:
        hand_in(engine, StateKind.PERMANENT, permanent, store.name)
        engine.start()
        engine.execute(startup_command(StartupType.CLEAR))
        answer = engine.execute(get_capability(CAP_TPM_PROPERTIES, _PT_STARTUP_CLEAR, 1))
    except EngineError as error:
        raise StateDamagedError(
            f"libtpms {engine.version} does not run the TPM in {store.name} (0x{error.result:x})",
            "restore it from a backup, or use the libtpms that wrote it",
        ) from error
    finally:
        engine.stop()
        engine.set_state(StateKind.PERMANENT, None)
        state.forget()
    try:
        return bool(properties_in(answer)[_PT_STARTUP_CLEAR] & _ORDERLY)
    except (WireError, KeyError):
        return None


def _of_the_backup(engine: Engine, state: DurableState, store: Store, error: StateDamagedError) -> bool | None:
    """Let the backup take the place of what was rejected with `error`, which is raised if that is no better."""
    if not store.locked or not store.swap_backup():
        raise error
    try:
        orderly = _was_shut_down(engine, state, store)
        state.load(StateKind.VOLATILE)
        state.delete(StateKind.VOLATILE)
        state.commit()
    except (StateError, StoreError):
        state.forget()
        store.swap_backup()
        raise error from None
    log.warning("%s: its backup took its place, and the last change to the TPM is lost", error.what)
    return orderly


def _what_follows(state: DurableState, goes_on: bool) -> str:
    if state.load(StateKind.VOLATILE) is None:
        return _LOST
    side = state.load_side()
    if side is None or not side.checkpoint:
        return "it goes on from the volatile state that was stored"
    return "it goes on from its checkpoint, as of its last command" if goes_on else f"INIT resets it; {_LOST}"


def _when(store: Store) -> str:
    if store.written is None:
        return ""
    return f" (last written {moment(store.written)})"
