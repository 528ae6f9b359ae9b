"""A running TPM as a document, and a document in the place of a running TPM. docs/state-command.md.

Theory. A snapshot is what `freeze` gives, in the store's own form: of its instance and generation, sealed as it is. It
says of its volatile state that it is a checkpoint: restored to a directory it is gone on from only by a daemon that
powers the TPM on by itself.

A restore exchanges two things that cannot be exchanged in one moment: the TPM in the engine, and what the store holds.
The engine goes first, because it may reject what it is given, and because a TPM that nobody may use yet harms nobody:
the engine lock is held to the end. Then the store. Where either fails, the TPM that was frozen before takes its place
in the engine again, and the store is to hold again what it held (`DurableState.put_back`): commands are answered with
TPM_RC_FAILURE until it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crbd.engine.port import Engine
from crbd.errors import EngineError, StateAbsentError, StateDamagedError, StateError, StoreError
from crbd.service.durable import DurableState
from crbd.service.frozen import FrozenInstance
from crbd.service.stamp import moment, stamp_of
from crbd.state.compatibility import check_engine
from crbd.state.document import Document
from crbd.state.handover import InstanceFacts
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.store.port import Store

NAME = "the snapshot"
_STATES = (StateKind.PERMANENT, StateKind.VOLATILE)


def snapshot_document(engine: Engine, state: DurableState, store: Store, side: SideState | None) -> bytes:
    """The TPM as a document. `side`: of a TPM that is on; None for one that is off, as it lies in the store.

    Raises EngineError, StateError, StoreError.
    """
    state.commit()
    source = state.load if side is None else engine.get_state
    states = {kind: data for kind in _STATES if (data := source(kind)) is not None}
    if StateKind.PERMANENT not in states:
        raise StateAbsentError(f"there is no TPM state in {store.name}", "send INIT first")
    return store.snapshot(states, side or SideState())


@dataclass(frozen=True, slots=True)
class Replacement:
    """What is to take the TPM's place."""

    document: Document
    frozen: FrozenInstance
    lost: int | None
    """The generation that it replaces, where the store counts them."""

    @property
    def says(self) -> str:
        """What became of it, for people."""
        identity = self.document.identity
        if self.lost is None:
            return f"the snapshot of {moment(self.document.written)} is the TPM again; what it did since is lost"
        written = max(self.lost, identity.generation) + 1
        return (
            f"generation {identity.generation} is the TPM again, as generation {written}; "
            f"generation {self.lost} is lost, but for the undo"
        )

    def states(self, store: Store) -> tuple[dict[StateKind, bytes | None], SideState | None]:
        """What the store is to hold, and what belongs to the volatile state there."""
        document = self.document
        states: dict[StateKind, bytes | None] = dict.fromkeys(StateKind)
        states |= {kind: blob.data for kind in StateKind if (blob := document.state(kind)) is not None}
        if document.volatile is None:
            return states, None
        if document.checkpoint and not store.keeps_checkpoints:
            return states | {StateKind.VOLATILE: None}, None
        return states, SideState(document.crb, document.session, document.checkpoint)


def read_replacement(
    engine: Engine, store: Store, data: bytes, now: FrozenInstance, *, allow_rollback: bool
) -> Replacement:
    """The document in `data`, in the place of the TPM `now`, if it may be there. Changes nothing. Raises StateError."""
    document = store.read_snapshot(data, NAME)
    lost = store.overtake(0)
    if not allow_rollback:
        what = f"generation {document.identity.generation} would take the place of generation {lost}"
        raise StateError(
            f"{what if lost is not None else 'the snapshot would take the place of the TPM'}, and what changed in "
            "between be lost",
            "if that is wanted, give --allow-rollback",
        )
    blobs = {kind: blob for kind in StateKind if (blob := document.state(kind)) is not None}
    for blob in blobs.values():
        check_engine(blob, engine.version, NAME)
    store.overtake(document.identity.generation)
    powered = document.volatile is not None and document.crb is not None and document.session is not None
    facts = InstanceFacts(powered=powered, may_manufacture=False, client_sized=now.facts.client_sized)
    frozen = FrozenInstance(
        engine=_engine_of(document),
        states={kind: blob.data for kind, blob in blobs.items()} if powered else {},
        registers=document.crb if powered and document.crb is not None else now.registers,
        session=document.session if powered and document.session is not None else now.session,
        facts=facts,
    )
    return Replacement(document, frozen, lost)


def _engine_of(document: Document) -> EngineStamp:
    assert document.permanent is not None
    return document.permanent.engine


def exchange(
    engine: Engine,
    state: DurableState,
    store: Store,
    *,
    new: Replacement,
    old: FrozenInstance,
    thaw: Callable[[FrozenInstance], None],
) -> None:
    """Put `new` in the place of `old`, in the engine and in the store. `thaw` brings a TPM to life in a stopped engine.

    Raises EngineError, StateError, StoreError: `old` is the TPM again then, or, where the engine does not take even
    that, none is on.
    """
    state.commit()
    before = {kind: state.load(kind) for kind in StateKind}
    side = state.load_side()
    stamp = stamp_of(engine)
    _empty(engine, state)
    written = False
    try:
        _judge(engine, new)
        thaw(new.frozen)
        store.use_engine(stamp_of(engine) if engine.running else _engine_of(new.document))
        written = True
        state.replace(*new.states(store))
    except (EngineError, StateError, StoreError):
        _empty(engine, state)
        store.use_engine(stamp)
        thaw(old)
        if written:
            state.put_back(before, side)
            try:
                state.commit()
            except StoreError as error:
                state.complain(error)
        raise


def _empty(engine: Engine, state: DurableState) -> None:
    """Power off, and forget what was handed in or is pending."""
    engine.stop()
    engine.set_state(StateKind.PERMANENT, None)
    state.discard()


def _judge(engine: Engine, new: Replacement) -> None:
    """A TPM that stays off: see that the engine takes its states. Raises StateDamagedError."""
    if new.frozen.facts.powered:
        return
    try:
        for kind in _STATES:
            blob = new.document.state(kind)
            if blob is not None:
                engine.set_state(kind, blob.data)
    except EngineError as error:
        raise StateDamagedError(
            f"libtpms {engine.version} rejects the state in {NAME} (0x{error.result:x})", "take another snapshot"
        ) from error
    finally:
        engine.set_state(StateKind.PERMANENT, None)
