"""A device frozen: everything it is beside its configuration, as one value, and what such a value must obey.

The saved form (crbd.state.crb) converts from and to this value.
"""

from __future__ import annotations

from dataclasses import dataclass

from crbd.crb import spec
from crbd.crb.config import COMMAND_HEAD, CrbConfig, Dialect
from crbd.crb.pages import ACTIVE_SHIFT, ASSIGNED, GRANTED, SEIZED
from crbd.crb.spec import Offset
from crbd.crb.states import State
from crbd.errors import StateDamagedError

NOBODY = -1
"""In place of a locality."""


@dataclass(frozen=True, slots=True)
class CrbSnapshot:
    """A CrbDevice at rest or in the middle of anything."""

    words: tuple[int, ...]
    """The 32 words before the buffer of the owner's page (its LOC_STS among them)."""
    statuses: tuple[int, ...]
    """LOC_STS of each locality."""
    pending: int
    """The localities that wait for the TPM, a bit each."""
    completed: bool
    """The interface is in Completion, which registers do not tell from Ready."""
    buffer: bytes
    executor: int
    """The locality whose command executes, NOBODY where none does. START says so too."""
    command: bytes
    """The one that executes, or the pieces of one that is being put together."""
    response: bytes
    """Of the last command, where pieces of it may still be asked for."""
    offset: int
    """How many of its bytes have been shown so far."""

    @property
    def base(self) -> int:
        """Where the words say that the data buffer is."""
        return self.words[Offset.CMD_LADDR // 4] | self.words[Offset.CMD_HADDR // 4] << 32

    @property
    def owner(self) -> int:
        """LOC_STATE.activeLocality."""
        return self.words[Offset.LOC_STATE // 4] >> ACTIVE_SHIFT & 7

    @property
    def state(self) -> State:
        """Of the command interface."""
        idle = bool(self.words[Offset.CTRL_STS // 4] & 2)
        if self.words[Offset.CTRL_START // 4] & 1:
            return State.EXECUTION_IDLE if idle else State.EXECUTION
        if idle:
            return State.IDLE
        return State.COMPLETION if self.completed else State.READY


def damaged(what: str, why: str) -> StateDamagedError:
    """The refusal of a saved form, naming the register or part."""
    return StateDamagedError(
        f"the saved CRB registers cannot be restored: {what} {why}",
        "restore the state from a backup, or start the TPM with the configuration that the state was saved under",
    )


def check(snapshot: CrbSnapshot, config: CrbConfig) -> None:
    """Raises StateDamagedError, naming the register, for a snapshot that no device of `config` could ever give."""
    if len(snapshot.words) != spec.WORDS:
        raise damaged("the register file", f"has {len(snapshot.words)} words, not {spec.WORDS}")
    _check_localities(snapshot, config)
    _check_words(snapshot, config)
    _check_state(snapshot, config)
    _check_transfer(snapshot, config)


def _check_localities(snapshot: CrbSnapshot, config: CrbConfig) -> None:
    """LOC_STATE, LOC_STS of all and who waits, against each other."""
    if len(snapshot.statuses) != config.localities:
        raise damaged("LOC_STS", f"is there for {len(snapshot.statuses)} localities, not {config.localities}")
    owner = snapshot.owner
    if owner >= config.localities:
        raise damaged("LOC_STATE", f"names locality {owner} of {config.localities}")
    if snapshot.words[Offset.LOC_STS // 4] != snapshot.statuses[owner]:
        raise damaged("LOC_STS", f"of locality {owner} is there twice and differs")
    assigned = snapshot.words[Offset.LOC_STATE // 4] & ASSIGNED
    executing = snapshot.state.executing
    if not 0 <= snapshot.pending < 1 << config.localities:
        raise damaged("LOC_CTRL", f"has requests of localities {snapshot.pending:#x} of {config.localities}")
    if snapshot.pending and not (assigned or executing):
        raise damaged("LOC_CTRL", "has a request that should have been granted")
    seized_away = bool(assigned and snapshot.pending >> owner + 1 and executing)
    for locality, status in enumerate(snapshot.statuses):
        active = bool(assigned) and locality == owner
        if status & ~(GRANTED | SEIZED) or bool(status & GRANTED) != active:
            raise damaged("LOC_STS", f"of locality {locality} is {status:#x}, against LOC_STATE")
        if status & SEIZED and ((active and not seized_away) or locality == config.localities - 1):
            raise damaged("LOC_STS", f"of locality {locality} says seized, and nobody seized it")
    if assigned and snapshot.pending >> owner & 1 and not snapshot.statuses[owner] & SEIZED:
        raise damaged("LOC_CTRL", f"has a request of locality {owner}, which is active")


def _check_words(snapshot: CrbSnapshot, config: CrbConfig) -> None:
    """Every bit that does not vary has its reset value; the base may differ where the device can be moved."""
    expected = spec.reset_words(config, snapshot.owner)
    masks = spec.varying_masks(config)
    for index, (word, reset, mask) in enumerate(zip(snapshot.words, expected, masks, strict=True)):
        if (word ^ reset) & ~mask:
            raise damaged(spec.register_at(index), f"is {word:#010x}, and this device has {reset & ~mask:#010x}")


def _check_state(snapshot: CrbSnapshot, config: CrbConfig) -> None:
    """CTRL_STS, CTRL_START and the state that they leave open."""
    state = snapshot.state
    ptp = config.dialect is Dialect.PTP
    if state is State.EXECUTION_IDLE and ptp:
        raise damaged("CTRL_STS", "says idle while CTRL_START says executing")
    if snapshot.completed and (not ptp or state is not State.COMPLETION):
        raise damaged("CTRL_STS", "does not go with a completed command")
    if state.executing != (snapshot.executor != NOBODY):
        raise damaged("CTRL_START", "does not go with the command under way")
    if not NOBODY <= snapshot.executor < config.localities:
        raise damaged("CTRL_START", f"is of locality {snapshot.executor} of {config.localities}")
    hashing = config.localities == 5 and snapshot.owner == 4
    if state.executing and snapshot.executor != snapshot.owner and not hashing:
        raise damaged("CTRL_START", f"is of locality {snapshot.executor}, and LOC_STATE names {snapshot.owner}")


def _check_transfer(snapshot: CrbSnapshot, config: CrbConfig) -> None:
    """The buffer, the command and the response."""
    if len(snapshot.buffer) != config.buffer_size:
        raise damaged("CMD_SIZE", f"does not go with a buffer of {len(snapshot.buffer)} bytes")
    executing = snapshot.state.executing
    ptp = config.dialect is Dialect.PTP
    if len(snapshot.command) > config.max_command or len(snapshot.response) > config.max_command:
        raise damaged("the transfer", f"is longer than the {config.max_command} bytes that the TPM takes")
    if snapshot.command and not executing:
        if not config.chunking or (ptp and snapshot.state is not State.READY):
            raise damaged("the command", "has been begun, against CTRL_STS or INTF_ID")
        if len(snapshot.command) < COMMAND_HEAD:
            raise damaged("the command", f"has been begun with {len(snapshot.command)} bytes, less than a head")
    if snapshot.response and (executing or not config.chunking or (ptp and snapshot.state is not State.COMPLETION)):
        raise damaged("the response", "is kept, against CTRL_START, CTRL_STS or INTF_ID")
    if not 0 <= snapshot.offset <= len(snapshot.response) or (snapshot.response and not snapshot.offset):
        raise damaged("the response", f"of {len(snapshot.response)} bytes has been shown up to {snapshot.offset}")
