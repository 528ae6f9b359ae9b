"""A restart that keeps its clients: the handover, left to the service manager and taken back. Decision 8.

Theory. At SIGTERM nobody says whether a stop or a restart is meant, so what is left has to be right for both. In this
order, and what fails on the way makes it an ordinary end:

    freeze      all clients, then the TPM: the handover, in memory
    lay down    the TPM is shut down as at any end, durably
    note        what the store holds now goes into the handover, as a digest: the state at rest
    keep        the manager gets the sockets, the store's lock and, last of all, the handover

After a stop the manager lets go of all that, and the TPM at rest is one that was shut down in good order. After a
restart the next daemon finds the handover:

    claim       the manager forgets it first: it is gone on from once, or never
    compare     the store must still hold the state at rest; if the TPM has run since, or another one lies there, the
                handover is stale: it is let go, and the start is an ordinary one
    thaw        the TPM as it was before it was laid down
    write back  its state of then, so that a crash after this finds no TPM that was shut down

Killed at any point, the TPM on disk is either as its last answered command left it, or shut down after that.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from crbd.errors import HandoverError, StateError, UsageError
from crbd.server.endpoint import Endpoint, is_at
from crbd.server.succession import LOCK, Inheritance, in_memory
from crbd.service.frozen import FrozenInstance, frozen_of
from crbd.state.handover import MAX_HANDOVER, Handover, decode, encode
from crbd.state.kinds import StateKind
from crbd.store.lockfile import inherit as inherit_lock
from crbd.store.lockfile import let_go
from crbd.store.port import Store
from crbd.systemd.fdstore import forget, keep, room
from crbd.systemd.notify import barrier

log = logging.getLogger(__name__)

DOCUMENT = "handover"
"""The name of the descriptor of the memory that holds it."""
BUFFER = "registers.buffer"
"""The name of the descriptor of the served registers' data buffer."""
CHANNELS = ("ctrl", "data", "registers")
"""The names of sockets that socket units have."""


# -- leaving
# ----------------------------------------------------------------------------------------------------------------------


def leave(handover: Handover, store: Store) -> None:
    """Give the manager the handover of a TPM that was laid down since.

    Raises OSError, StateError, or HandoverError where there is no room. What the manager has then is not whole, and no
    daemon will go on from it.
    """
    left = replace(
        handover,
        at_rest=at_rest(store),
        changed={},  # it was committed when the TPM was laid down
        held=store.estate().held,
        held_side=store.estate().held_side,
        secrets={},  # the next daemon reads its keys as at any start; nobody is to keep them meanwhile
        pid_file="",
    )
    limit = room()
    if limit is not None and len(left.descriptors) >= limit:
        raise HandoverError(f"{len(left.descriptors) + 1} descriptors are to be kept", "raise FileDescriptorStoreMax=")
    memory = in_memory(encode(left))
    try:
        # The document last: where it is, all is.
        for name, descriptor in (*left.descriptors.items(), (DOCUMENT, memory)):
            if not keep(name, descriptor):
                raise HandoverError("there is no service manager to keep them", "leave --fd-store out")
        barrier()
    finally:
        os.close(memory)


def at_rest(store: Store) -> bytes:
    """What the store holds, as a SHA-256. Raises StateError."""
    digest = hashlib.sha256()
    for kind in StateKind:
        data = store.load(kind)
        digest.update(b"\0" if data is None else b"\1" + len(data).to_bytes(8, "little") + data)
    return digest.digest()


# -- coming back
# ----------------------------------------------------------------------------------------------------------------------


def sorted_out(passed: Sequence[tuple[str, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """What the manager passed: the sockets of socket units, by channel, and what a daemon before this one left.

    Raises UsageError for a socket of another name, or two of one.
    """
    sockets: dict[str, int] = {}
    left: dict[str, int] = {}
    for name, number in passed:
        if name == DOCUMENT or ("." in name and not name.endswith(".socket")):
            left[name] = number
        elif name not in CHANNELS:
            raise UsageError(
                f"the service manager passes a socket called {name}",
                f"set FileDescriptorName= in its unit to one of {', '.join(CHANNELS)}",
            )
        elif name in sockets:
            raise UsageError(
                f"the service manager passes two sockets called {name}", "give each channel one ListenStream="
            )
        else:
            sockets[name] = number
    return sockets, left


def left_behind(left: Mapping[str, int]) -> Inheritance | None:
    """What the daemon before this one left; None, where that is nothing or cannot be gone on from, which is logged."""
    if not left:
        return None
    descriptors = {name: number for name, number in left.items() if name != DOCUMENT}
    try:
        if DOCUMENT not in left:
            raise HandoverError("the handover itself is not there", "raise FileDescriptorStoreMax=")
        with open(left[DOCUMENT], "rb", closefd=False) as file:
            file.seek(0)
            handover = decode(file.read(MAX_HANDOVER + 1), descriptors)
        _require_all(handover)
        if LOCK in descriptors:
            inherit_lock(descriptors[LOCK])
    except (StateError, HandoverError, OSError) as error:
        log.error("the clients of the daemon before this one are lost: %s", error)
        _drop(left)
        return None
    os.close(left[DOCUMENT])
    return Inheritance(handover, trial=False)


def claimed(inherited: Inheritance, store: Store, endpoints: Mapping[str, Endpoint]) -> Inheritance | None:
    """The same, with the listeners that are still wanted, when the manager has forgotten it; None where it is stale,
    which is logged. `store` is locked. Raises StateError where that cannot be read.
    """
    handover = inherited.handover
    let_go()
    try:
        forget((DOCUMENT, *handover.descriptors))
        barrier()
        if at_rest(store) != handover.at_rest:
            raise HandoverError(f"{store.name} does not hold what the daemon before this one left there")
        if (BUFFER in handover.descriptors) != ("registers" in endpoints):
            raise HandoverError("registers were served and are not now, or the other way round")
    except (OSError, HandoverError) as error:
        log.error("the clients of the daemon before this one are lost: %s", error)
        _close(number for name, number in handover.descriptors.items() if name != LOCK)
        return None
    wanted = {}
    for name, listener in handover.listeners.items():
        number = handover.descriptors[f"listener.{name}"]
        if name in endpoints and is_at(endpoints[name], number, listener.identity):
            wanted[name] = listener
        else:
            os.close(number)
    return replace(inherited, handover=replace(handover, listeners=wanted))


def frozen_before(handover: Handover) -> FrozenInstance:
    """The TPM as it was before it was laid down, with what has to be written back. Raises a StateError."""
    frozen = frozen_of(handover)
    permanent = frozen.states.get(StateKind.PERMANENT)
    if handover.at_rest and frozen.facts.powered and permanent is not None:
        return replace(frozen, changed={StateKind.PERMANENT: permanent})
    return frozen


def _require_all(handover: Handover) -> None:
    """Raises HandoverError where it is not one that was left, or a descriptor is missing."""
    if not handover.at_rest:
        raise HandoverError("it does not say what the store held", "start anew")
    wanted = {f"link.{number}" for number in range(len(handover.links))}
    wanted |= {f"listener.{name}" for name in handover.listeners}
    for name in sorted(wanted - handover.descriptors.keys()):
        raise HandoverError(f"the descriptor {name} did not come along", "raise FileDescriptorStoreMax=")


def _drop(left: Mapping[str, int]) -> None:
    _close(left.values())
    try:
        forget(left)
        barrier()  # the store's lock is wanted next
    except OSError as error:
        log.warning("the service manager keeps what nobody will use: %s", error)


def _close(numbers: Iterable[int]) -> None:
    for number in numbers:
        os.close(number)
