"""swtpm_ioctl and swtpm_bios: both programs against both daemons."""

from __future__ import annotations

from pathlib import Path

from .comparison import Seen, scenario
from .subject import DEBIAN, Daemon, Ended, Subject, crbd, first_line, run, running, status_text

ON = ("--flags", "not-need-init,startup-clear")

CONTROL = (
    "-c -e -g -C -v -i --stop -s",
    "-c", "-e", "-g", "-b 0", "-b 100", "-b 1x", "-b x", "-l 0", "-l 4", "-l 5", "-l -1", "-l x", "-l 3abc", "-l=0",
    "-l",
    "-r 3", "-r 5", "-r x", "-C", "-v", "-h abc", "-h -", "-h", "--info 1", "--info 0x2", "--info 08", "--info x",
    "--info -1", "--info", "--save permanent PLACE/permanent", "--save volatile PLACE/volatile",
    "--save savestate PLACE/savestate", "--save bogus PLACE/bogus", "--save permanent", "--save permanent -c", "--save",
    "--save permanent PLACE/nosuch/file", "--save permanent PLACE", "--load permanent PLACE/permanent",
    "--load permanent PLACE/nosuch", "--load bogus PLACE/permanent", "--load permanent",
    "--lock-storage 1", "--lock-storage x", "-c -c", "-c -i", "-c extra", "--foo -g", "-stop", "--c", "--sto", "-t",
    "--s",
    "-c=x", "--", "-", "-- -c", "--tcp : -c", "--tcp :x -c", "--tcp 127.0.0.1:1 -c", "--tcp :70000 -c",
    "--tcp nohost.invalid -c", "--tcp", "--unix", "--unix PLACE/nosuch -c", "--tpm-device /dev/null -c",
    "--tpm-device PLACE/nosuch -c",
    "--stop", "-e", "-h abc", "-C", "-v", "-r 3", "-b 3000", "--save permanent PLACE/off",
    "--load permanent PLACE/empty",
    "--load permanent PLACE/permanent", "-i", "-e", "-s",
)  # fmt: skip
"""In this order, on one TPM that is on at first."""

BIOS = (
    "--tpm2", "--tpm2", "--tpm2 -c", "--tpm2 -s", "--tpm2 -d", "--tpm2 -n", "--tpm2 -n -cs", "--tpm2 -n -u",
    "--tpm2 -n -u", "-n", "-o", "-d", "-c -o", "-o -c", "-n -u -cs -ea", "-s -cs", "--t", "-t", "--tpm2=x", "--foo",
    "-e",
    "operand -n -o", "--tcp :x", "--tcp :1", "--unix PLACE/nosuch", "--tpm-device PLACE/nosuch",
    "--tpm-device /dev/null", "--tcp", "--unix",
)  # fmt: skip


def note(seen: Seen, name: str, ended: Ended, place: Path) -> None:
    """Everything that a tool says; of a help text its first line."""
    out = ended.out.replace(str(place), "PLACE")
    if out.count("\n") > 12:
        out = first_line(out, place)
    # glibc says of options what is wrong with the name by which the program was called.
    errors = ended.errors.replace(str(place), "PLACE")
    errors = "\n".join(first_line(line, place) for line in errors.splitlines())
    said = " / ".join(part for part in (out.strip(), errors.strip()) if part).replace("\n", " ; ")
    seen.note(name, f"{status_text(ended.status)}: {said}" if said else status_text(ended.status))


def numbered(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """The texts with names: one that comes again is numbered."""
    return [
        (f"{text} ({texts[:index].count(text) + 1})" if text in texts[:index] else text, text)
        for index, text in enumerate(texts)
    ]


def play_control(seen: Seen, tools: Subject, daemon: Daemon) -> None:
    """All of CONTROL against a running daemon."""
    place = daemon.place
    (place / "empty").touch()
    for name, text in numbered(CONTROL):
        arguments = text.replace("PLACE", str(place)).split()
        target = (
            () if any(word in text for word in ("--tcp", "--unix", "--tpm-device")) else ("--unix", f"{place}/ctrl")
        )
        note(seen, name, run(tools, "swtpm_ioctl", *target, *arguments, stdin=b"from stdin"), place)
    for name in ("permanent", "volatile", "savestate", "off", "bogus"):
        path = place / name
        seen.note(
            f"the file {name}",
            f"{path.stat().st_mode & 0o777:o}, holds {bool(path.stat().st_size)}" if path.exists() else "-",
        )


def play_bios(seen: Seen, tools: Subject, daemon: Daemon) -> None:
    """All of BIOS against a running daemon."""
    place = daemon.place
    for name, text in numbered(BIOS):
        arguments = text.replace("PLACE", str(place)).split()
        target = (
            () if any(word in text for word in ("--tcp", "--unix", "--tpm-device")) else ("--unix", f"{place}/data")
        )
        note(seen, name, run(tools, "swtpm_bios", *target, *arguments), place)
    for name, variables in {
        "TPM_DEVICE": {"TPM_DEVICE": str(place / "nosuch")},
        "TCSD_USE_TCP_DEVICE": {"TCSD_USE_TCP_DEVICE": "1", "TCSD_TCP_DEVICE_PORT": "1"},
        "TCSD_TCP_DEVICE_HOSTNAME": {"TCSD_USE_TCP_DEVICE": "1", "TCSD_TCP_DEVICE_HOSTNAME": "nohost.invalid"},
    }.items():
        note(seen, name, run(tools, "swtpm_bios", "--tpm2", environment=variables), place)


@scenario
def swtpm_ioctl_against_swtpm(subject: Subject, place: Path, seen: Seen) -> None:
    """Both tools against Debian's swtpm."""
    with running(DEBIAN, place, *ON) as daemon:
        play_control(seen, subject, daemon)
        seen.note("the end of swtpm", daemon.ended())


@scenario
def swtpm_ioctl_against_crbd(subject: Subject, place: Path, seen: Seen) -> None:
    """Both tools against crbd."""
    with running(crbd(), place, *ON) as daemon:
        play_control(seen, subject, daemon)
        seen.note("the end of swtpm", daemon.ended())


@scenario
def swtpm_ioctl_of_swtpm(subject: Subject, place: Path, seen: Seen) -> None:
    """Debian's tool against both."""
    with running(subject, place, *ON) as daemon:
        play_control(seen, DEBIAN, daemon)
        seen.note("the end of swtpm", daemon.ended())


@scenario
def swtpm_bios_against_swtpm(subject: Subject, place: Path, seen: Seen) -> None:
    """Both tools against Debian's swtpm."""
    with running(DEBIAN, place, "--flags", "not-need-init") as daemon:
        play_bios(seen, subject, daemon)


@scenario
def swtpm_bios_against_crbd(subject: Subject, place: Path, seen: Seen) -> None:
    """Both tools against crbd."""
    with running(crbd(), place, "--flags", "not-need-init") as daemon:
        play_bios(seen, subject, daemon)


@scenario
def swtpm_bios_of_swtpm(subject: Subject, place: Path, seen: Seen) -> None:
    """Debian's tool against both."""
    with running(subject, place, "--flags", "not-need-init") as daemon:
        play_bios(seen, DEBIAN, daemon)
