"""A whole instance as a value: what `Instance.freeze` gives and `Instance.thaw` takes.

Everything that makes a TPM go on where it stopped is in here, and nothing that belongs to the process around it. An
upgrade of the daemon, a snapshot and a restart that keeps its clients are this value with another destination.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from uuid import UUID

from crbd.crb.snapshot import CrbSnapshot
from crbd.engine.port import Engine
from crbd.errors import EngineError, StateDamagedError
from crbd.service.durable import DurableState
from crbd.service.migration import StateBlobs
from crbd.service.stamp import stamp_of
from crbd.state.compatibility import check_engine
from crbd.state.crb import CrbStateV3, saved
from crbd.state.document import Document, decode, encode
from crbd.state.handover import NAME as HANDOVER
from crbd.state.handover import Handover, InstanceFacts
from crbd.state.header import WRITER_ID_SIZE
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Identity, Session, TpmState
from crbd.state.side import SideState


@dataclass(frozen=True, slots=True)
class FrozenInstance:
    """One TPM between two commands."""

    engine: EngineStamp
    """Whose states they are."""
    states: Mapping[StateKind, bytes]
    """Of a TPM that is on, its permanent and volatile state as of now; of one that is off, what was handed in."""
    registers: CrbStateV3
    session: Session
    facts: InstanceFacts
    changed: Mapping[StateKind, bytes | None] = field(default_factory=dict)
    """What could not be made durable yet; None is to be deleted."""
    side: SideState | None = None
    """What belongs to the volatile state in `changed`."""

    def state(self, kind: StateKind) -> TpmState | None:
        """One of the states with its engine, as documents hold them."""
        data = self.states.get(kind)
        return None if data is None else TpmState(data, self.engine)


def document_of(frozen: FrozenInstance, writer: str) -> bytes:
    """The TPM as a plain document of no instance: the handover's form of it."""
    identity = Identity(UUID(int=0), "", 0, writer, 0)
    return encode(
        Document(
            identity,
            bytes(WRITER_ID_SIZE),
            0,
            permanent=frozen.state(StateKind.PERMANENT),
            volatile=frozen.state(StateKind.VOLATILE),
            savestate=frozen.state(StateKind.SAVESTATE),
            crb=frozen.registers,
            session=frozen.session,
        )
    )


def frozen_of(handover: Handover) -> FrozenInstance:
    """The other way, from a predecessor's handover. Raises a StateError."""
    document = decode(handover.document, name=HANDOVER)
    states = {kind: state for kind in StateKind if (state := document.state(kind)) is not None}
    if document.crb is None or document.session is None:
        raise StateDamagedError(f"{HANDOVER} lacks registers or session", "start anew")
    engine = next((state.engine for state in states.values()), EngineStamp(0, 0, 0))
    return FrozenInstance(
        engine=engine,
        states={kind: state.data for kind, state in states.items()},
        registers=document.crb,
        session=document.session,
        facts=handover.instance,
        changed=handover.changed,
        side=handover.changed_side,
    )


def freeze_tpm(
    engine: Engine,
    state: DurableState,
    blobs: StateBlobs,
    *,
    session: Session,
    registers: CrbSnapshot,
    facts: InstanceFacts,
) -> FrozenInstance:
    """The value, from an instance's parts. Raises EngineError."""
    kinds = (StateKind.PERMANENT, StateKind.VOLATILE) if facts.powered else sorted(blobs.handed_in)
    return FrozenInstance(
        engine=stamp_of(engine),
        states={kind: data for kind in kinds if (data := engine.get_state(kind)) is not None},
        registers=saved(registers),
        session=session,
        facts=replace(facts, handed_in=blobs.handed_in, incoming=blobs.session),
        changed=dict(state.pending),
        side=state.pending_side,
    )


def thaw_tpm(engine: Engine, state: DurableState, blobs: StateBlobs, frozen: FrozenInstance, name: str) -> None:
    """Bring a stopped engine to where the frozen one was. `name` is what errors call the value.

    Raises StateError, EngineError; the engine is stopped then, and nothing was written.
    """
    for kind in frozen.states:
        check_engine(TpmState(frozen.states[kind], frozen.engine), engine.version, name)
    for kind in StateKind:
        state.load(kind)  # so that what the store holds already is not written again
    if frozen.session.buffer_size != engine.buffer_size().current:
        engine.buffer_size(frozen.session.buffer_size)
    for kind in sorted(frozen.states):
        try:
            engine.set_state(kind, frozen.states[kind])
        except EngineError as error:
            raise StateDamagedError(
                f"libtpms {engine.version} rejects the {kind.name.lower()} state in {name} (0x{error.result:x})",
                "go on with the release that wrote it",
            ) from error
    if frozen.facts.powered:
        _start(engine, state, frozen, name)
    else:
        blobs.take_over(frozen.facts.handed_in, frozen.facts.incoming)
    state.take_over(frozen.changed, frozen.side)


def _start(engine: Engine, state: DurableState, frozen: FrozenInstance, name: str) -> None:
    if StateKind.PERMANENT not in frozen.states or StateKind.VOLATILE not in frozen.states:
        raise StateDamagedError(f"{name}: a TPM that is on lacks its state", "go on with the release that wrote it")
    engine.start()
    if engine.was_manufactured:
        engine.stop()
        state.discard()
        raise StateDamagedError(f"{name}: libtpms made a new TPM instead", "go on with the release that wrote it")
