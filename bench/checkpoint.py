"""What `crbd serve --checkpoint every-command` costs: round trips beside the same daemon without checkpoints.

Usage: python bench/checkpoint.py [--rounds N] [--commands N] [--dir DIR] [--help]

Both daemons run at once, on real disks; batches of the same command alternate between them, and a ratio is that of two
neighbouring batches. The client and both daemons share one CPU, as in bench/roundtrip.py. A bare pwrite and fdatasync
of the same size stands beside it: what the disk alone takes.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from figures import Summary, percentile, table

PATIENCE = 20.0
"""Seconds for a start."""
DOCUMENT = 15_000
"""Bytes of a document with volatile state, about."""


def pcr_extend() -> bytes:
    """TPM2_PCR_Extend of PCR 16, SHA-256 (Part 3, 22.2), with an empty password."""
    password = struct.pack(">IHBH", 0x40000009, 0, 0, 0)
    body = struct.pack(">II", 16, len(password)) + password + struct.pack(">IH", 1, 0x000B) + bytes(32)
    return struct.pack(">HII", 0x8002, 10 + len(body), 0x182) + body


def get_random() -> bytes:
    """TPM2_GetRandom of 16 bytes (Part 3, 16.1)."""
    return struct.pack(">HIIH", 0x8001, 12, 0x17B, 16)


def pcr_read() -> bytes:
    """TPM2_PCR_Read of PCR 16 (Part 3, 22.4): changes nothing, and so makes no checkpoint."""
    return struct.pack(">HIIIHB3s", 0x8001, 20, 0x17E, 1, 0x000B, 3, bytes((0, 0, 1)))


@contextmanager
def daemon(scratch: Path, name: str, *options: str) -> Iterator[socket.socket]:
    """A started TPM, and a connection to it."""
    place = scratch / name
    place.mkdir()
    command = [sys.executable, "-m", "crbd", "serve", "--create", "--state", str(place / "tpm")]
    command += ["--data", f"unix:{place}/data", "--pid", str(place / "pid"), "--flags", "startup-clear", *options]
    with subprocess.Popen(command) as process, socket.socket(socket.AF_UNIX) as client:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (place / "pid").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"checkpoint: {' '.join(command)} did not start")
                time.sleep(0.01)
            client.connect(str(place / "data"))
            yield client
        finally:
            process.terminate()


def batch(client: socket.socket, command: bytes, count: int) -> list[int]:
    """Nanoseconds of each round trip."""
    samples = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        client.sendall(command)
        response = client.recv(4096)
        samples.append(time.perf_counter_ns() - begin)
        if response[6:10] != bytes(4):
            raise SystemExit(f"checkpoint: a command was answered with {response[6:10].hex()}")
    return samples


def bare(path: Path, count: int) -> list[int]:
    """Nanoseconds of writing as much to alternating places of a file, and syncing it."""
    samples, data = [], os.urandom(DOCUMENT)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, bytes(1 << 17), 0)
    os.fsync(descriptor)
    for number in range(count):
        begin = time.perf_counter_ns()
        os.pwrite(descriptor, data, number % 2 << 16)
        os.fdatasync(descriptor)
        samples.append(time.perf_counter_ns() - begin)
    os.close(descriptor)
    return samples


def main() -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--commands", type=int, default=50, help="a batch (default %(default)s)")
    parser.add_argument("--dir", default="/var/tmp", help="where the states live: a real disk (default %(default)s)")
    options = parser.parse_args()
    commands = {"PCR_Extend": pcr_extend(), "GetRandom": get_random(), "PCR_Read": pcr_read()}
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as name, ExitStack() as stack:
        scratch = Path(name)
        subjects = {
            "never": stack.enter_context(daemon(scratch, "never")),
            "every-command": stack.enter_context(daemon(scratch, "every", "--checkpoint", "every-command")),
            "idle 60 s": stack.enter_context(daemon(scratch, "idle", "--checkpoint", "60")),
        }
        samples: dict[tuple[str, str], list[int]] = {}
        ratios: dict[tuple[str, str], list[float]] = {}
        disk: list[int] = []
        for _ in range(options.rounds):
            disk += bare(scratch / "bare", options.commands)
            for what, command in commands.items():
                base = 0.0
                for subject, client in subjects.items():
                    found = batch(client, command, options.commands)
                    samples.setdefault((what, subject), []).extend(found)
                    p50 = Summary.of(found).p50
                    base = base or p50
                    ratios.setdefault((what, subject), []).append(p50 / base)
    rows = [
        [what, subject, *(f"{value / 1e3:.0f}" for value in (summary.p50, summary.p90, summary.p99)), ratio]
        for (what, subject), found in samples.items()
        for summary in (Summary.of(found),)
        for ratio in (f"{percentile(sorted(ratios[what, subject]), 0.5):.2f}",)
    ]
    summary = Summary.of(disk)
    rows.append(["pwrite + fdatasync", "", *(f"{v / 1e3:.0f}" for v in (summary.p50, summary.p90, summary.p99)), ""])
    print("Round trips in µs\n")
    print(table(("command", "--checkpoint", "p50", "p90", "p99", "/ never"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
