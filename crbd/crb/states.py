"""The states of the command interface and their transitions, as tables.

Theory (PTP, section "CRB Interface", figure "TPM State Diagram for CRB Interface"). A TPM is idle until it is asked to
become ready; takes a command (reception), executes it, and shows its response (completion) until it is asked for the
next command or for idleness.

    IDLE --cmdReady--> READY --START--> EXECUTION --done--> COMPLETION --cmdReady--> READY
    IDLE <--goIdle---  READY                                COMPLETION --goIdle--> IDLE

Reception is not told apart from Ready: it begins with the first byte in the buffer, and the buffer may be plain memory
whose writes nobody sees. Registers read the same in both.

QEMU's device keeps two independent bits, tpmIdle and Start, and takes every request at any time: START in Idle executes
(EXECUTION_IDLE), goIdle during execution shows tpmIdle at once. It has no Completion: a completed command leaves it
Ready. Guests of QEMU rely on none of it, but a guest frozen there must find the same device again.

What is not in a table changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from crbd.crb.config import CrbConfig, Dialect


class State(IntEnum):
    """Of the command interface."""

    IDLE = 0
    READY = 1
    """Also Command Reception."""
    EXECUTION = 2
    COMPLETION = 3
    EXECUTION_IDLE = 4
    """QEMU's only: executing, with tpmIdle showing."""

    @property
    def executing(self) -> bool:
        """START is set."""
        return self in (State.EXECUTION, State.EXECUTION_IDLE)

    @property
    def idle(self) -> bool:
        """tpmIdle is set."""
        return self in (State.IDLE, State.EXECUTION_IDLE)


class Request(Enum):
    """What can change the state."""

    CMD_READY = "cmdReady"
    GO_IDLE = "goIdle"
    START = "Start"
    PIECE = "nextChunk"
    """With a piece of a command: the command's last piece is still to come, or START."""
    DONE = "done"
    """The device's own: response or failure."""


Transitions = dict[tuple[State, Request], State]

PTP: Final[Transitions] = {
    (State.IDLE, Request.CMD_READY): State.READY,
    (State.READY, Request.CMD_READY): State.READY,
    (State.READY, Request.GO_IDLE): State.IDLE,
    (State.READY, Request.START): State.EXECUTION,
    (State.READY, Request.PIECE): State.READY,
    (State.EXECUTION, Request.DONE): State.COMPLETION,
    (State.COMPLETION, Request.GO_IDLE): State.IDLE,
}
"""Without idle bypass: after Completion comes Idle."""

PTP_BYPASS: Final[Transitions] = PTP | {
    (State.COMPLETION, Request.CMD_READY): State.READY,
    (State.COMPLETION, Request.START): State.EXECUTION,
    (State.COMPLETION, Request.PIECE): State.READY,
}
"""With idle bypass the next command may follow at once."""

QEMU: Final[Transitions] = {
    (State.IDLE, Request.CMD_READY): State.READY,
    (State.IDLE, Request.GO_IDLE): State.IDLE,
    (State.IDLE, Request.START): State.EXECUTION_IDLE,
    (State.IDLE, Request.PIECE): State.IDLE,
    (State.READY, Request.CMD_READY): State.READY,
    (State.READY, Request.GO_IDLE): State.IDLE,
    (State.READY, Request.START): State.EXECUTION,
    (State.READY, Request.PIECE): State.READY,
    (State.EXECUTION, Request.CMD_READY): State.EXECUTION,
    (State.EXECUTION, Request.GO_IDLE): State.EXECUTION_IDLE,
    (State.EXECUTION, Request.DONE): State.READY,
    (State.EXECUTION_IDLE, Request.CMD_READY): State.EXECUTION,
    (State.EXECUTION_IDLE, Request.GO_IDLE): State.EXECUTION_IDLE,
    (State.EXECUTION_IDLE, Request.DONE): State.IDLE,
}
"""As QEMU's hw/tpm/tpm_crb.c behaves."""


@dataclass(frozen=True, slots=True)
class Table:
    """The transitions by request; each tuple holds, for every State in order, the next one or None: ignored."""

    cmd_ready: tuple[State | None, ...]
    go_idle: tuple[State | None, ...]
    start: tuple[State | None, ...]
    piece: tuple[State | None, ...]
    done: tuple[State | None, ...]


def transitions(config: CrbConfig) -> Table:
    """The table that a device of this configuration obeys."""
    ptp = PTP_BYPASS if config.idle_bypass else PTP
    rows = ptp if config.dialect is Dialect.PTP else QEMU
    return Table(*(tuple(rows.get((state, request)) for state in State) for request in Request))
