"""Commands on the data channel: the bytes of every answer."""

from __future__ import annotations

import socket
from pathlib import Path

from .commands import (
    CREATE_PRIMARY_RSA,
    EXTEND_PCR_16,
    GET_RANDOM,
    NO_SUCH_COMMAND,
    READ_PCR_16,
    READ_PCR_17,
    SELF_TEST,
    SET_LOCALITY_3,
    STARTUP_CLEAR,
    STARTUP_STATE,
)
from .comparison import Seen, scenario
from .subject import SILENCE, Channel, Daemon, Subject, first_line, running

ON = ("--flags", "not-need-init,startup-clear")


@scenario
def commands_before_and_after_init(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place) as daemon, daemon.control() as control, daemon.data() as data:
        seen.note("Startup before INIT", data.response(STARTUP_CLEAR))
        seen.note("GetRandom before INIT", data.response(GET_RANDOM))
        control.ask("00000002 00000000", 4)
        seen.note("GetRandom before Startup", data.response(GET_RANDOM))
        seen.note("Startup(STATE) of a new TPM", data.response(STARTUP_STATE))
        seen.note("Startup", data.response(STARTUP_CLEAR))
        seen.note("Startup again", data.response(STARTUP_CLEAR))
        seen.note("SelfTest", data.response(SELF_TEST))
        seen.note("GetRandom", data.response(GET_RANDOM)[:24])
        seen.note("PCR_Extend", data.response(EXTEND_PCR_16))
        seen.note("PCR_Read", data.response(READ_PCR_16))
        seen.note("an unknown command", data.response(NO_SUCH_COMMAND))
        seen.note("CreatePrimary", data.response(CREATE_PRIMARY_RSA)[:20])
        control.ask("0000000e", 4)
        seen.note("GetRandom after STOP", data.response(GET_RANDOM))
        control.ask("00000002 00000000", 4)
        seen.note("GetRandom after the next INIT", data.response(GET_RANDOM))
        seen.note("Startup then", data.response(STARTUP_CLEAR))


@scenario
def startup_flags(subject: Subject, place: Path, seen: Seen) -> None:
    for flags in ("not-need-init", "startup-none", "startup-clear", "not-need-init,startup-clear", "startup-state"):
        here = place / flags.replace(",", "-")
        here.mkdir()
        try:
            with running(subject, here, "--flags", flags) as daemon:
                with daemon.data() as data:
                    seen.note(f"{flags}: GetRandom", data.response(GET_RANDOM)[:20])
                    seen.note(f"{flags}: Startup", data.response(STARTUP_CLEAR))
                seen.note(f"{flags}: the end", daemon.end())
        except AssertionError as error:
            seen.note(f"{flags}: refused", first_line(str(error), here))


@scenario
def malformed_commands(subject: Subject, place: Path, seen: Seen) -> None:
    """Each on a connection of its own, and then a whole command on the same connection."""

    def note(daemon: Daemon, name: str, *writes: str) -> None:
        with daemon.data() as data:
            for write in writes[:-1]:
                data.send(write)
                early = data.answer(0, 0.3)
                if early != "nothing":
                    seen.note(f"{name}: early", early)
            seen.note(name, data.ask(writes[-1], wait=SILENCE))
            seen.note(f"{name}: then PCR_Read", data.ask(READ_PCR_16, wait=SILENCE))

    with running(subject, place, *ON) as daemon:
        note(daemon, "a command in two writes", READ_PCR_16[:14], READ_PCR_16[14:])
        note(daemon, "a head and its body", READ_PCR_16[:20], READ_PCR_16[20:])
        note(daemon, "two commands in one write", READ_PCR_16 + READ_PCR_17)
        note(daemon, "one byte", "80")
        note(daemon, "half a command", READ_PCR_16[:20])
        note(daemon, "a size of 0", "80010000000000000144")
        note(daemon, "a size of 9", "80010000000900000144")
        note(daemon, "a size of 10 for a command of 12", "80010000000a000001440000")
        note(daemon, "a size of 5000", "80010000138800000144" + "00" * 100)
        note(daemon, "a size of 4 GiB", "8001ffffffff00000144")
        note(daemon, "a command of 5000 bytes", "80010000138800000144" + "00" * 4990)
        note(daemon, "a tag of TPM 1.2", "00c10000000c000000990001")
        note(daemon, "a tag of 0", "00000000000c000001440000")
        note(daemon, "a byte too many", READ_PCR_16 + "00")


@scenario
def commands_with_the_send_command_header(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place, *ON) as daemon:
        for name, text in (
            ("locality 0", f"00000008 00 00000014 {READ_PCR_16}"),
            ("locality 4", f"00000008 04 00000014 {READ_PCR_16}"),
            ("locality 5", f"00000008 05 00000014 {READ_PCR_16}"),
            ("locality 255", f"00000008 ff 00000014 {READ_PCR_16}"),
            ("sizes that disagree", f"00000008 00 00000010 {READ_PCR_16}"),
            ("header 7", f"00000007 00 00000014 {READ_PCR_16}"),
        ):
            with daemon.data() as data:
                seen.note(name, data.ask(text, wait=SILENCE))
                seen.note(f"{name}: then PCR_Read", data.ask(READ_PCR_16, wait=SILENCE))
        with daemon.data() as data:
            data.send("00000008 00 00000014")
            early = data.answer(0, 0.3)
            seen.note(
                "the header in a write of its own", data.ask(READ_PCR_16, wait=SILENCE) if early == "nothing" else early
            )


@scenario
def localities(subject: Subject, place: Path, seen: Seen) -> None:
    for options in ("", "reject-locality-4", "allow-set-locality", "reject-locality-4,allow-set-locality"):
        here = place / (options.replace(",", "-") or "none")
        here.mkdir()
        arguments = ("--locality", options) if options else ()
        with running(subject, here, *ON, *arguments) as daemon, daemon.control() as control, daemon.data() as data:
            when = options or "no option"
            for locality in range(6):
                seen.note(f"{when}: SET_LOCALITY {locality}", control.ask(f"00000005 {locality:02x}", 4))
            seen.note(f"{when}: the vendor command", data.response(SET_LOCALITY_3))
            seen.note(f"{when}: the vendor command, 4", data.response("80010000000b2000100004"))
            seen.note(f"{when}: the vendor command, 5", data.response("80010000000b2000100005"))
            seen.note(f"{when}: the vendor command, short", data.response("80010000000a20001000"))


@scenario
def data_clients(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place, *ON) as daemon:
        with daemon.data() as first, daemon.data() as second:
            seen.note("the first", first.response(READ_PCR_16))
            second.send(READ_PCR_16)
            seen.note("the second meanwhile", second.answer(wait=SILENCE))
            first.socket.close()
            seen.note("the second then", second.whole_response())
        with daemon.data() as data:
            data.send(READ_PCR_16)
            data.socket.shutdown(socket.SHUT_WR)
            seen.note("a command and then the half-close", data.answer())
        with daemon.data() as data:
            data.socket.shutdown(socket.SHUT_WR)
            seen.note("the half-close alone", data.answer())
        with daemon.data():
            pass
        with daemon.data() as data:
            data.send(CREATE_PRIMARY_RSA)
        with daemon.data() as data:
            seen.note("after a client that did not wait", data.response(READ_PCR_16))


@scenario
def tcp(subject: Subject, place: Path, seen: Seen) -> None:
    with socket.socket() as probe, socket.socket() as other:
        ports = []
        for one in (probe, other):
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
    options = (*ON, "--server", f"type=tcp,port={ports[0]}", "--ctrl", f"type=tcp,port={ports[1]}")
    for again in ("", "again at once: "):
        with running(subject, place, *options, sockets="") as daemon:
            note_tcp(daemon, seen, again, ports)


def note_tcp(daemon: Daemon, seen: Seen, again: str, ports: list[int]) -> None:
    """Both channels at their TCP ports, and the end while a client is there."""
    with Channel(socket.create_connection(("127.0.0.1", ports[0]))) as data:
        seen.note(f"{again}PCR_Read", data.response(READ_PCR_16))
        with Channel(socket.create_connection(("127.0.0.1", ports[1]))) as control:
            seen.note(f"{again}GET_CONFIG", control.ask("0000000f", 8))
            seen.note(f"{again}SET_DATAFD", control.ask("00000010", 4))
        seen.note(f"{again}the end", daemon.end())
