"""The commands of `swtpm_ioctl`: what each sends, what it shows, and what is wrong with its value."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Final

from crbd.compat.ioctl_blobs import load_blob, save_blob
from crbd.compat.ioctl_connection import ControlClient, carry_out
from crbd.compat.ioctl_options import Arguments, Option, unsigned
from crbd.control import messages as m
from crbd.errors import UsageError

HASH_PIECE: Final = 4096
"""Bytes of hash data in one request (the array in swtpm's ptm_hdata)."""
HIGHEST_LOCALITY: Final = 4

VERSION: Final = "TPM emulator control tool version 0.11.0, of crbd\n"
HELP: Final = (
    VERSION
    + """
Usage: swtpm_ioctl COMMAND [DEVICE]

Where the TPM is:
--tpm-device <device> : a character device; none is supported here
--tcp [<host>]:[<prt>]: control channel at a TCP port; default 127.0.0.1:6546
--unix <path>         : control channel at a UNIX socket

Commands, of which one is given:
-c                    : show the capability flags
-i                    : power the TPM on; stored volatile state is resumed and
                        deleted
--stop                : power the TPM off; the process stays
-s                    : power the TPM off and end the process
-e                    : show the tpmEstablished bit
-r <loc>              : clear the tpmEstablished bit from this locality
-v                    : store the volatile state
-C                    : cancel the TPM command that is executing
-l <loc>              : set the locality, 0 to 4
-h <data>             : measure the data into PCR 17; '-': what stdin brings
--save <type> <file>  : write a state blob to a file; the type is permanent,
                        volatile or savestate
--load <type> <file>  : hand a state blob to a TPM that is off
-g                    : show which keys are in use
-b <buffersize>       : set the size of the TPM's buffer (0: leave it) and
                        show it with the smallest and the largest one
--info <flags>        : show JSON text about the TPM; the flags are a number
--lock-storage <n>    : lock the storage again, with n further tries
--version             : show the version
--help                : show this
"""
)

Action = Callable[[ControlClient], int]
"""What to do on a connection; returns the exit status. Raises DaemonError, UsageError."""

NAMES: Final = {
    "c": "PTM_GET_CAPABILITY",
    "i": "PTM_INIT",
    "stop": "PTM_STOP",
    "s": "PTM_SHUTDOWN",
    "e": "PTM_GET_ESTABLISHED",
    "r": "PTM_RESET_ESTABLISHED",
    "v": "PTM_STORE_VOLATILE",
    "C": "PTM_CANCEL_TPM_CMD",
    "l": "PTM_SET_LOCALITY",
    "h": "ioctl PTM_HASH_START",
    "g": "PTM_GET_CONFIG",
    "b": "PTM_SET_BUFFERSIZE",
    "save": "ioctl PTM_GET_STATEBLOB",
    "load": "ioctl PTM_SET_STATEBLOB",
    "info": "PTM_GET_INFO",
    "lock-storage": "PTM_LOCK_STORAGE",
}
"""The (first) request of each command, in the words of swtpm_ioctl's messages."""


def action(option: Option, arguments: Arguments) -> Action:
    """What the option asks for; a second value is taken from `arguments`. Raises UsageError for a wrong value."""
    match option.name:
        case "save" | "load":
            return _blob_action(option, arguments)
        case "r" | "l":
            return _locality_action(option)
        case "h":
            return _hash_action(option.value)
        case "b":
            return _buffer_action(option.value)
        case "info":
            return _info_action(option.value)
        case "lock-storage":
            return _lock_action(option.value)
        case name:
            return _PLAIN[name]


def show_help(_: ControlClient) -> int:
    """The command's name was cut short or written with another number of dashes: swtpm_ioctl does not know it then."""
    sys.stdout.write(HELP)
    return 1


def _capabilities(client: ControlClient) -> int:
    caps = carry_out(client, m.GetCapability(), m.Capabilities, "PTM_GET_CAPABILITY").caps
    print(f"ptm capability is 0x{caps:x}")
    return 0


def _established(client: ControlClient) -> int:
    names = ("PTM_GET_TPMESTABLISHED", "PTM_GET_ESTABLISHED")
    print(f"tpmEstablished is {carry_out(client, m.GetTpmEstablished(), m.Established, *names).bit}")
    return 0


def _config(client: ControlClient) -> int:
    print(f"ptm configuration flags: 0x{carry_out(client, m.GetConfig(), m.Config, 'PTM_GET_CONFIG').flags:x}")
    return 0


def _done(request: m.Request, name: str, sent_as: str = "") -> Action:
    """The action that sends a request and has nothing to show."""

    def send(client: ControlClient) -> int:
        carry_out(client, request, m.Done, name, sent_as)
        return 0

    return send


_PLAIN: Final[dict[str, Action]] = {
    "c": _capabilities,
    "e": _established,
    "g": _config,
    "i": _done(m.Init(m.InitFlag.DELETE_VOLATILE), "PTM_INIT"),
    "stop": _done(m.Stop(), "PTM_STOP"),
    "s": _done(m.Shutdown(), "PTM_SHUTDOWN"),
    "v": _done(m.StoreVolatile(), "PTM_STORE_VOLATILE"),
    "C": _done(m.CancelTpmCmd(), "PTM_CANCEL_TPM_CMD"),
}


def _locality_action(option: Option) -> Action:
    locality = unsigned(option.value)
    if locality is None:
        raise UsageError(f"Could not get locality number from {option.value}.")
    if locality > HIGHEST_LOCALITY:
        raise UsageError("Locality outside valid range of [0..4].")
    if option.name == "l":
        return _done(m.SetLocality(locality), "PTM_SET_LOCALITY")
    return _done(m.ResetTpmEstablished(locality), "PTM_RESET_TPMESTABLISHED", "PTM_RESET_ESTABLISHED")


def _buffer_action(value: str) -> Action:
    wanted = unsigned(value)
    if wanted is None:
        raise UsageError(f"Could not get buffersize from {value}.")

    def send(client: ControlClient) -> int:
        sizes = carry_out(client, m.SetBufferSize(wanted), m.BufferSizes, "PTM_SET_BUFFERSIZE")
        print(f"TPM buffersize: {sizes.current}\nminimum size  : {sizes.minimum}\nmaximum size  : {sizes.maximum}")
        return 0

    return send


_FLAGS = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]*)", re.ASCII)


def _info_action(value: str) -> Action:
    """The flags are decimal, octal behind a 0 or hexadecimal behind 0x; none at all are 0."""
    found = _FLAGS.fullmatch(value)
    try:
        text = found[2] if found else ""
        flags = int(text or "0", 8 if re.match("0[0-7]", text) else 0)
    except ValueError:
        found = None
        flags = 0
    if found is None or flags >> 64:
        raise UsageError("Cannot parse info flags.")
    if found[1] == "-":
        flags = -flags & (1 << 64) - 1

    def send(client: ControlClient) -> int:
        text = b""
        while True:
            piece = carry_out(client, m.GetInfo(flags, len(text)), m.Info, "PTM_GET_INFO")
            text += piece.text
            if len(text) >= piece.total_length or not piece.text:
                break
        print(text.partition(b"\0")[0].decode("utf-8", "replace"))
        return 0

    return send


def _lock_action(value: str) -> Action:
    retries = unsigned(value)
    if retries is None:
        raise UsageError(f"Could not parse lock retries from {value}.")
    return _done(m.LockStorage(retries), "PTM_LOCK_STORAGE")


def _blob_action(option: Option, arguments: Arguments) -> Action:
    following = arguments.peek()
    if following is None or following.startswith("-"):
        raise UsageError(f"Missing filename argument for --{option.name} option")
    path = following
    arguments.take()
    transfer = save_blob if option.name == "save" else load_blob

    def send(client: ControlClient) -> int:
        transfer(client, option.value, path)
        return 0

    return send


def _hash_action(value: str) -> Action:
    def send(client: ControlClient) -> int:
        _sent(client, m.HashStart(), "PTM_HASH_START")
        for piece in _hash_pieces(value):
            _sent(client, m.HashData(piece), "PTM_HASH_DATA")
        _sent(client, m.HashEnd(), "PTM_HASH_END")
        return 0

    return send


def _sent(client: ControlClient, request: m.Request, name: str) -> None:
    carry_out(client, request, m.Done, name, f"ioctl {name}")


def _hash_pieces(value: str) -> Iterator[bytes]:
    """The data of -h; for '-' all that stdin brings, and at the end of it one piece that is short, perhaps empty."""
    if value != "-":
        data = os.fsencode(value)
        yield from (data[start : start + HASH_PIECE] for start in range(0, len(data), HASH_PIECE))
        return
    while True:
        piece = sys.stdin.buffer.read(HASH_PIECE)
        yield piece
        if len(piece) < HASH_PIECE:
            return
