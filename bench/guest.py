"""What a TPM command takes in a guest: crbd over vfio-user against QEMU's tpm-crb with swtpm. See README.md.

Usage: PYTHONPATH=. python bench/guest.py [--rounds N] [--count N] [--check] [--dir DIR] [--help]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import commands
from daemons import DidNotRunError, load_average, unwind_at_sigterm
from figures import Summary, percentile, table

from tests.e2e.daemon import DaemonKind, tpm_daemon
from tests.e2e.qemu import Guest, GuestImage
from tests.e2e.vfio_bed import Bed, Machine, Qemu11, served_daemon

HERE = Path(__file__).resolve().parent
SWTPM = "tpm-crb, swtpm"
CRBD_CRB = "tpm-crb, crbd"
CRBD = "vfio-user, crbd"
SUBJECTS = (SWTPM, CRBD_CRB, CRBD)
OPERATIONS = {
    "GetRandom(16)": commands.get_random(16),
    "Hash SHA-256 of 1 KiB": commands.hash_sha256(bytes(range(256)) * 4),
}
LIMIT = 0.7
"""For crbd over vfio-user: p50 as a multiple of swtpm's."""
WARM_UP = 5
"""Commands of each batch that are not counted."""
BATCH_SECONDS = 120.0


@dataclass(slots=True)
class Contender:
    """A guest, and by operation the batches of times in it, in nanoseconds."""

    guest: Guest
    batches: dict[str, list[list[int]]] = field(default_factory=lambda: {operation: [] for operation in OPERATIONS})

    def measure(self, operation: str, count: int) -> None:
        """One batch. Raises DidNotRunError."""
        script = f"/tpm_time {count + WARM_UP} {OPERATIONS[operation].hex()}"
        output = self.guest.run(script, BATCH_SECONDS)
        if output.status:
            raise DidNotRunError(f"{operation}: {output.text.strip()}")
        self.batches[operation].append([int(line) for line in output.text.split()][WARM_UP:])


def image_with_program(scratch: Path) -> GuestImage:
    """The test guest with tpm_time in it. Raises DidNotRunError."""
    program = scratch / "tpm_time"
    made = subprocess.run(
        ["cc", "-O2", "-static", "-o", program, HERE / "tpm_time.c"], check=False, capture_output=True, text=True
    )
    if made.returncode:
        raise DidNotRunError(f"cc failed: {made.stderr.strip()}")
    guest_image = HERE.parent / "scripts" / "guest-image"
    said = subprocess.run([sys.executable, guest_image], check=True, stdout=subprocess.PIPE, text=True).stdout
    paths = {key: Path(value) for key, value in (line.split("=", 1) for line in said.splitlines())}
    # The kernel unpacks one archive after the other.
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=b"tpm_time\n", cwd=scratch, check=True, capture_output=True
    ).stdout
    initrd = scratch / "initrd"
    initrd.write_bytes(paths["initrd"].read_bytes() + archive)
    return GuestImage(paths["kernel"], initrd)


@contextmanager
def contender(subject: str, machine: Machine, home: Path) -> Iterator[Contender]:
    """A booted guest with that TPM."""
    home.mkdir()
    if subject == CRBD:
        with served_daemon(home), machine.guest(Bed.SEABIOS, home) as running:
            yield Contender(running)
        return
    kind = DaemonKind.SWTPM if subject == SWTPM else DaemonKind.CRBD
    with tpm_daemon(home, kind=kind) as daemon:
        device = ["-chardev", f"socket,id=tpm,path={daemon.control}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"]
        with machine.guest_with([*device, "-device", "tpm-crb,tpmdev=tpm0"], Bed.SEABIOS, home) as running:
            yield Contender(running)


def report(contenders: dict[str, Contender]) -> bool:
    """Print the figures; whether crbd is within its limit."""
    good = True
    rows = []
    for operation in OPERATIONS:
        for subject, each in contenders.items():
            batches = each.batches[operation]
            summary = Summary.of([sample for batch in batches for sample in batch]).scaled(1e-3)
            yardstick = contenders[SWTPM].batches[operation]
            ratios = sorted(
                Summary.of(own).p50 / Summary.of(other).p50 for own, other in zip(batches, yardstick, strict=True)
            )
            ratio = percentile(ratios, 0.5)
            spread = f"{percentile(ratios, 0.25):.2f}-{percentile(ratios, 0.75):.2f}"
            rows.append(
                [
                    operation,
                    subject,
                    *(f"{value:.0f}" for value in (summary.p50, summary.p90, summary.p99)),
                    f"{ratio:.2f}",
                    spread,
                ]
            )
            good = good and (subject != CRBD or ratio <= LIMIT)
    print(table(["in the guest, µs", "TPM", "p50", "p90", "p99", "x swtpm", "quartiles"], rows))
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="batches a subject and operation (default %(default)s)")
    parser.add_argument("--count", type=int, default=100, help="commands a batch (default %(default)s)")
    parser.add_argument("--check", action="store_true", help=f"exit status 1 if crbd's p50 is above {LIMIT} x swtpm's")
    parser.add_argument("--dir", default="/var/tmp", help="where the states live while measured (%(default)s)")
    options = parser.parse_args(arguments)
    unwind_at_sigterm()
    qemu = Qemu11.find()
    missing = [name for name in ("cc", "cpio", "swtpm") if shutil.which(name) is None]
    if qemu is None or missing:
        print(
            f"guest: missing: {', '.join(missing) or 'QEMU 11 (root makes it with scripts/qemu11-chroot)'}",
            file=sys.stderr,
        )
        return 1
    print(f"load before:     {load_average()}")
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch, ExitStack() as running:
            machine = Machine(qemu, image_with_program(Path(scratch)))
            contenders = {}
            for number, subject in enumerate(SUBJECTS):
                home = Path(scratch) / str(number)
                contenders[subject] = running.enter_context(contender(subject, machine, home))
            for number in range(options.rounds):
                # Each round begins with another one.
                turn = SUBJECTS[number % len(SUBJECTS) :] + SUBJECTS[: number % len(SUBJECTS)]
                for operation in OPERATIONS:
                    for subject in turn:
                        contenders[subject].measure(operation, options.count)
    except (DidNotRunError, OSError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    print(f"load after:      {load_average()}\n")
    good = report(contenders)
    return 1 if options.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())
