"""How long a guest stands still for its TPM in a migration: GET_STATEBLOB of all three blobs. See README.md.

Usage: python bench/blobs.py [--rounds N] [--check] [--help]
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import control
from daemons import CRBD, SWTPM, Daemon, DidNotRunError, bound_to, describe_machine, find_programs, unwind_at_sigterm
from figures import Summary, table

DECRYPTED = 1
KINDS = (1, 2, 3)
"""Permanent, volatile, savestate: what QEMU asks for, in its order."""
RETRY = 0x800
"""swtpm's and crbd's answer where there is no such state, as there is never a savestate."""
LIMIT_MS = 20.0
"""For crbd, at the 99th percentile."""


def fetch(connection: socket.socket) -> int:
    """All three blobs; how many bytes they have. Raises DidNotRunError."""
    size = 0
    for kind in KINDS:
        result, reply = control.ask(connection, control.GET_STATEBLOB, struct.pack(">III", DECRYPTED, kind, 0))
        if result not in (control.SUCCESS, RETRY):
            raise DidNotRunError(f"GET_STATEBLOB {kind} was answered with {result:#x}")
        size += len(reply)
    return size


def measure(connections: dict[str, socket.socket], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by subject; the daemons take turns."""
    times: dict[str, list[float]] = {subject: [] for subject in connections}
    for _ in range(rounds):
        for subject, connection in connections.items():
            begin = time.perf_counter()
            fetch(connection)
            times[subject].append(1000 * (time.perf_counter() - begin))
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500, help="fetches a subject (default %(default)s)")
    parser.add_argument("--check", action="store_true", help=f"exit status 1 if crbd's p99 is above {LIMIT_MS:.0f} ms")
    parser.add_argument("--dir", default="/var/tmp", help="where the states live while measured (%(default)s)")
    options = parser.parse_args(arguments)
    unwind_at_sigterm()
    allowed = os.sched_getaffinity(0)
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch, ExitStack() as running:
            programs = find_programs(sys.executable, "swtpm", False, Path(scratch))
            machine = describe_machine(programs, Path(scratch))
            running.enter_context(bound_to(allowed))
            connections = {}
            for subject in (SWTPM, CRBD):
                daemon = running.enter_context(Daemon(subject, Path(scratch) / subject, programs, allowed))
                running.enter_context(daemon.first_reply())
                connections[subject] = running.enter_context(daemon.connect_control())
            sizes = {subject: fetch(connection) for subject, connection in connections.items()}
            summaries = {subject: Summary.of(found) for subject, found in measure(connections, options.rounds).items()}
    except (DidNotRunError, OSError) as error:
        print(f"blobs: {error}", file=sys.stderr)
        return 1
    for name, value in machine.items():
        print(f"{name + ':':17}{value}")
    print("\nGET_STATEBLOB of all three, milliseconds\n")
    rows = [
        [subject, str(sizes[subject]), *(f"{value:.2f}" for value in (found.p50, found.p99, found.maximum))]
        for subject, found in summaries.items()
    ]
    print(table(("subject", "bytes", "p50", "p99", "max"), rows))
    return int(options.check and summaries[CRBD].p99 > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
