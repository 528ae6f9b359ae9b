"""Requests on the control channel: the bytes of every answer."""

from __future__ import annotations

import array
import json
import socket
from pathlib import Path

from .commands import STARTUP_CLEAR
from .comparison import Seen, scenario
from .subject import SILENCE, Channel, Daemon, Subject, running

REQUESTS = {
    # name: (request, bytes of the reply to success)
    "GET_CAPABILITY": ("00000001", 8),
    "GET_CONFIG": ("0000000f", 8),
    "GET_TPMESTABLISHED": ("00000004", 8),
    "SET_LOCALITY 0": ("00000005 00", 4),
    "SET_LOCALITY 0, padded": ("00000005 00000000", 4),
    "SET_LOCALITY 4": ("00000005 04", 4),
    "SET_LOCALITY 5": ("00000005 05", 4),
    "SET_LOCALITY 255": ("00000005 ff", 4),
    "HASH_START": ("00000006", 4),
    "HASH_DATA": ("00000007 00000003 616263", 4),
    "HASH_DATA of nothing": ("00000007 00000000", 4),
    "HASH_END": ("00000008", 4),
    "GET_TPMESTABLISHED after hashing": ("00000004", 8),
    "RESET_TPMESTABLISHED 0": ("0000000b 00", 4),
    "RESET_TPMESTABLISHED 5": ("0000000b 05", 4),
    "RESET_TPMESTABLISHED 3": ("0000000b 03", 4),
    "GET_TPMESTABLISHED after the reset": ("00000004", 8),
    "HASH_END without a start": ("00000008", 4),
    "HASH_DATA without a start": ("00000007 00000003 616263", 4),
    "CANCEL_TPM_CMD": ("00000009", 4),
    "STORE_VOLATILE": ("0000000a", 4),
    "GET_STATEBLOB savestate": ("0000000c 00000001 00000003 00000000", 16),
    "GET_STATEBLOB of type 0": ("0000000c 00000001 00000000 00000000", 16),
    "GET_STATEBLOB of type 9": ("0000000c 00000001 00000009 00000000", 16),
    "GET_STATEBLOB behind the end": ("0000000c 00000001 00000001 000f0000", 16),
    "SET_STATEBLOB": ("0000000d 00000000 00000001 00000000", 4),
    "SET_BUFFERSIZE 0": ("00000011 00000000", 16),
    "SET_BUFFERSIZE 1": ("00000011 00000001", 16),
    "SET_BUFFERSIZE 3000": ("00000011 00000bb8", 16),
    "SET_BUFFERSIZE 100000": ("00000011 000186a0", 16),
    "LOCK_STORAGE": ("00000013 00000000", 4),
    "SET_DATAFD without a descriptor": ("00000010", 4),
    "unknown 0": ("00000000", 4),
    "unknown 0x14": ("00000014", 4),
    "unknown 0xffffffff": ("ffffffff", 4),
}
STATES = (
    ("GET_STATEBLOB permanent", "0000000c 00000001 00000001 00000000"),
    ("GET_STATEBLOB volatile", "0000000c 00000001 00000002 00000000"),
    ("GET_STATEBLOB permanent, as it is stored", "0000000c 00000000 00000001 00000000"),
)


def note_all(seen: Seen, when: str, control: Channel) -> None:
    """The answer to every request of the table."""
    for name, (request, size) in REQUESTS.items():
        seen.note(f"{when}: {name}", control.ask(request, size))


@scenario
def control_requests(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon, daemon.control() as control:
        note_all(seen, "off", control)
        for name, request in STATES:
            seen.note(f"off: {name}", control.ask(request)[:8])
        seen.note("INIT", control.ask("00000002 00000000", 4))
        note_all(seen, "on", control)
        for name, request in STATES:
            head = control.ask(request)
            whole = (int(head[16:24], 16), int(head[24:32], 16))
            seen.note(f"on: {name}", f"{head[:16]}, lengths {'equal' if whole[0] == whole[1] else whole}")
        seen.note("INIT again", control.ask("00000002 00000001", 4))
        seen.note("STOP", control.ask("0000000e", 4))
        note_all(seen, "stopped", control)
        seen.note("STOP again", control.ask("0000000e", 4))
        seen.note("SHUTDOWN", control.ask("00000003", 4))
        seen.note("the connection", control.answer(wait=SILENCE * 5))
        seen.note("the end", daemon.ended())


@scenario
def state_blobs(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon, daemon.control() as control:
        control.ask("00000002 00000000", 4)
        blob = control.ask(STATES[0][1])[32:]
        size = len(blob) // 2
        control.ask("0000000e", 4)
        for name, body, length in (
            ("whole", blob, size),
            ("nothing", "", 0),
            ("of type 9", blob, size),
            ("damaged", blob[:-8] + "ffffffff", size),
            ("no blob at all", "00" * 64, 64),
        ):
            kind = 9 if name == "of type 9" else 1
            seen.note(f"SET_STATEBLOB {name}", control.ask(f"0000000d 00000000 {kind:08x} {length:08x} {body}", 4))
            seen.note(f"INIT after {name}", control.ask("00000002 00000000", 4))
            control.ask("0000000e", 4)
        seen.note("SET_STATEBLOB in two pieces", two_pieces(control, f"0000000d 00000000 00000001 {size:08x}", blob))
        seen.note("INIT after two pieces", control.ask("00000002 00000000", 4))


def two_pieces(control: Channel, first: str, second: str) -> str:
    """The answer to a request whose data come in a write of their own."""
    control.send(first)
    seen = control.answer(4, 0.3)
    return control.ask(second, 4) if seen == "nothing" else seen


@scenario
def a_state_blob_too_long(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon, daemon.control() as control:
        seen.note("SET_STATEBLOB of 16 MiB", control.ask("0000000d 00000000 00000001 01000000", 4))
        seen.note("the connection then", control.ask("0000000f", 8, SILENCE))


@scenario
def info(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon, daemon.control() as control:
        for when in ("off", "on"):
            for flags in (0, 1, 2, 4, 7, 1 << 63):
                reply = control.ask(f"00000012 {flags:016x} 00000000 00000000")
                text = bytes.fromhex(reply[24:]).rstrip(b"\0").decode()
                seen.note(f"{when}: GET_INFO {flags:#x}: result", reply[:8])
                told = json.loads(text) if text.startswith("{") else {}
                seen.note(f"{when}: GET_INFO {flags:#x}: keys", {key: sorted(told[key]) for key in told})
                seen.note(f"{when}: GET_INFO {flags:#x}: ends with NUL", reply.endswith("00"))
            seen.note(f"{when}: GET_INFO at an offset", control.ask("00000012 0000000000000001 00000004 00000000"))
            seen.note(f"{when}: GET_INFO behind the end", control.ask("00000012 0000000000000001 00010000 00000000"))
            control.ask("00000002 00000000", 4)


@scenario
def malformed_control_requests(subject: Subject, place: Path, seen: Seen) -> None:
    """Each on a connection of its own, and then a whole request on the same connection."""

    def note(daemon: Daemon, name: str, *writes: str) -> None:
        with daemon.control() as control:
            for write in writes[:-1]:
                control.send(write)
                early = control.answer(0, 0.3)
                if early != "nothing":
                    seen.note(f"{name}: early", early)
            seen.note(name, control.ask(writes[-1], wait=SILENCE))
            seen.note(f"{name}: then GET_CONFIG", control.ask("0000000f", wait=SILENCE))

    with running(subject, place) as daemon:
        note(daemon, "one byte", "00")
        note(daemon, "half a code", "0000")
        note(daemon, "a code in two writes", "0000", "000f")
        note(daemon, "a body in a write of its own", "00000002", "00000000")
        note(daemon, "INIT without its flags", "00000002")
        note(daemon, "INIT with half its flags", "00000002 0000")
        note(daemon, "a byte too many", "0000000f 00")
        note(daemon, "four bytes too many", "0000000f 00000000")
        note(daemon, "two requests in one write", "0000000f 0000000f")
        note(daemon, "three requests in one write", "00000001 0000000f 00000001")
        note(daemon, "one and a half in one write", "0000000f 0000")
        note(daemon, "HASH_DATA shorter than it says", "00000007 00000010 0000")
        note(daemon, "GET_STATEBLOB cut short", "0000000c 00000000")
        note(daemon, "SET_STATEBLOB cut short", "0000000d 00000000")


@scenario
def control_half_close(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon:
        with daemon.control() as control:
            control.send("0000000f")
            control.socket.shutdown(socket.SHUT_WR)
            seen.note("a request and then the half-close", control.answer())
        with daemon.control() as control:
            control.socket.shutdown(socket.SHUT_WR)
            seen.note("the half-close alone", control.answer())
        with daemon.control():
            pass
        with daemon.control() as control:
            seen.note("after a client that said nothing", control.ask("0000000f", 8))


@scenario
def a_second_control_client(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon, daemon.control() as first, daemon.control() as second:
        seen.note("the first", first.ask("0000000f", 8))
        seen.note("the second meanwhile", second.ask("0000000f", 8, SILENCE))
        first.socket.close()
        seen.note("the second then", second.answer(8))


@scenario
def a_data_channel_handed_over(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place, sockets="ctrl") as daemon, daemon.control() as control:
        ours, theirs = socket.socketpair()
        with ours, Channel(ours) as data:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))
            control.socket.sendmsg([bytes.fromhex("00000010")], [rights])
            seen.note("SET_DATAFD", control.answer(4))
            control.socket.sendmsg([bytes.fromhex("00000010")], [rights])
            seen.note("SET_DATAFD again", control.answer(4))
            theirs.close()
            seen.note("a command before INIT", data.response(STARTUP_CLEAR))
            control.ask("00000002 00000000", 4)
            seen.note("a command", data.response(STARTUP_CLEAR))
        seen.note("INIT when the data client is gone", control.ask("00000002 00000000", 4, SILENCE))
        seen.note("SET_DATAFD when the data client is gone", handed_over(control))


def handed_over(control: Channel) -> str:
    """The answer to SET_DATAFD with a new socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))
        try:
            control.socket.sendmsg([bytes.fromhex("00000010")], [rights])
        except BrokenPipeError:
            return "closed"
        return control.answer(4)
