"""State: keys, wrong keys, damage, and what one life leaves for the next."""

from __future__ import annotations

import os
from pathlib import Path

from .commands import EXTEND_PCR_16, READ_PCR_16, STARTUP_STATE
from .comparison import Seen, scenario
from .subject import Subject, first_line, names, running, start, told

ON = ("--flags", "not-need-init,startup-clear")
HEX_128 = "00112233445566778899aabbccddeeff"
HEX_256 = HEX_128 * 2
KEYS = {
    "no key": (),
    "file": ("--key", "file=PLACE/hex-128"),
    "file, 256 bits": ("--key", "file=PLACE/hex-256,mode=aes-256-cbc"),
    "file, binary": ("--key", "file=PLACE/binary,format=binary"),
    "passphrase": ("--key", "pwdfile=PLACE/passphrase"),
    "passphrase, 256 bits": ("--key", "pwdfile=PLACE/passphrase,mode=aes-256-cbc"),
    "passphrase, sha512": ("--key", "pwdfile=PLACE/passphrase,kdf=sha512"),
    "another passphrase": ("--key", "pwdfile=PLACE/hex-128"),
}


def make_keys(place: Path) -> None:
    """The files that KEYS names."""
    (place / "hex-128").write_text(HEX_128)
    (place / "hex-256").write_text(HEX_256)
    (place / "binary").write_bytes(bytes.fromhex(HEX_128))
    (place / "passphrase").write_text("correct horse")


def key_options(name: str, place: Path) -> list[str]:
    """The options for one of KEYS."""
    return [option.replace("PLACE", str(place)) for option in KEYS[name]]


def directory_name(name: str) -> str:
    """Where the TPM with this one of KEYS lives; an option's value cannot hold a comma."""
    return "tpm-" + name.replace(", ", "-").replace(" ", "-")


def second_start(subject: Subject, place: Path, state: Path, *options: str) -> str:
    """How a start on a state that is there goes: the answer to GET_CONFIG of one that serves, or the refusal."""
    command = ("socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={place}/c")
    return told(start(subject, place, *command, *options), state)


@scenario
def keys(subject: Subject, place: Path, seen: Seen) -> None:
    make_keys(place)
    for name in KEYS:
        here = place / directory_name(name)
        here.mkdir()
        with running(subject, here, *ON, *key_options(name, place)) as daemon:
            with daemon.control() as control, daemon.data() as data:
                seen.note(f"{name}: GET_CONFIG", control.ask("0000000f", 8))
                data.response(EXTEND_PCR_16)
                control.ask("0000000a", 4)  # STORE_VOLATILE
                blob = control.ask("0000000c 00000001 00000001 00000000")
                seen.note(f"{name}: the blob's head", f"{blob[:16]} {blob[32:36]} {blob[36:52]}"[:40])
                stored = control.ask("0000000c 00000000 00000001 00000000")
                seen.note(f"{name}: the blob as it is stored", f"{stored[:16]} {stored[32:48]}")
            daemon.end()
        head = (here / "state" / "tpm2-00.permall").read_bytes()[:6].hex()
        seen.note(f"{name}: the file's head", head)
    for made in ("no key", "passphrase"):
        for given in ("no key", "file", "passphrase, 256 bits", "another passphrase"):
            if given == made:
                continue
            state = place / directory_name(made) / "state"
            seen.note(
                f"state of {made}, started with {given}",
                second_start(subject, place, state, *ON, *key_options(given, place)),
            )


@scenario
def migration_keys(subject: Subject, place: Path, seen: Seen) -> None:
    make_keys(place)
    option = ("--migration-key", f"pwdfile={place}/passphrase")
    with running(subject, place, *option) as daemon, daemon.control() as control:
        seen.note("GET_CONFIG", control.ask("0000000f", 8))
        control.ask("00000002 00000000", 4)
        blob = control.ask("0000000c 00000001 00000001 00000000")
        seen.note("the blob's head", f"{blob[:16]} {blob[32:48]}")
        control.ask("0000000e", 4)
        body = blob[32:]
        size = f"{len(body) // 2:08x}"
        for flags in (0, 2):
            seen.note(f"back with flags {flags}", control.ask(f"0000000d {flags:08x} 00000001 {size} {body}", 4))
            seen.note(f"INIT with flags {flags}", control.ask("00000002 00000000", 4))
            control.ask("0000000e", 4)
    other = place / "other"
    other.mkdir()
    with running(subject, other) as daemon, daemon.control() as control:
        seen.note("to a TPM without the key", control.ask(f"0000000d 00000002 00000001 {size} {body}", 4))
        seen.note("INIT of a TPM without the key", control.ask("00000002 00000000", 4))


@scenario
def removed_key_files(subject: Subject, place: Path, seen: Seen) -> None:
    for remove in ("true", "false", "1", "x"):
        path = place / f"key-{remove}"
        path.write_text(HEX_128)
        here = place / remove
        here.mkdir()
        try:
            with running(subject, here, *ON, "--key", f"file={path},remove={remove}"):
                pass
        except AssertionError as error:
            seen.note(f"remove={remove}: refused", first_line(str(error), place))
        seen.note(f"remove={remove}: the key file is there", path.exists())


@scenario
def keys_by_descriptor(subject: Subject, place: Path, seen: Seen) -> None:
    """As libvirt does it: pipes."""
    read, write = os.pipe()
    os.write(write, b"correct horse")
    os.close(write)
    with running(subject, place, *ON, "--key", f"pwdfd={read},mode=aes-256-cbc", fds=(read,)) as daemon:
        os.close(read)
        with daemon.control() as control:
            seen.note("GET_CONFIG", control.ask("0000000f", 8))
        daemon.end()
    seen.note("the file's head", (place / "state" / "tpm2-00.permall").read_bytes()[:6].hex())


@scenario
def damaged_state(subject: Subject, place: Path, seen: Seen) -> None:
    """What is done with a permanent state that cannot be read, and that it is still there afterwards."""
    with running(subject, place, *ON) as daemon:
        with daemon.data() as data:
            data.response(READ_PCR_16)
        daemon.end()
    path = place / "state" / "tpm2-00.permall"
    good = path.read_bytes()
    for name, content in {
        "empty": b"",
        "one byte": b"\x02",
        "the head alone": good[:10],
        "cut short": good[:-100],
        "a bit flipped in the middle": good[:600] + bytes([good[600] ^ 1]) + good[601:],
        "a byte more": good + b"\0",
        "zeros": bytes(len(good)),
        "version 9 of the head": b"\x09\x09" + good[2:],
        "text": b"this is no state\n" * 100,
    }.items():
        path.write_bytes(content)
        here = place / name.replace(" ", "-")
        here.mkdir()
        seen.note(f"{name}: powered on at the start", second_start(subject, here, path.parent, *ON))
        seen.note(f"{name}: the file is kept", path.read_bytes() == content)
        path.write_bytes(content)
        try:
            with running(subject, here, "--tpmstate", f"dir={path.parent}") as daemon, daemon.control() as control:
                seen.note(f"{name}: INIT", control.ask("00000002 00000000", 4))
                seen.note(f"{name}: INIT again", control.ask("00000002 00000000", 4))
        except AssertionError as error:
            seen.note(f"{name}: refused", first_line(str(error), path.parent))
        seen.note(f"{name}: the file is kept by INIT", path.read_bytes() == content)


@scenario
def volatile_state(subject: Subject, place: Path, seen: Seen) -> None:
    """A TPM that goes on where it was: STORE_VOLATILE, the end, INIT."""
    state = place / "state"
    for flags in ("00000000", "00000001"):
        with running(subject, place, *ON) as daemon, daemon.control() as control, daemon.data() as data:
            data.response(EXTEND_PCR_16)
            control.ask("0000000a", 4)
            seen.note(f"{flags}: the store", names(state))
            daemon.process.kill()
            daemon.ended()
        for leftover in ("pid", "ctrl", "data"):
            (place / leftover).unlink(missing_ok=True)
        with running(subject, place) as daemon, daemon.control() as control, daemon.data() as data:
            seen.note(f"{flags}: INIT", control.ask(f"00000002 {flags}", 4))
            seen.note(f"{flags}: PCR 16 is as it was", data.response(READ_PCR_16)[-64:])
            seen.note(f"{flags}: files after INIT", names(state))
            daemon.end()
        seen.note(f"{flags}: files at the end", names(state))
        for path in state.iterdir():
            path.unlink()


@scenario
def another_life(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place, *ON) as daemon:
        with daemon.data() as data:
            data.response(EXTEND_PCR_16)
            seen.note("files while it runs", names(place / "state"))
        daemon.end()
    seen.note("files at the end", names(place / "state"))
    with running(subject, place, "--flags", "not-need-init") as daemon, daemon.data() as data:
        seen.note("Startup(STATE)", data.response(STARTUP_STATE))
        seen.note("PCR_Read", data.response(READ_PCR_16))
        daemon.end()
    seen.note("files after the second", names(place / "state"))
    linear = place / "linear"
    linear.touch()
    with running(subject, place, *ON, "--tpmstate", f"backend-uri=file://{linear}") as daemon:
        with daemon.control() as control:
            seen.note("file://: STORE_VOLATILE", control.ask("0000000a", 4))
        daemon.end()
    seen.note("file://: its head", linear.read_bytes()[:10].hex())
    uri = place / "uri"
    uri.mkdir()
    with running(subject, place, *ON, "--tpmstate", f"backend-uri=dir://{uri}") as daemon:
        with daemon.data() as data:
            data.response(READ_PCR_16)
        daemon.end()
    seen.note("dir://: files", names(uri))
