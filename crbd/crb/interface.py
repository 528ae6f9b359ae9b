"""The command interface: from the buffer to the engine and back. `crbd.crb.device` tells the theory.

What is here does not know localities: whoever calls has looked whether the caller may.
"""

from __future__ import annotations

from typing import Final

from crbd.crb.config import COMMAND_HEAD, CrbConfig, Dialect
from crbd.crb.effects import Cancel, Effect, Execute
from crbd.crb.pages import IDLE, Pages
from crbd.crb.snapshot import NOBODY
from crbd.crb.spec import Offset
from crbd.crb.states import State, transitions

CMD_READY: Final = 1
GO_IDLE: Final = 2
"""Of CTRL_REQ."""
START: Final = 1
RETRY: Final = 2
NEXT: Final = 4
"""Of CTRL_START."""
CANCEL: Final = 1
"""Of CTRL_CANCEL."""

# Bits by State, for straight indexing.
_IDLE_BIT: Final = tuple(IDLE if state.idle else 0 for state in State)
_START_BIT: Final = tuple(START if state.executing else 0 for state in State)
CTRL_STS: Final = int(Offset.CTRL_STS)
CTRL_START: Final = int(Offset.CTRL_START)


class CommandInterface:
    """State and data of one command at a time. `buffer` is the data buffer where it is separate."""

    __slots__ = (
        "_at_once",
        "_command",
        "_config",
        "_executor",
        "_filled",
        "_keeps_tail",
        "_memory",
        "_offset",
        "_pages",
        "_pending",
        "_ptp",
        "_response",
        "_shows_all",
        "_state",
        "_table",
        "_takes_at_once",
        "_unseen",
        "_zeros",
    )

    def __init__(self, config: CrbConfig, buffer: memoryview | None = None) -> None:
        self._config = config
        self._table = transitions(config)
        # By State: whether cmdReady alone leads to where a command can be put in.
        self._takes_at_once = tuple(not state.executing and self._table.cmd_ready[state] is not None for state in State)
        # Bytes of the longest command that needs no pieces.
        self._at_once = min(config.buffer_size, config.max_command)
        self._ptp = config.dialect is Dialect.PTP
        # Whether a response goes into a cleared buffer, and more than the buffer can be asked for in pieces.
        self._shows_all = self._ptp and config.chunking
        self._keeps_tail = config.dialect is Dialect.QEMU_7_2
        self._zeros = memoryview(bytes(config.buffer_size))
        self._pages = Pages(config, buffer)
        self._memory = self._pages.memory
        self._pending = 0
        self._executor = NOBODY
        self._command = b""
        self._response = b""
        self._offset = 0
        self._state = State.IDLE
        # The buffer is zero from `_filled` on: so much need not be cleared. `_unseen` is the least that `_filled` may
        # say: the whole buffer from the moment that somebody may write to it past this object.
        self._unseen = config.buffer_size if config.separate_buffer else 0
        self._filled = self._unseen

    def _ask(self, value: int) -> None:
        """CTRL_REQ."""
        if value not in (CMD_READY, GO_IDLE):
            return
        row = self._table.cmd_ready if value == CMD_READY else self._table.go_idle
        state = row[self._state]
        if state is None:
            return
        if self._ptp:
            # PTP, figure "TPM State Diagram for CRB Interface": what was begun is given up, and leaving Completion
            # clears the buffer. QEMU's device does neither.
            self._drop_transfer()
            if self._state is State.COMPLETION:
                self._pages.buffer[:] = self._zeros
        self._enter(state)

    def _cancel(self, value: int) -> tuple[Effect, ...]:
        """CTRL_CANCEL. Outside execution it drops what has been transferred so far, as QEMU 11 does."""
        if self._ptp and value in (0, CANCEL):
            self._memory[self._pages.control + Offset.CTRL_CANCEL] = value
        if value != CANCEL:
            return ()
        if self._state.executing:
            return (Cancel(),)
        self._drop_transfer()
        return ()

    def _begin(self, locality: int) -> tuple[Effect, ...]:
        """START: take the command, or the rest of one in pieces, out of the buffer."""
        state = self._table.start[self._state]
        if state is None:
            return ()
        if self._config.dialect is Dialect.QEMU_7_2:
            declared = int.from_bytes(self._pages.buffer[2:6], "big")
            self._command = bytes(self._pages.buffer[: min(declared, self._config.max_command)])
        elif not self._take_piece():
            return ()
        return (self._execute(locality, self._command, state),)

    def _execute(self, locality: int, command: bytes, state: State) -> Execute:
        self._command = command
        self._response = b""
        self._offset = 0
        self._executor = locality
        self._enter(state)
        return Execute(command, locality)

    def _next_chunk(self) -> None:
        if self._offset < len(self._response):
            self._show_piece()
            return
        state = self._table.piece[self._state]
        if state is None or not self._take_piece():
            return
        if self._ptp:
            self._response = b""
            self._offset = 0
        self._enter(state)

    def _take_piece(self) -> bool:
        """Add the buffer to the command, as far as it goes; False where it says that it is shorter than a head."""
        declared = int.from_bytes((self._command or self._pages.buffer)[2:6], "big")
        if declared < COMMAND_HEAD:
            self._drop_transfer()
            self._pages.set_fatal()
            return False
        missing = min(declared, self._config.max_command) - len(self._command)
        self._command += bytes(self._pages.buffer[: max(missing, 0)])
        return True

    def _show_piece(self) -> None:
        """Put the next piece of the response into the buffer, zeros behind it."""
        self._filled = self._config.buffer_size
        piece = self._response[self._offset : self._offset + self._config.buffer_size]
        self._pages.buffer[: len(piece)] = piece
        self._pages.buffer[len(piece) :] = self._zeros[len(piece) :]
        self._offset += len(piece)

    def _drop_transfer(self) -> None:
        self._command = b""
        self._response = b""
        self._offset = 0

    def _enter(self, state: State) -> None:
        control = self._pages.control
        memory = self._memory
        memory[control + CTRL_STS] = memory[control + CTRL_STS] & ~IDLE | _IDLE_BIT[state]
        memory[control + CTRL_START] = _START_BIT[state]
        self._state = state
