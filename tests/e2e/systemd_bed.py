"""A machine with systemd as process 1: a Debian 12 in systemd-nspawn, with the checkout's wheel and units installed.

Its root is never written to (scripts/systemd-root makes it once); what it changes is gone with it. Its process 1 is
reached from outside by nsenter, and its sockets by /proc/PID/root. On a host with cgroup v1 settings that need v2
(IPAddressDeny= among them) do nothing in there.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .daemon import dies_with_us
from .releases import PRESENT, wheel_of
from .waiting import Deadline, DeadlineError

CHECKOUT = Path(__file__).resolve().parents[2]
UNITS = CHECKOUT / "systemd"
BOOT_SECONDS = 90.0
COMMAND_SECONDS = 90.0
_PAUSE = 0.05
_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
_INSTALL = """
set -e
/opt/crbd/bin/pip install --quiet --no-deps --no-index --no-warn-script-location /mnt/crbd/*.whl
cp /mnt/crbd/*.service /mnt/crbd/*.socket /mnt/crbd/*.target /usr/lib/systemd/system/
cp /mnt/crbd/crbd.sysusers /usr/lib/sysusers.d/crbd.conf
systemd-sysusers
systemctl daemon-reload
mkdir -p /etc/crbd
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """One that has booted. `leader` is its process 1, as the host numbers it."""

    leader: int

    def run(self, command: str, *, status: int | None = 0) -> str:
        """Run it in the machine's shell; what it printed. Fails where it ends with another status (None: any)."""
        entered = [
            "nsenter",
            "-t",
            str(self.leader),
            "-m",
            "-p",
            "-u",
            "-i",
            "-n",
            "env",
            "-i",
            _PATH,
            "LC_ALL=C.UTF-8",
        ]
        done = subprocess.run(
            [*entered, "sh", "-c", command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        if status is not None:
            assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{self.journal()}"
        return done.stdout.strip()

    def path(self, inside: str) -> Path:
        """One of its files, seen from here."""
        return Path(f"/proc/{self.leader}/root") / inside.lstrip("/")

    def property(self, unit: str, name: str) -> str:
        """What systemd says of a unit."""
        return self.run(f"systemctl show --property={name} --value {unit}")

    def wait_until(self, command: str) -> None:
        """Return when the command ends with status 0."""
        deadline = Deadline(COMMAND_SECONDS)
        while not self.run(f"{command} >/dev/null 2>&1 && echo it does || true").endswith("it does"):
            if deadline.passed:
                raise DeadlineError(f"{command}: not within {COMMAND_SECONDS:.0f} s\n{self.journal()}")

    def journal(self) -> str:
        """What crbd and systemd have written."""
        return self.run("journalctl --no-pager --quiet -o cat | tail -n 60", status=None)


@contextmanager
def machine(place: Path) -> Iterator[Machine]:
    """One with crbd installed and nothing started; `place` is for what goes in and for its console."""
    done = subprocess.run([CHECKOUT / "scripts" / "systemd-root"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = place / "given"
    given.mkdir()
    for file in (wheel_of("HEAD", PRESENT), *UNITS.iterdir()):
        shutil.copy(file, given)
    command = ["systemd-nspawn", "-D", done.stdout.strip(), "--volatile=overlay", "--boot", "--console=pipe"]
    command += ["--keep-unit", "--register=no", "--private-network", f"--machine={place.name.replace('_', '-')}"]
    command += [f"--bind-ro={given}:/mnt/crbd"]
    console = place / "console"
    with (
        console.open("wb") as log,
        subprocess.Popen(
            dies_with_us(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ) as nspawn,
    ):
        try:
            booted = Machine(_leader(nspawn, console))
            _wait_for_boot(booted, nspawn, console)
            booted.run(_INSTALL)
            yield booted
        finally:
            # Its process 1 takes all others along, and nspawn cleans up after it.
            nspawn.send_signal(signal.SIGTERM)
            try:
                nspawn.wait(30)
            except subprocess.TimeoutExpired:
                nspawn.kill()


def _leader(nspawn: subprocess.Popen[bytes], console: Path) -> int:
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    deadline = Deadline(BOOT_SECONDS)
    while nspawn.poll() is None and not deadline.passed:
        # What nspawn starts before it is gone as soon as it is seen.
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        time.sleep(_PAUSE)
    raise DeadlineError(f"systemd-nspawn does not boot:\n{console.read_text(errors='replace')}")


def _wait_for_boot(booted: Machine, nspawn: subprocess.Popen[bytes], console: Path) -> None:
    deadline = Deadline(BOOT_SECONDS)
    while booted.run("systemctl is-system-running", status=None) not in ("running", "degraded"):
        if nspawn.poll() is not None or deadline.passed:
            raise DeadlineError(f"systemd does not start:\n{console.read_text(errors='replace')}")
        time.sleep(_PAUSE)
