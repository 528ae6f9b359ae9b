"""The instance's CRB registers: the device, its lock, and what the control channel's commands are on it.

Every channel goes through the one device, so that the register file tells at every moment what the TPM is doing,
whoever asked for it. What swtpm's control channel knows as commands of its own are register accesses here:

    a command on the data channel     requestAccess, cmdReady, the buffer, Start; the response, Start clear
    CANCEL_TPM_CMD                    CTRL_CANCEL, 1 and 0, while Start is set
    HASH_START, HASH_DATA, HASH_END   LOC_CTRL of locality 4; HASH_DATA in pieces that fit the buffer
    RESET_TPMESTABLISHED              LOC_CTRL.resetEstablishment of locality 3 or 4
    INIT, STOP                        a platform reset

Where a register client is served, its registers are another file (crbd.service.served), and it is that one which is
shown and frozen: a guest lives by it, and of this one nothing outlives a command.

The device lock is held for microseconds and never while the TPM computes. Who holds the engine lock may take it;
never the other way round.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from crbd.crb.config import BUFFER_OFFSET, PAGE_SIZE, CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Cancel, Effect
from crbd.crb.snapshot import CrbSnapshot
from crbd.crb.spec import Offset
from crbd.errors import StateDamagedError
from crbd.service.served import ServedRegisters

HASH_LOCALITY = 4
_HASH_START = b"\x01"
_HASH_DATA = b"\x02"
_HASH_END = b"\x04"
_RESET_ESTABLISHMENT = b"\x08"
_CANCEL = b"\x01\x00\x00\x00"
_CLEAR = bytes(4)
_HASH_COUNT_SIZE = 2
"""Bytes in the buffer before the data of HASH_DATA: their number, little-endian."""


class Registers:
    """The registers of one TPM; `served`: the register client's. Every method may be called from any thread."""

    __slots__ = ("device", "lock", "served")

    def __init__(self, config: CrbConfig, served: ServedRegisters | None = None) -> None:
        self.device = CrbDevice(config)
        """For who holds `lock`."""
        self.lock = threading.Lock()
        self.served = served

    @property
    def localities(self) -> int:
        """How many localities are shown."""
        return self.device.config.localities if self.served is None else 1

    def pages(self) -> bytes:
        """All localities' pages, 4 KiB each, as a guest would read them now."""
        if self.served is not None:
            return self.served.page()
        with self.lock:
            return b"".join(self.device.read(number, 0, PAGE_SIZE) for number in range(self.localities))

    def freeze(self) -> CrbSnapshot:
        """The registers as a value."""
        if self.served is not None:
            return self.served.freeze()
        with self.lock:
            return self.device.freeze()

    def thaw(self, snapshot: CrbSnapshot, *, live: bool = False) -> None:
        """Go on with the device that was frozen; `device` is another one afterwards. `live`: as in ServedRegisters.

        Raises StateDamagedError where no device of this configuration could have given it.
        """
        if self.served is not None:
            self.served.thaw(snapshot, live=live)
            return
        with self.lock:
            self.device = self._thawed(snapshot)

    def after(self, response: bytes | None) -> CrbSnapshot:
        """The registers as they will be when the command under way is answered; without a response, as they are."""
        if self.served is not None:
            return self.served.after(response)
        with self.lock:
            snapshot = self.device.freeze()
        if response is None:
            return snapshot
        following = CrbDevice.thaw(self.device.config, snapshot)
        following.complete(response)
        return following.freeze()

    def check(self, snapshot: CrbSnapshot) -> None:
        """Raises StateDamagedError where `thaw` would."""
        if self.served is not None:
            self.served.check(snapshot)
            return
        self._thawed(snapshot)

    def _thawed(self, snapshot: CrbSnapshot) -> CrbDevice:
        device = CrbDevice.thaw(self.device.config, snapshot)
        if device.executing is not None:
            # Nothing of these outlives a command. Nobody would ever answer this one, and all others find it in the way.
            raise StateDamagedError("the registers have a command under way that nobody runs", "take another state")
        return device

    def fail(self) -> None:
        """The command under way could not be carried out: tpmSts."""
        with self.lock:
            self.device.fail()

    def cancel(self) -> bool:
        """Write CTRL_CANCEL, if a command executes; whether one does, and is to be cancelled."""
        with self.lock:
            executing = self.device.executing
            if executing is None:
                return False
            effects = self.device.write(executing.locality, Offset.CTRL_CANCEL, _CANCEL)
            self.device.write(executing.locality, Offset.CTRL_CANCEL, _CLEAR)
            return any(isinstance(effect, Cancel) for effect in effects)

    def reset(self, *, established: bool) -> None:
        """A platform reset; tpmEstablished is as the engine has it."""
        with self.lock:
            self.device.reset()
            self.device.set_established(established)
        if self.served is not None:
            self.served.reset(established=established)

    def set_established(self, flag: bool) -> None:
        """Show the engine's tpmEstablished flag."""
        with self.lock:
            self.device.set_established(flag)
        if self.served is not None:
            self.served.set_established(flag)

    def reset_establishment(self, locality: int) -> Iterable[Effect]:
        """Write LOC_CTRL.resetEstablishment; what is to be done: nothing where `locality` may not."""
        with self.lock:
            return self.device.write(locality, Offset.LOC_CTRL, _RESET_ESTABLISHMENT)

    def hash_start(self) -> Iterable[Effect]:
        """Write LOC_CTRL_4.hashStart."""
        with self.lock:
            return self.device.write(HASH_LOCALITY, Offset.LOC_CTRL, _HASH_START)

    def hash_data(self, data: bytes) -> Iterator[Effect]:
        """Write the data into the buffer and LOC_CTRL_4.hashData, piece by piece."""
        room = self.device.config.buffer_size - _HASH_COUNT_SIZE
        for at in range(0, len(data), room):
            piece = data[at : at + room]
            with self.lock:
                self.device.write(HASH_LOCALITY, BUFFER_OFFSET, len(piece).to_bytes(2, "little") + piece)
                effects = self.device.write(HASH_LOCALITY, Offset.LOC_CTRL, _HASH_DATA)
            yield from effects

    def hash_end(self) -> Iterable[Effect]:
        """Write LOC_CTRL_4.hashEnd."""
        with self.lock:
            return self.device.write(HASH_LOCALITY, Offset.LOC_CTRL, _HASH_END)
