"""The swtpm control channel as one table, from which codec, sizing, dispatch and documentation derive.

All numbers are big-endian. A request is the 32-bit command code and its body, a success reply a 32-bit TPM_RESULT of 0
and its body. The codes, layouts and capability bits are those of swtpm's tpm_ioctl.h (CMD_* and PTM_*), which QEMU
carries a copy of; `needs` follows swtpm's ctrlchannel.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from crbd.control import replies, requests
from crbd.control.replies import Capability, ConfigFlag, Reply
from crbd.control.requests import InitFlag, Request, StateFlag
from crbd.tpm.results import TpmResult

CODE_SIZE = 4
"""Bytes of the command code that opens a request."""
RESULT_SIZE = 4
"""Bytes of the TPM_RESULT that opens a reply; a `Failure` is no longer than this."""
MAX_HASH_DATA = 64 << 20
"""The longest HASH_DATA in bytes. swtpm sets no limit; what is hashed at once is held in memory here."""
MAX_STATE_BLOB = 512 << 10
"""The longest state blob in bytes (swtpm's limit for SET_STATEBLOB)."""
MAX_INFO = 3 << 10
"""The most text bytes in one reply of GET_INFO (PTM_GETINFO_SIZE)."""
MAX_OUTCOME = 4 << 10
"""The most text bytes that say how something of crbd's own went."""
MAX_DOCUMENT = 4 << 20
"""The longest document in bytes (crbd.state.header has the same)."""
MAX_PAGES = 5 << 12
"""Most bytes of register pages: five localities."""
PADDING = 3
"""Bytes behind SET_LOCALITY and RESET_TPMESTABLISHED from clients that send the whole 4-byte union, as QEMU does."""


class Needs(Enum):
    """What the TPM must be for a command to be carried out; otherwise the answer is TPM_BAD_ORDINAL."""

    ANYTHING = "anything"
    RUNNING = "running"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Number:
    """An unsigned big-endian number of `size` bytes; `convert` makes it the message's value."""

    name: str
    size: int
    convert: Callable[[int], int] = int


@dataclass(frozen=True, slots=True)
class Unused:
    """`size` bytes without meaning: sent as zeros, ignored when read."""

    size: int


@dataclass(frozen=True, slots=True)
class Data:
    """A 32-bit count and that many bytes, at most `limit`; `too_long` answers more. Always the last field."""

    name: str
    limit: int
    too_long: TpmResult = TpmResult.SIZE


COUNT_SIZE = 4
"""Bytes of the count that opens a `Data` field."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What follows the code of a request or the result of a reply."""

    fields: tuple[Number | Unused | Data, ...] = ()

    @property
    def fixed(self) -> int:
        """Bytes that are always there: all numbers and, of a `Data` field, its count."""
        return sum(COUNT_SIZE if isinstance(field, Data) else field.size for field in self.fields)

    @property
    def data(self) -> Data | None:
        """The variable field, if there is one."""
        last = self.fields[-1] if self.fields else None
        return last if isinstance(last, Data) else None

    def declared(self, body: bytes) -> int:
        """The bytes that the whole body takes, as far as its beginning tells: `fixed` until the count is there."""
        if self.data is None or len(body) < self.fixed:
            return self.fixed
        return self.fixed + int.from_bytes(body[self.fixed - COUNT_SIZE : self.fixed], "big")


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    code: int
    name: str
    """Without its prefix CMD_."""
    capability: Capability
    """The bit that promises this command; none for the command that asks for the bits and for crbd's own."""
    request: type[Request]
    body: Layout
    """Of the request, behind the code."""
    reply: type[Reply]
    """Of success."""
    reply_body: Layout
    """Of success, behind the result."""
    needs: Needs
    doc: str
    """One sentence."""
    while_executing: bool = False
    """Answered although a TPM command executes, without waiting for it."""
    padded: bool = False
    """Some clients send up to `PADDING` further bytes of any value behind the body."""
    extension: bool = False
    """crbd's own: answered to any client, also while another one has the channel."""
    whole_head: bool = False
    """A refusal too has all fixed bytes of the reply, because QEMU reads that many before it looks at the result."""


_EMPTY = Layout()
_LOCALITY = Layout((Number("locality", 1),))
_OUTCOME = Layout((Number("done", 4, bool), Data("text", MAX_OUTCOME)))

COMMANDS: tuple[Command, ...] = (
    Command(
        0x01, "GET_CAPABILITY", Capability(0), requests.GetCapability, _EMPTY,
        replies.Capabilities, Layout((Number("caps", 4, Capability),)), Needs.ANYTHING,
        "Tells which commands are there; always succeeds.", while_executing=True,
    ),
    Command(
        0x02, "INIT", Capability.INIT, requests.Init, Layout((Number("flags", 4, InitFlag),)),
        replies.Done, _EMPTY, Needs.ANYTHING,
        "Powers the TPM on; a running one is shut down and powered off first.",
    ),
    Command(
        0x03, "SHUTDOWN", Capability.SHUTDOWN, requests.Shutdown, _EMPTY,
        replies.Done, _EMPTY, Needs.ANYTHING,
        "Shuts the TPM down; once the reply is sent the process ends with status 0.",
    ),
    Command(
        0x04, "GET_TPMESTABLISHED", Capability.GET_TPMESTABLISHED, requests.GetTpmEstablished, _EMPTY,
        replies.Established, Layout((Number("bit", 1), Unused(3))), Needs.RUNNING,
        "Reads the tpmEstablished flag.",
    ),
    Command(
        0x05, "SET_LOCALITY", Capability.SET_LOCALITY, requests.SetLocality, _LOCALITY,
        replies.Done, _EMPTY, Needs.ANYTHING,
        "Sets the locality (0 to 4) that the commands that follow come from.", padded=True,
    ),
    Command(
        0x06, "HASH_START", Capability.HASHING, requests.HashStart, _EMPTY,
        replies.Done, _EMPTY, Needs.RUNNING,
        "Begins the locality-4 hash sequence.",
    ),
    Command(
        0x07, "HASH_DATA", Capability.HASHING, requests.HashData, Layout((Data("data", MAX_HASH_DATA),)),
        replies.Done, _EMPTY, Needs.RUNNING,
        "Adds bytes to the hash sequence.",
    ),
    Command(
        0x08, "HASH_END", Capability.HASHING, requests.HashEnd, _EMPTY,
        replies.Done, _EMPTY, Needs.RUNNING,
        "Ends the hash sequence and extends its PCR.",
    ),
    Command(
        0x09, "CANCEL_TPM_CMD", Capability.CANCEL_TPM_CMD, requests.CancelTpmCmd, _EMPTY,
        replies.Done, _EMPTY, Needs.RUNNING,
        "Asks the TPM command that executes to give up.", while_executing=True,
    ),
    Command(
        0x0A, "STORE_VOLATILE", Capability.STORE_VOLATILE, requests.StoreVolatile, _EMPTY,
        replies.Done, _EMPTY, Needs.RUNNING,
        "Writes the volatile state to the store.",
    ),
    Command(
        0x0B, "RESET_TPMESTABLISHED", Capability.RESET_TPMESTABLISHED, requests.ResetTpmEstablished, _LOCALITY,
        replies.Done, _EMPTY, Needs.RUNNING,
        "Clears the tpmEstablished flag on behalf of a locality (0 to 4).", padded=True,
    ),
    Command(
        0x0C, "GET_STATEBLOB", Capability.GET_STATEBLOB, requests.GetStateBlob,
        Layout((Number("flags", 4, StateFlag), Number("blob_type", 4), Number("offset", 4))),
        replies.StateBlob,
        Layout((Number("flags", 4, StateFlag), Number("total_length", 4), Data("data", MAX_STATE_BLOB))), Needs.RUNNING,
        "Hands out a state blob (1 permanent, 2 volatile, 3 savestate) from an offset to its end.", whole_head=True,
    ),
    Command(
        0x0D, "SET_STATEBLOB", Capability.SET_STATEBLOB, requests.SetStateBlob,
        Layout((Number("flags", 4, StateFlag), Number("blob_type", 4), Data("data", MAX_STATE_BLOB, TpmResult.FAIL))),
        replies.Done, _EMPTY, Needs.STOPPED,
        "Takes a state blob for the next INIT.",
    ),
    Command(
        0x0E, "STOP", Capability.STOP, requests.Stop, _EMPTY,
        replies.Done, _EMPTY, Needs.ANYTHING,
        "Shuts the TPM down and powers it off; the process stays.",
    ),
    Command(
        0x0F, "GET_CONFIG", Capability.GET_CONFIG, requests.GetConfig, _EMPTY,
        replies.Config, Layout((Number("flags", 4, ConfigFlag),)), Needs.ANYTHING,
        "Tells which keys are in use (1 file key, 2 migration key).", while_executing=True,
    ),
    Command(
        0x10, "SET_DATAFD", Capability.SET_DATAFD, requests.SetDataFd, _EMPTY,
        replies.Done, _EMPTY, Needs.ANYTHING,
        "Hands over the data channel, one descriptor sent along by SCM_RIGHTS on a UNIX socket.", while_executing=True,
    ),
    Command(
        0x11, "SET_BUFFERSIZE", Capability.SET_BUFFERSIZE, requests.SetBufferSize, Layout((Number("wanted", 4),)),
        replies.BufferSizes, Layout((Number("current", 4), Number("minimum", 4), Number("maximum", 4))), Needs.ANYTHING,
        "Asks for (0) or sets the size of the TPM's buffer; setting it needs a stopped TPM.",
    ),
    Command(
        0x12, "GET_INFO", Capability.GET_INFO, requests.GetInfo,
        Layout((Number("flags", 8), Number("offset", 4), Unused(4))),
        replies.Info, Layout((Number("total_length", 4), Data("text", MAX_INFO))), Needs.ANYTHING,
        "Hands out JSON text about the TPM from an offset on.",
    ),
    Command(
        0x13, "LOCK_STORAGE", Capability.LOCK_STORAGE, requests.LockStorage, Layout((Number("retries", 4),)),
        replies.Done, _EMPTY, Needs.ANYTHING,
        "Locks the storage again after a state blob was handed out, trying every 10 ms.",
    ),
    Command(
        0xC0, "GET_REGISTERS", Capability(0), requests.GetRegisters, _EMPTY,
        replies.Registers, Layout((Number("localities", 4), Data("pages", MAX_PAGES))), Needs.ANYTHING,
        "Shows the CRB registers as they are: a 4 KiB page per locality. crbd's own; any client may ask at any time.",
        while_executing=True, extension=True,
    ),
    Command(
        0xC1, "UPGRADE", Capability(0), requests.Upgrade, _EMPTY, replies.Outcome, _OUTCOME, Needs.ANYTHING,
        "Puts the crbd that is installed now in the place of the running process; no client notices. Answered by the "
        "new one, or by the old one with what was in the way. crbd's own; any client may ask at any time.",
        while_executing=True, extension=True,
    ),
    Command(
        0xC2, "TAKE_SNAPSHOT", Capability(0), requests.TakeSnapshot, _EMPTY,
        replies.Snapshot, Layout((Number("done", 4, bool), Data("document", MAX_DOCUMENT))), Needs.ANYTHING,
        "Hands out the whole TPM as it is between two commands, as a document, sealed as the state is; with done 0 the "
        "reason in UTF-8. crbd's own; any client may ask at any time.", extension=True,
    ),
    Command(
        0xC3, "RESTORE", Capability(0), requests.Restore,
        Layout((Number("flags", 4, requests.RestoreFlag), Data("document", MAX_DOCUMENT))),
        replies.Outcome, _OUTCOME, Needs.ANYTHING,
        "Puts such a document in the place of the TPM, durably (flag 1: going back in time is meant); where that fails "
        "the TPM is as it was. crbd's own; any client may ask at any time.", extension=True,
    ),
)  # fmt: skip

BY_CODE: dict[int, Command] = {command.code: command for command in COMMANDS}
BY_REQUEST: dict[type[Request], Command] = {command.request: command for command in COMMANDS}
REPLY_BODIES: dict[type[Reply], Layout] = {command.reply: command.reply_body for command in COMMANDS}
"""By the class of the reply; `Failure` has none."""


def all_capabilities() -> Capability:
    """The capability word of a TPM 2.0 that has every command, and the data channel's command header."""
    word = Capability.SEND_COMMAND_HEADER
    for command in COMMANDS:
        word |= command.capability
    return word


CAPABILITIES = all_capabilities()
"""What GET_CAPABILITY answers."""
