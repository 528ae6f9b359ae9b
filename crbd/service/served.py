"""The registers that a register client works (a VMM over vfio-user), for its guest.

They are a register file of their own, beside the one of the data channel, with locality 0 alone, and a data buffer that
is memory shared with the guest. Behind both stands one TPM, and the engine lock is the arbiter, command by command
(docs/decisions/0004-two-register-files.md): no channel sees another's command or response, and none can take away what
another one has been granted.

    START                the command is taken; it executes when the TPM is free, and START stays set until it is done
    CANCEL               a command that still waits is answered with TPM_RC_CANCELED without executing, one that
                         executes is cancelled; a command of another channel never is
    a platform reset     drops a command that waits; one that executes is cancelled and its answer thrown away

The lock here is held for microseconds. Who holds the engine lock may take it; never the other way round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from crbd.crb.config import PAGE_SIZE, CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Cancel, Effect, Execute
from crbd.crb.mapping.served import ServedMapping
from crbd.crb.snapshot import CrbSnapshot

BUFFER_SIZE = PAGE_SIZE
"""Bytes in the data buffer: no command of libtpms is longer."""


class ServedRegisters:
    """`buffer` is the data buffer, BUFFER_SIZE writable bytes; `cancel` asks the engine to give up what it executes.

    Every method may be called from any thread.
    """

    def __init__(self, buffer: memoryview, max_command: int, cancel: Callable[[], None]) -> None:
        self._buffer = buffer
        self._cancel = cancel
        self._lock = threading.Lock()
        config = CrbConfig(localities=1, buffer_size=BUFFER_SIZE, max_command=max_command, base=0, separate_buffer=True)
        self._install(CrbDevice(config, buffer))

    def _install(self, device: CrbDevice) -> None:
        self._device = device
        self._mapping = ServedMapping(device)
        self._running = False
        """Whether the command under way has reached the engine."""
        self._cancelled = False
        """Whether it is to be cancelled as soon as it would."""

    # -- for the register client

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on: the registers' page, then the buffer."""
        with self._lock:
            return self._mapping.read(offset, size)

    def write(self, writes: Iterable[tuple[int, bytes]]) -> bool:
        """Do these writes, offset and bytes each; whether a command has been started, which is to be executed now."""
        started = False
        with self._lock:
            for offset, data in writes:
                for effect in self._mapping.write(offset, data):
                    started |= self._heed(effect)
        return started

    def _heed(self, effect: Effect) -> bool:
        """With locality 0 alone there are two effects."""
        if isinstance(effect, Cancel):
            self._cancel_now()
        return isinstance(effect, Execute)

    def cancel(self) -> None:
        """As a write to CTRL_CANCEL: ask the command under way, if there is one, to give up."""
        with self._lock:
            if self._device.executing is not None:
                self._cancel_now()

    def _cancel_now(self) -> None:
        self._cancelled = True
        if self._running:
            self._cancel()

    def relocate(self, base: int) -> None:
        """The register client has put the registers at guest-physical `base`, a multiple of 4096."""
        with self._lock:
            if base != self._device.config.base:
                self._device.relocate(base)

    @property
    def executing(self) -> bool:
        """Whether a command waits for the TPM or executes: START is set."""
        with self._lock:
            return self._device.executing is not None

    # -- for the instance, which holds the engine lock

    def take(self) -> tuple[Execute, bool] | None:
        """The command that is to be executed now, and whether it was cancelled before; None where there is none."""
        with self._lock:
            execution = self._device.executing
            if execution is None:
                return None
            self._running = not self._cancelled
            return execution, self._cancelled

    def complete(self, response: bytes | None) -> None:
        """The command has ended with that response, or could not be carried out (None: tpmSts)."""
        with self._lock:
            self._running = self._cancelled = False
            if response is None:
                self._device.fail()
            else:
                self._device.complete(response)

    def reset(self, *, established: bool) -> None:
        """A platform reset. It does not move the registers: that is the register client's to say."""
        with self._lock:
            self._device.reset()
            self._running = self._cancelled = False
            self._device.set_established(established)

    def set_established(self, flag: bool) -> None:
        """Show the engine's tpmEstablished flag."""
        with self._lock:
            self._device.set_established(flag)

    def page(self) -> bytes:
        """Locality 0's page, as the guest would read it now."""
        with self._lock:
            return self._device.read(0, 0, PAGE_SIZE)

    def freeze(self) -> CrbSnapshot:
        """As a value."""
        with self._lock:
            return self._device.freeze()

    def after(self, response: bytes | None) -> CrbSnapshot:
        """As it will be when the command that executes is answered, if it is one of these registers; else as it is."""
        with self._lock:
            snapshot = self._device.freeze()
            running = self._running
        if response is None or not running:
            return snapshot
        following = self._thawed(snapshot)
        following.complete(response)
        return following.freeze()

    def check(self, snapshot: CrbSnapshot) -> None:
        """Raises StateDamagedError where `thaw` would."""
        self._thawed(snapshot)

    def _thawed(self, snapshot: CrbSnapshot) -> CrbDevice:
        """A device of its own, with memory that no guest sees."""
        return CrbDevice.thaw(replace(self._device.config, base=0), snapshot, memoryview(bytearray(BUFFER_SIZE)))

    def thaw(self, snapshot: CrbSnapshot, *, live: bool) -> None:
        """Go on with the device that was frozen; what executed then is to be executed once more.

        `live`: the buffer is the very memory that it had, in which the guest may have gone on writing. Raises
        StateDamagedError where no device of this configuration could have given the snapshot.
        """
        with self._lock:
            config = replace(self._device.config, base=0)
            self._install(CrbDevice.thaw(config, snapshot, self._buffer, live=live))
