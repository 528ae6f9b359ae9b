"""The process: files and their modes, signals, how it ends and when."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from .commands import GET_RANDOM, READ_PCR_16, STARTUP_STATE
from .comparison import Seen, scenario
from .subject import (
    REGISTERS,
    SILENCE,
    Channel,
    Daemon,
    Subject,
    first_line,
    has_text,
    modes,
    run,
    running,
    start,
    told,
    wait_until,
)

ON = ("--flags", "not-need-init,startup-clear")


@scenario
def files_and_modes(subject: Subject, place: Path, seen: Seen) -> None:
    cases = {
        "no option": (),
        "modes": (
            "--ctrl", "type=unixio,path=PLACE/ctrl,mode=0600", "--server", "type=unixio,path=PLACE/data,mode=0660",
            "--tpmstate", "dir=PLACE/state,mode=0600",
        ),
        "log": ("--log", "file=PLACE/log,level=1"),
        "open mode": ("--ctrl", "type=unixio,path=PLACE/ctrl,mode=0777", "--tpmstate", "dir=PLACE/state,mode=0666"),
    }  # fmt: skip
    for name, options in cases.items():
        for mask in (0o22, 0o77, 0):
            here = place / f"{name.replace(' ', '-')}-{mask:o}"
            here.mkdir()
            given = [option.replace("PLACE", str(here)) for option in options]
            sockets = " ".join(
                kind for kind, option in (("ctrl", "--ctrl"), ("data", "--server")) if option not in given
            )
            with running(subject, here, *ON, *given, sockets=sockets, mask=mask) as daemon:
                (here / "errors").unlink()
                with daemon.control() as control:
                    control.ask("0000000a", 4)  # STORE_VOLATILE
                seen.note(f"{name}, umask {mask:03o}", modes(here))
                pid = (here / "pid").read_text()
                seen.note(f"{name}, umask {mask:03o}: the pid file", pid.replace(str(daemon.process.pid), "PID"))
                seen.note(f"{name}, umask {mask:03o}: the end", daemon.end())
            seen.note(f"{name}, umask {mask:03o}: afterwards", modes(here))
            registers = here / "state" / REGISTERS
            kept = f"{registers.stat().st_mode & 0o7777:04o}" if registers.exists() else "-"
            seen.note(f"{name}, umask {mask:03o}: {REGISTERS}", kept)


@scenario
def signals(subject: Subject, place: Path, seen: Seen) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE, signal.SIGQUIT):
        for connected in (False, True):
            here = place / f"{number.name}-{connected}"
            here.mkdir()
            with running(subject, here, *ON) as daemon:
                with daemon.data() as data:
                    data.response(GET_RANDOM)  # swtpm's TPM is ready only some time after its pid file
                clients = [daemon.control(), daemon.data()] if connected else []
                if clients:
                    clients[1].response(GET_RANDOM)
                name = f"{number.name}{' with clients' if connected else ''}"
                if number is signal.SIGPIPE:
                    daemon.process.send_signal(number)
                    with Channel(here / "ctrl") as other:
                        seen.note(f"{name}: serves", "yes" if clients else other.ask("0000000f", 8))
                    daemon.process.send_signal(signal.SIGTERM)
                    seen.note(f"{name} and SIGTERM", daemon.ended())
                else:
                    seen.note(name, daemon.end(number))
                for client in clients:
                    client.socket.close()
            (here / "errors").unlink()
            seen.note(f"{name}: files", modes(here))


@scenario
def shutdown_request(subject: Subject, place: Path, seen: Seen) -> None:
    with running(subject, place, *ON) as daemon:
        with daemon.data() as data:
            data.response(GET_RANDOM)
            with daemon.control() as control:
                seen.note("SHUTDOWN", control.ask("00000003", 4))
                seen.note("the end", daemon.ended())
                seen.note("the control connection", control.answer())
            seen.note("the data connection", data.answer())
        (place / "errors").unlink()
        seen.note("files", modes(place))


@scenario
def termination(subject: Subject, place: Path, seen: Seen) -> None:
    """Which connection's end ends the process."""

    def alive(daemon: Daemon) -> str:
        try:
            return f"status {daemon.process.wait(SILENCE)}"
        except subprocess.TimeoutExpired:
            return "serves on"

    for name, options in {
        "no option": (),
        "-t": ("-t",),
        "--terminate": ("--terminate",),
        "--ctrl terminate": ("--ctrl", "type=unixio,path=PLACE/ctrl,terminate"),
        "--server disconnect": ("--server", "type=unixio,path=PLACE/data,disconnect"),
    }.items():
        for ending in ("data", "control"):
            here = place / f"{name.replace(' ', '-')}-{ending}"
            here.mkdir()
            given = [option.replace("PLACE", str(here)) for option in options]
            sockets = " ".join(
                kind for kind, option in (("ctrl", "--ctrl"), ("data", "--server")) if option not in given
            )
            try:
                with running(subject, here, *ON, *given, sockets=sockets) as daemon:
                    if ending == "data":
                        with daemon.data() as data:
                            seen.note(f"{name}, data: a response", data.response(GET_RANDOM)[:20])
                            seen.note(f"{name}, data: a second", data.response(GET_RANDOM, SILENCE)[:20])
                    else:
                        with daemon.control() as control:
                            control.ask("0000000f", 8)
                    seen.note(f"{name}: the {ending} client leaves", alive(daemon))
            except AssertionError:
                seen.note(f"{name}, {ending}: the start", "refused")


@scenario
def descriptors(subject: Subject, place: Path, seen: Seen) -> None:
    """Sockets that are handed over: connected for the data channel, connected or listening for the control channel."""
    for name in ("--fd", "--server fd"):
        here = place / name.strip("-").replace(" ", "-")
        here.mkdir()
        ours, theirs = socket.socketpair()
        option = ("--fd", str(theirs.fileno())) if name == "--fd" else ("--server", f"type=unixio,fd={theirs.fileno()}")
        with theirs, running(subject, here, *ON, *option, sockets="ctrl", fds=(theirs.fileno(),)) as daemon:
            theirs.close()
            with Channel(ours) as data:
                seen.note(f"{name}: PCR_Read", data.response(READ_PCR_16, SILENCE))
            seen.note(f"{name}: the client leaves", daemon.ended())
    here = place / "clientfd"
    here.mkdir()
    ours, theirs = socket.socketpair()
    option = ("--ctrl", f"type=unixio,clientfd={theirs.fileno()}")
    with theirs, running(subject, here, *ON, *option, sockets="data", fds=(theirs.fileno(),)) as daemon:
        theirs.close()
        with Channel(ours) as control:
            seen.note("clientfd: GET_CONFIG", control.ask("0000000f", 8))
        with daemon.data() as data:
            seen.note("clientfd: PCR_Read when the control client is gone", data.response(READ_PCR_16, SILENCE))
        seen.note("clientfd: the end", daemon.end())
    here = place / "listening"
    here.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(here / "ctrl"))
        listening.listen()
        option = ("--ctrl", f"type=unixio,fd={listening.fileno()}")
        with running(subject, here, *ON, *option, sockets="data", fds=(listening.fileno(),)) as daemon:
            for client in ("first", "second"):
                with daemon.control() as control:
                    seen.note(f"--ctrl fd: GET_CONFIG of the {client}", control.ask("0000000f", 8, SILENCE))
            seen.note("--ctrl fd: the end", daemon.end())
        (here / "errors").unlink()
        seen.note("--ctrl fd: files", modes(here))


@scenario
def what_is_at_the_socket_path(subject: Subject, place: Path, seen: Seen) -> None:
    for kind in ("stale socket", "file", "directory", "symbolic link"):
        here = place / kind.replace(" ", "-")
        here.mkdir()
        (here / "state").mkdir()
        path = here / "ctrl"
        match kind:
            case "stale socket":
                with socket.socket(socket.AF_UNIX) as stale:
                    stale.bind(str(path))
            case "file":
                path.write_text("mine")
            case "directory":
                path.mkdir()
            case _:
                (here / "target").write_text("mine")
                path.symlink_to(here / "target")
        try:
            with running(subject, here, *ON) as daemon:
                with daemon.control() as control:
                    seen.note(f"{kind}: GET_CONFIG", control.ask("0000000f", 8))
                (here / "errors").unlink()
                seen.note(f"{kind}: files", modes(here))
        except AssertionError as error:
            seen.note(f"{kind}: refused", str(error).splitlines()[0].replace(str(here), "PLACE"))
    if has_text(place / "symbolic-link" / "target"):
        seen.note("symbolic link: its target", (place / "symbolic-link" / "target").read_text())


@scenario
def a_locked_directory(subject: Subject, place: Path, seen: Seen) -> None:
    second = place / "second"
    second.mkdir()
    tail = ("--tpmstate", f"dir={place / 'state'}", "--server", f"type=unixio,path={second}/data", "--ctrl",
            f"type=unixio,path={second}/ctrl")  # fmt: skip
    with running(subject, place, *ON):
        seen.note("powered on at the start", told(start(subject, second, "socket", "--tpm2", *tail, *ON), place))
        seen.note("powered on at the start: files", modes(second))
        try:
            with running(subject, second, *tail, sockets="") as daemon, daemon.control() as control:
                seen.note("INIT", control.ask("00000002 00000000", 4))
                seen.note("GET_CONFIG then", control.ask("0000000f", 8))
        except AssertionError as error:
            seen.note("powered off at the start", first_line(str(error), place))


@scenario
def automatic_shutdown(subject: Subject, place: Path, seen: Seen) -> None:
    """Whether Startup(STATE) is possible: it is where a Shutdown(STATE) went before."""
    for name in ("SIGTERM", "SIGTERM, disable-auto-shutdown", "SIGKILL", "SHUTDOWN", "STOP", "INIT"):
        here = place / name.replace(", ", "-")
        here.mkdir()
        flags = "not-need-init,startup-clear" + (",disable-auto-shutdown" if "disable" in name else "")
        try:
            with running(subject, here, "--flags", flags) as daemon:
                with daemon.control() as control, daemon.data() as data:
                    data.response(GET_RANDOM)
                    match name:
                        case "SHUTDOWN":
                            control.ask("00000003", 4)
                            daemon.ended()
                        case "STOP":
                            control.ask("0000000e", 4)
                            control.ask("00000002 00000000", 4)
                        case "INIT":
                            control.ask("00000002 00000000", 4)
                    if name in ("STOP", "INIT"):
                        seen.note(f"{name}: Startup(STATE)", data.response(STARTUP_STATE))
                        continue
                daemon.end(signal.SIGKILL if name == "SIGKILL" else signal.SIGTERM)
        except AssertionError as error:
            seen.note(f"{name}: refused", str(error).splitlines()[0])
            continue
        for leftover in ("pid", "ctrl", "data"):
            (here / leftover).unlink(missing_ok=True)
        with running(subject, here, "--flags", "not-need-init") as daemon, daemon.data() as data:
            seen.note(f"{name}: Startup(STATE)", data.response(STARTUP_STATE))


@scenario
def daemonized(subject: Subject, place: Path, seen: Seen) -> None:
    (place / "state").mkdir()
    paths = (
        "--tpmstate",
        f"dir={place}/state",
        "--ctrl",
        f"type=unixio,path={place}/ctrl",
        "--pid",
        f"file={place}/pid",
    )
    seen.note("-d", told(run(subject, "swtpm", "socket", "--tpm2", "-d", *paths, *ON), place))
    wait_until(lambda: has_text(place / "pid"), "the pid file")
    pid = int((place / "pid").read_text())
    with Channel(place / "ctrl") as control:
        seen.note("GET_CONFIG", control.ask("0000000f", 8))
    seen.note("its directory", Path(f"/proc/{pid}/cwd").readlink())
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seen.note("leads its session", int(fields[3]) == pid)
    seen.note("files", modes(place))
    targets = {
        name: os.readlink(f"/proc/{pid}/fd/{name}").partition(":")[0]
        for name in ("0", "1", "2")
        if Path(f"/proc/{pid}/fd/{name}").exists()
    }
    seen.note("standard files", targets)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or not (place / "pid").exists(), "the end")
    seen.note("files afterwards", modes(place))
    failing = ("--tpmstate", f"dir={place}/nosuch", "--ctrl", f"type=unixio,path={place}/c2")
    seen.note("-d that fails", told(run(subject, "swtpm", "socket", "--tpm2", "-d", *failing, *ON), place))


@scenario
def environment(subject: Subject, place: Path, seen: Seen) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    state = place / "state"
    state.mkdir()
    options = ("socket", "--tpm2", *ON)
    for name, variables in {
        "nothing": {"TPM_PATH": "", "TPM_PORT": ""},
        "TPM_PATH alone": {"TPM_PATH": str(state), "TPM_PORT": ""},
        "TPM_PORT=x": {"TPM_PATH": str(state), "TPM_PORT": "x"},
        "TPM_PORT=70000": {"TPM_PATH": str(state), "TPM_PORT": "70000"},
        "both": {"TPM_PATH": str(state), "TPM_PORT": port},
    }.items():
        for server in ("", "--server type=tcp"):
            ended = start(subject, place, *options, *server.split(), environment=variables)
            seen.note(f"{name}, {server or 'no option'}", told(ended, place))
            for path in state.iterdir():
                path.unlink()
