"""The CRB device: accesses in, effects out. No I/O, no clock, no locks (its owner holds one).

Theory. Registers live in one piece of memory, a page per locality, and that memory *is* the state that a guest sees: a
read is a copy of bytes, by whatever road. Beside it the device holds only what no register shows: which state the
interface is in where registers do not tell (`State`), who waits for the TPM (`_pending`), the command that is being
put together or executes, and the response for as long as a piece of it may be asked for again.

*Localities* (PTP, sections "Locality Usage per Register" and "Locality Priority"). LOC_STATE reads the same on every
page, LOC_CTRL and LOC_STS are each locality's own. The control area and the data buffer belong to the locality that
LOC_STATE.activeLocality names: the *owner*. They show on its page, and only its writes count; on the other pages they
show reset values. The owner stays owner when it relinquishes, until another locality is granted the TPM. That change
clears the interface and the buffer, so no locality sees another's command or response, and it waits for the command
that executes: a seize cancels it, and its response is thrown away.

*One command* (`crbd.crb.states` has the table). START takes the command out of the buffer and returns Execute; until
`complete` or `fail` comes, START stays set, CANCEL returns Cancel, and buffer writes change nothing that matters.

*Chunks* (PTP 1.06, nextChunk). A command longer than the buffer is put together by nextChunk and completed by START; a
longer response is shown piece by piece by nextChunk, and from the beginning by crbRspRetry.

*tpmSts* reports a fatal error: `fail`, or a command that says it is shorter than a head. Only a reset takes it back;
commands are executed all the same, as QEMU's device does. The TPM's own failure mode is the engine's business.

*The data channel* (`submit`) is a guest of a kind: it does what a register driver would do, in one step, and leaves the
same registers. What it does is the hot path of every TPM command, hence the straight code there.

*Writes* are cut into naturally aligned pieces of at most 4 bytes, as QEMU's memory core does; a piece acts on a
register only if it begins where the register begins, and its value is what its own lanes hold. The requests of
LOC_CTRL and CTRL_REQ count only alone: two bits at once are no request (QEMU). What a guest writes never raises an
exception.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from crbd.crb.config import BUFFER_OFFSET, COMMAND_HEAD, PAGE_SIZE, CrbConfig, Dialect
from crbd.crb.effects import Busy, Cancel, Effect, Execute, HashData, HashEnd, HashStart, ResetEstablished
from crbd.crb.interface import CANCEL, CMD_READY, CTRL_START, CTRL_STS, GO_IDLE, NEXT, RETRY, START, CommandInterface
from crbd.crb.pages import GRANTED, IDLE, NOT_ESTABLISHED, SEIZED
from crbd.crb.snapshot import NOBODY, CrbSnapshot, check, damaged
from crbd.crb.spec import Offset, words_of
from crbd.crb.states import State

REQUEST_ACCESS: Final = 1
RELINQUISH: Final = 2
SEIZE: Final = 4
RESET_ESTABLISHMENT: Final = 8
"""Of LOC_CTRL."""
HASH_START: Final = 1
HASH_DATA: Final = 2
HASH_END: Final = 4
"""Of LOC_CTRL at locality 4."""
HASH_LOCALITY: Final = 4
_QEMU_7_2_FAILURE: Final = bytes.fromhex("00c4 0000000a 00000009")
"""What QEMU's backend leaves in the buffer after a failure: a TPM 1.2 response, TPM_FAIL."""
# An enum's member is a slow look-up, and these lie on the way of every command.
_IDLE: Final = State.IDLE
_EXECUTION: Final = State.EXECUTION
_COMPLETION: Final = State.COMPLETION
_RESETS_ESTABLISHED: Final = 3
_INT_ENABLE_BYTES: Final = b"\x1f\x00\x00\x80"
"""The bits of INT_ENABLE that the device has, lane by lane."""


class CrbDevice(CommandInterface):
    """One TPM's registers. `buffer` is the data buffer where the configuration says that it is separate."""

    __slots__ = ()

    # -- what it shows
    # --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> CrbConfig:
        """As made; `base` follows `relocate`."""
        return self._config

    @property
    def state(self) -> State:
        """Of the command interface."""
        return self._state

    @property
    def executing(self) -> Execute | None:
        """The command under way: after `thaw`, what has to be executed once more."""
        return Execute(self._command, self._executor) if self._state.executing else None

    @property
    def active_locality(self) -> int | None:
        """The locality that has the TPM."""
        return self._pages.active

    @property
    def buffer(self) -> memoryview:
        """The data buffer of the locality that the control area belongs to; writable, good until the next access."""
        self._unseen = self._filled = self._config.buffer_size
        return self._pages.buffer

    def page(self, locality: int) -> memoryview:
        """`locality`'s 4 KiB page, read-only and always current: to be mapped, or read at any width and alignment.

        Raises ValueError for a locality that is not there.
        """
        return self._pages.page(locality)

    def read(self, locality: int, offset: int, size: int) -> bytes:
        """`size` bytes of `locality`'s page. Raises ValueError for what is not in the page."""
        self._pages.check(locality, offset, size)
        start = locality * PAGE_SIZE + offset
        return bytes(self._memory[start : start + size])

    # -- what a guest writes
    # --------------------------------------------------------------------------------------------------

    def write(self, locality: int, offset: int, data: bytes | bytearray | memoryview) -> tuple[Effect, ...]:
        """Write `data` (little-endian lanes, any width) into `locality`'s page; return what is to be done, in order.

        Raises ValueError for what is not in the page: the mapping's mistake, never the guest's.
        """
        self._pages.check(locality, offset, len(data))
        end = offset + len(data)
        effects: tuple[Effect, ...] = ()
        at = offset
        while at < min(end, BUFFER_OFFSET):
            size = 4
            while at % size or at + size > end:
                size //= 2
            effects += self._write_register(locality, at, bytes(data[at - offset : at - offset + size]))
            at += size
        if locality == self._pages.owner and self._pages.separate is None:
            end = min(end, BUFFER_OFFSET + self._config.buffer_size)
            if at < end:
                self._filled = max(self._filled, end - BUFFER_OFFSET)
                self._pages.buffer[at - BUFFER_OFFSET : end - BUFFER_OFFSET] = data[at - offset : end - offset]
        return effects

    def _write_register(self, locality: int, offset: int, lanes: bytes) -> tuple[Effect, ...]:
        value = int.from_bytes(lanes, "little")
        if offset == Offset.LOC_CTRL:
            return self._control_hash(value) if locality == HASH_LOCALITY else self._control_locality(locality, value)
        if locality != self._pages.owner:
            return ()
        if offset == Offset.CTRL_REQ:
            self._ask(value)
        elif offset == Offset.CTRL_CANCEL:
            return self._cancel(value)
        elif offset == Offset.CTRL_START:
            return self._control_start(locality, value)
        elif Offset.INT_ENABLE <= offset < Offset.INT_STS and self._ptp:
            for lane, byte in enumerate(lanes, offset - Offset.INT_ENABLE):
                self._memory[self._pages.control + Offset.INT_ENABLE + lane] = byte & _INT_ENABLE_BYTES[lane]
        return ()

    def _control_start(self, locality: int, value: int) -> tuple[Effect, ...]:
        """CTRL_START. QEMU before 11.1 knows the value 1 alone; after it, Start goes before nextChunk and Retry."""
        if self._pages.active != locality or self._state.executing:
            return ()
        if value & START if self._config.dialect is not Dialect.QEMU_7_2 else value == START:
            return self._begin(locality)
        if self._config.chunking:
            if value & NEXT:
                self._next_chunk()
            elif value & RETRY and self._response:
                self._offset = 0
                self._show_piece()
        return ()

    # -- localities
    # -----------------------------------------------------------------------------------------------------------

    def _control_locality(self, locality: int, value: int) -> tuple[Effect, ...]:
        """LOC_CTRL of localities 0 to 3."""
        if value == REQUEST_ACCESS:
            self._request(locality)
        elif value == RELINQUISH:
            self._relinquish(locality)
        elif value == SEIZE:
            return self._seize(locality)
        elif value == RESET_ESTABLISHMENT and locality == _RESETS_ESTABLISHED:
            return (ResetEstablished(locality),)
        return ()

    def _control_hash(self, value: int) -> tuple[Effect, ...]:
        """LOC_CTRL of locality 4 (PTP, table "TPM_LOC_CTRL_4"): any of the four bits at once, in this order.

        HASH_START takes the TPM from whoever has it. HASH_DATA finds in the buffer a 16-bit little-endian count and
        that many bytes, as processors with Intel TXT write them (Intel SDM volume 2, GETSEC[SENTER]).
        """
        effects: tuple[Effect, ...] = ()
        if value & HASH_START:
            if self._state.executing:
                effects += (Cancel(),)
            active = self._pages.active
            if active is not None and active != HASH_LOCALITY:
                self._pages.set_status(active, SEIZED)
            self._take_over(HASH_LOCALITY)
            effects += (HashStart(),)
        if self._pages.active == HASH_LOCALITY:
            buffer = self._pages.buffer
            if value & HASH_DATA:
                effects += (HashData(bytes(buffer[2 : 2 + int.from_bytes(buffer[:2], "little")])),)
            if value & HASH_END:
                effects += (HashEnd(),)
                self._relinquish(HASH_LOCALITY)
        if value & RESET_ESTABLISHMENT:
            effects += (ResetEstablished(HASH_LOCALITY),)
        return effects

    def _request(self, locality: int) -> None:
        active = self._pages.active
        if active is None and (locality == self._pages.owner or not self._state.executing):
            self._take_over(locality)
        elif active != locality or self._pages.status(locality) & SEIZED:
            self._pending |= 1 << locality

    def _relinquish(self, locality: int) -> None:
        self._pending &= ~(1 << locality)
        active = self._pages.active
        if active == locality:
            self._pages.set_status(locality, 0)
            self._pages.set_assigned(assigned=False)
            self._arbitrate()
        elif active is not None and not self._pending >> active + 1:
            # A seize that was still waiting for the end of the command has been withdrawn.
            self._pages.set_status(active, GRANTED)
            self._pending &= ~(1 << active)

    def _seize(self, locality: int) -> tuple[Effect, ...]:
        """A device with one locality has nothing to seize. With the TPM free it is a request (QEMU's TIS device)."""
        active = self._pages.active
        if self._config.localities == 1:
            return ()
        if active is None:
            self._request(locality)
        elif locality > active:
            self._pages.set_status(active, GRANTED | SEIZED)
            self._pending |= 1 << locality
            if self._state.executing:
                return (Cancel(),)
            self._arbitrate()
        return ()

    def _arbitrate(self) -> None:
        """With no command under way: the highest locality that waits gets the TPM, if it is free or has been seized."""
        active = self._pages.active
        if not self._pending or self._state.executing:
            return
        if active is None or self._pages.status(active) & SEIZED:
            if active is not None:
                self._pages.set_status(active, SEIZED)
            self._take_over(self._pending.bit_length() - 1)

    def _take_over(self, locality: int) -> None:
        """Grant `locality` the TPM. Interface and data of another one that owned them vanish."""
        if locality != self._pages.owner:
            executing = self._state.executing
            self._pages.move(locality)
            if not executing:
                self._drop_transfer()
            self._enter(State.EXECUTION if executing else State.IDLE)
        self._pending &= ~(1 << locality)
        self._pages.set_status(locality, GRANTED)
        self._pages.set_assigned(assigned=True)

    # -- what the TPM does
    # ----------------------------------------------------------------------------------------------------

    def complete(self, response: bytes) -> None:
        """The command has ended: show `response`, START clears.

        With no command under way (a reset came first) nothing happens. More than `max_command` bytes are cut off.
        """
        state = self._table.done[self._state]
        if state is None:
            return
        pages = self._pages
        size = len(response)
        if (
            state is not _COMPLETION
            or self._pending
            or size > self._at_once
            or not self._shows_all
            or self._executor * PAGE_SIZE != pages.control
        ):
            self._complete_slowly(response, state)
            return
        buffer = pages.buffer
        buffer[:size] = response
        filled = self._filled
        if size < filled:
            buffer[size:filled] = self._zeros[size:filled]
        self._filled = size if size > self._unseen else self._unseen
        self._response = response
        self._offset = size
        self._command = b""
        self._executor = NOBODY
        self._memory[pages.control + CTRL_START] = 0
        self._state = _COMPLETION

    def _complete_slowly(self, response: bytes, state: State) -> None:
        if self._executor != self._pages.owner:
            self._finish(State.IDLE)
            return
        buffer = self._pages.buffer
        size = min(len(response), len(buffer))
        buffer[:size] = response[:size]
        self._filled = self._config.buffer_size
        if not self._keeps_tail:
            buffer[size:] = self._zeros[size:]
        if self._config.chunking:
            self._response = response[: self._config.max_command]
            self._offset = size
        self._finish(state)

    def fail(self) -> None:
        """The command cannot be carried out at all: tpmSts. With no command under way nothing happens."""
        state = self._table.done[self._state]
        if state is None:
            return
        self._pages.set_fatal()
        if self._executor != self._pages.owner:
            state = State.IDLE
        elif self._keeps_tail:
            self._filled = self._config.buffer_size
            self._pages.buffer[: len(_QEMU_7_2_FAILURE)] = _QEMU_7_2_FAILURE
        else:
            self._pages.buffer[:] = self._zeros
        self._finish(state)

    def _finish(self, state: State) -> None:
        self._command = b""
        self._executor = NOBODY
        self._enter(state)
        if self._pending:
            self._arbitrate()

    def reset(self) -> tuple[Effect, ...]:
        """Platform reset (_TPM_Init). Only tpmEstablished outlives it, and in QEMU's dialects the buffer.

        A command that executes is to be cancelled; its answer is not waited for.
        """
        effects: tuple[Effect, ...] = (Cancel(),) if self._state.executing else ()
        if self._ptp:
            self._pages.buffer[:] = self._zeros
        self._pending = 0
        self._executor = NOBODY
        self._drop_transfer()
        self._state = State.IDLE
        self._pages.reset(self._memory[Offset.LOC_STATE] & NOT_ESTABLISHED)
        return effects

    def set_established(self, flag: bool) -> None:
        """The engine's tpmEstablished flag, whose negation LOC_STATE shows."""
        self._pages.set_established(established=flag)

    def relocate(self, base: int) -> None:
        """The pages are now at guest-physical `base`: the address registers follow. Raises ValueError as CrbConfig."""
        self._config = replace(self._config, base=base)
        self._pages.relocate(self._config)

    # -- the data channel
    # -----------------------------------------------------------------------------------------------------

    def submit(self, locality: int, command: bytes) -> Execute | Busy:
        """Run a whole command on behalf of `locality`, which gets the TPM for it.

        Leaves the registers as this sequence of writes does: relinquish at the locality that is active, if it is
        another; requestAccess; Cancel and 0, if a transfer in pieces is in the way; goIdle, if the state demands it;
        cmdReady; the command into the buffer; Start. A longer command than the buffer goes in by nextChunk. (Locality
        4 has no requestAccess, and a device without chunks no way for a long command: they are served all the same.)

        Raises ValueError for bytes that are no single command of at most `max_command` bytes.
        """
        size = len(command)
        state = self._state
        pages = self._pages
        memory = self._memory
        buffer = pages.buffer
        if (
            # LOC_STATE's locAssigned and activeLocality, in one comparison
            memory[0] & 0x1E != locality << 2 | 2
            or not self._takes_at_once[state]
            or self._command
            or not COMMAND_HEAD <= size <= self._at_once
            or command[2:6] != size.to_bytes(4, "big")
        ):
            return self._submit_slowly(locality, command)
        buffer[:size] = command
        control = pages.control
        if state is _COMPLETION and size < self._filled:
            buffer[size : self._filled] = self._zeros[size : self._filled]
        elif size > self._filled:
            self._filled = size
        if state is _IDLE:
            memory[control + CTRL_STS] &= ~IDLE
        memory[control + CTRL_START] = START
        self._command = command
        self._response = b""
        self._offset = 0
        self._executor = locality
        self._state = _EXECUTION
        return Execute(command, locality)

    def _submit_slowly(self, locality: int, command: bytes) -> Execute | Busy:
        if self._state.executing:
            return Busy(executing=True)
        size = len(command)
        if not COMMAND_HEAD <= size <= self._config.max_command or int.from_bytes(command[2:6], "big") != size:
            raise ValueError(f"{size} bytes are not one TPM command of at most {self._config.max_command}")
        self._pages.check(locality, 0, 0)
        active = self._pages.active
        if active != locality:
            if active is not None:
                if self._pending & ~(1 << locality):
                    return Busy(executing=False)
                self._pending = 0
                self._relinquish(active)
            self._take_over(locality)
        room = self._filled = self._config.buffer_size
        if self._command or (len(command) > room and self._offset < len(self._response)):
            self._cancel(CANCEL)
            self._cancel(0)
        if self._table.cmd_ready[self._state] is None:
            self._ask(GO_IDLE)
        self._ask(CMD_READY)
        if not self._config.chunking:
            piece = command[:room]
            self._pages.buffer[: len(piece)] = piece
            return self._execute(locality, command, State.EXECUTION)
        for at in range(0, len(command), room):
            piece = command[at : at + room]
            self._pages.buffer[: len(piece)] = piece
            if at + len(piece) < len(command):
                self._next_chunk()
        self._take_piece()
        return self._execute(locality, self._command, State.EXECUTION)

    # -- freeze and thaw
    # ------------------------------------------------------------------------------------------------------

    def freeze(self) -> CrbSnapshot:
        """Everything that the device is, beside its configuration."""
        pages = self._pages
        return CrbSnapshot(
            words=words_of(pages.page(pages.owner)),
            statuses=tuple(pages.status(locality) for locality in range(self._config.localities)),
            pending=self._pending,
            completed=self._state is State.COMPLETION,
            buffer=bytes(pages.buffer),
            executor=self._executor,
            command=self._command,
            response=self._response,
            offset=self._offset,
        )

    @classmethod
    def thaw(
        cls, config: CrbConfig, snapshot: CrbSnapshot, buffer: memoryview | None = None, *, live: bool = False
    ) -> CrbDevice:
        """The device that was frozen, which goes on as if nothing had happened.

        A command that executed then is in `executing` and has to be executed again. A device with a separate buffer is
        where the snapshot says; any other must be at `config.base`. `live`: `buffer` is the memory that the frozen
        device had, in which a guest may have gone on writing; it is left as it is. Raises StateDamagedError, naming the
        register, for a snapshot that such a device could never give.
        """
        if config.separate_buffer:
            try:
                config = replace(config, base=snapshot.base - config.data_address(0) + config.base)
            except ValueError as error:
                raise damaged("CMD_LADDR", f"is no place for a buffer: {error}") from error
        check(snapshot, config)
        device = cls(config, buffer)
        device._filled = config.buffer_size
        device._pages.load(snapshot.words, snapshot.statuses, None if live else snapshot.buffer)
        device._pending = snapshot.pending
        device._executor = snapshot.executor
        device._command = snapshot.command
        device._response = snapshot.response
        device._offset = snapshot.offset
        device._state = snapshot.state
        return device
