"""Command lines that are refused, and those that print something and end."""

from __future__ import annotations

import json
from pathlib import Path

from .comparison import Seen, scenario
from .subject import RUNS, Ended, Subject, first_line, names, run, running, start, status_text, told

KEY = "0123456789abcdef0123456789abcdef"

REFUSED = (
    "--foo",
    "--ctrl",
    "--ctrl foo",
    "--ctrl type=foo",
    "--ctrl type=unixio",
    "--ctrl type=unixio,path=PLACE/nosuch/ctrl",
    "--ctrl type=unixio,path=PLACE/c,mode=9",
    "--ctrl type=unixio,path=PLACE/c,uid=nosuchuser",
    "--ctrl type=unixio,path=PLACE/c,gid=nosuchgroup",
    "--ctrl type=unixio,clientfd=99",
    "--ctrl type=unixio,fd=99",
    "--ctrl type=unixio,fd=x",
    "--ctrl type=unixio,fd=0,clientfd=0",
    "--ctrl type=tcp",
    "--ctrl type=tcp,port=x",
    "--ctrl type=tcp,port=70000",
    "--ctrl type=tcp,port=-1",
    "--ctrl type=tcp,port=40001,bindaddr=300.1.1.1",
    "--ctrl type=tcp,port=40001,bindaddr=192.0.2.1",
    "--ctrl type=unixio,path=PLACE/c,foo",
    "--server type=foo",
    "--server type=unixio",
    "--server type=unixio,path=PLACE/nosuch/data",
    "--server type=tcp",
    "--server type=tcp,port=x",
    "--server type=tcp,port=70000",
    "--server type=tcp,fd=99",
    "--server type=tcp,port=40001,ifname=nosuch0,bindaddr=fe80::1",
    "--server foo",
    "--fd 99",
    "--fd x",
    "--port 70000",
    "--port x",
    "-p",
    "--flags foo",
    "--flags startup-foo",
    "--flags startup-clear,startup-state --server type=unixio,path=PLACE/d",
    "--flags startup-deactivated",
    "--locality foo",
    "--tpmstate foo",
    "--tpmstate dir=PLACE/nosuch",
    "--tpmstate mode=0600",
    "--tpmstate dir=PLACE/state,mode=9",
    "--tpmstate dir=PLACE/state,mode=0x1ff",
    "--tpmstate backend-uri=foo://PLACE",
    "--tpmstate backend-uri=dir://PLACE/nosuch",
    "--tpmstate backend-uri=file://PLACE/nosuch",
    "--tpmstate backend-uri=file://PLACE/state",
    "--key foo",
    "--key file=PLACE/nosuch",
    "--key file=PLACE/short",
    "--key file=PLACE/key,mode=foo",
    "--key file=PLACE/key,format=foo",
    "--key file=PLACE/key,mode=aes-256-cbc",
    "--key pwdfile=PLACE/nosuch",
    "--key pwdfile=PLACE/empty",
    "--key pwdfile=PLACE/key,kdf=foo",
    "--key pwdfd=99",
    "--key fd=99",
    "--key mode=aes-cbc",
    "--migration-key file=PLACE/nosuch",
    "--migration-key foo",
    "--log foo",
    "--log file=PLACE/nosuch/log",
    "--log file=PLACE/log,level=x",
    "--log fd=99",
    "--pid foo",
    "--pid file=PLACE/nosuch/pid",
    "--pid fd=99",
    "--pid fd=x",
    "--runas nosuchuser",
    "--seccomp action=foo",
    "--seccomp foo",
    "operand --flags foo",
)


@scenario
def refused_options(subject: Subject, place: Path, seen: Seen) -> None:
    """Each of these is added to a command line that could be served."""
    (place / "state").mkdir()
    (place / "short").write_text("0123")
    (place / "key").write_text(KEY)
    (place / "empty").write_text("")
    for text in REFUSED:
        arguments = text.replace("PLACE", str(place)).split()
        base = [] if "--tpmstate" in text else ["--tpmstate", f"dir={place / 'state'}"]
        base += [] if "type=" in text or "fd" in text or "port" in text else ["--ctrl", f"type=unixio,path={place}/c"]
        ended = start(subject, place, "socket", "--tpm2", *base, *arguments)
        seen.note(text, told(ended, place))
        if ended.status != RUNS:
            seen.note(f"{text}: files", names(place / "state"))
        for path in (place / "state").iterdir():
            path.unlink()


@scenario
def incomplete_command_lines(subject: Subject, place: Path, seen: Seen) -> None:
    for text in (
        "",
        "foo",
        "--foo",
        "-v",
        "--tpm2",
        "socket",
        "socket --tpm2",
        "socket --tpm2 --tpmstate dir=PLACE",
        "socket --tpm2 --server type=unixio,path=PLACE/d",
        "socket --tpm2 --ctrl type=unixio,path=PLACE/c",
        "socket --tpm2 --tpmstate dir=PLACE --flags startup-clear",
        "chardev",
        "chardev --tpm2",
        "cuse",
        "cuse --help",
    ):
        arguments = text.replace("PLACE", str(place)).split()
        ended = start(subject, place, *arguments, environment={"TPM_PATH": ""})
        seen.note(f"swtpm {text}".strip(), told(ended, place))


@scenario
def texts(subject: Subject, place: Path, seen: Seen) -> None:
    for text in ("--help", "-h", "--version", "socket --help", "socket -h", "socket --version", "chardev --help"):
        ended = run(subject, "swtpm", *text.split())
        seen.note(f"{text}: status", status_text(ended.status))
        seen.note(f"{text}: first line", first_line(ended.out, place))
        seen.note(f"{text}: errors", first_line(ended.errors, place) or "none")
    for program, texts in (("swtpm_ioctl", ("--help", "--version")), ("swtpm_bios", ("-h", "-v", "--help"))):
        for text in texts:
            ended = run(subject, program, text)
            seen.note(f"{program} {text}: status", status_text(ended.status))
            seen.note(f"{program} {text}: first line", first_line(ended.out, place))
            seen.note(f"{program} {text}: errors", first_line(ended.errors, place) or "none")


@scenario
def capabilities(subject: Subject, place: Path, seen: Seen) -> None:
    for text in ("socket --tpm2 --print-capabilities", "socket --print-capabilities"):
        ended = run(subject, "swtpm", *text.split())
        seen.note(f"{text}: status", status_text(ended.status))
        seen.note(f"{text}: lines", ended.out.count("\n"))
        told = json.loads(ended.out) if ended.out.startswith("{") else {}
        seen.note(f"{text}: keys", ", ".join(told))
        seen.note(f"{text}: type", told.get("type"))
        seen.note(f"{text}: version", told.get("version"))
        for feature in told.get("features", []):
            seen.note(f"{text}: {feature}", "listed")


@scenario
def print_states(subject: Subject, place: Path, seen: Seen) -> None:
    state = place / "state"
    arguments = ("socket", "--tpm2", "--print-states", "--tpmstate", f"dir={state}")

    def note(name: str, ended: Ended) -> None:
        seen.note(name, f"{status_text(ended.status)}: {ended.out}")
        seen.note(f"{name}: files", names(state) if state.exists() else "-")

    note("no directory", run(subject, "swtpm", *arguments))
    state.mkdir()
    note("no state", run(subject, "swtpm", *arguments))
    with running(subject, place, "--flags", "not-need-init,startup-clear") as daemon:
        note("while another runs", run(subject, "swtpm", *arguments))
        with daemon.control() as control:
            control.ask("0000000a", 4)  # STORE_VOLATILE
            note("with volatile state", run(subject, "swtpm", *arguments))
        daemon.end()
    note("with state", run(subject, "swtpm", *arguments))
    (state / "tpm2-00.permall").write_bytes(b"")
    note("with an empty file", run(subject, "swtpm", *arguments))
    note("no option", run(subject, "swtpm", "socket", "--tpm2", "--print-states", environment={"TPM_PATH": ""}))
    note("by TPM_PATH", run(subject, "swtpm", *arguments[:3], environment={"TPM_PATH": str(state)}))
