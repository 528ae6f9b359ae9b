"""The running TPM as a document, for stores whose layout has neither documents nor identities."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace

from crbd import __version__
from crbd.errors import StateError
from crbd.state.document import Document, check_complete, decode, encode, verify
from crbd.state.header import WRITER_ID_SIZE
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp, Identity, TpmState
from crbd.state.side import SideState

WRITER = f"crbd {__version__}"


def pictured(document: Document, states: Mapping[StateKind, bytes], side: SideState, engine: EngineStamp) -> Document:
    """The document with these states and no others, and with this side, as of now."""
    blobs = {kind: TpmState(states[kind], engine) if kind in states else None for kind in StateKind}
    return replace(
        document,
        written=int(time.time()),
        permanent=blobs[StateKind.PERMANENT],
        volatile=blobs[StateKind.VOLATILE],
        savestate=blobs[StateKind.SAVESTATE],
        crb=side.crb,
        session=side.session,
        checkpoint=side.checkpoint,
    )


def plain_snapshot(states: Mapping[StateKind, bytes], side: SideState, engine: EngineStamp) -> bytes:
    """A plain document of an instance made for it."""
    now = int(time.time())
    empty = Document(Identity(uuid.uuid4(), "", 1, WRITER, now), os.urandom(WRITER_ID_SIZE), now)
    return encode(pictured(empty, states, side, engine))


def read_plain_snapshot(data: bytes, name: str) -> Document:
    """Whatever instance's: there is none to compare it with. Raises a StateError for one that is sealed."""
    if verify(data, name).sealed:
        raise StateError(f"{name} is encrypted, and the TPM's state is not", "take a snapshot that is not")
    document = decode(data, name=name)
    check_complete(document, name)
    return document
